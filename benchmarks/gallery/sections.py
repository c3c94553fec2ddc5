"""What the gallery shows: sections of pictures, each picture as the words of its command."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sdrt.runtime.samplers.registry import SAMPLERS

SAMPLER_STEPS = (10, 20, 50)
GUIDANCE = (1, 1.5, 2, 3, 5, 7.5, 10, 12)
STRENGTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
VARIATIONS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
FRAMES = 12
LORA_WEIGHTS = (0, 0.5, 1)


@dataclass(slots=True)
class Entry:
    """One picture of the page.

    Attributes:
        words: Of the command, without ``sd-run`` and without where the picture goes.
        caption: What to look at.
        file: Where the picture lies beside the page, for commands that start from it.
        picture: Once drawn, uint8 [H, W, 3]; of an interpolation its first frame.
        encoded: The file's bytes, PNG or WebP.
    """

    words: list[str]
    caption: str
    file: str | None = None
    picture: NDArray[np.uint8] | None = None
    encoded: bytes = b""

    @property
    def command(self) -> str:
        """As it is typed into a shell."""
        output = [] if self.file is None else ["--output", self.file]
        return shlex.join(["sd-run", *self.words, *output])


@dataclass(slots=True)
class Section:
    """Pictures that belong together.

    ``columns`` lays them out in rows of so many; 0: as many as the window has room for.
    """

    title: str
    about: str
    entries: list[Entry] = field(default_factory=list)
    columns: int = 0


def sections(sampler_steps: Sequence[int] = SAMPLER_STEPS) -> list[Section]:
    """What the page shows, in its order; later commands start from earlier pictures.

    Args:
        sampler_steps: Each sampler draws with so many steps.
    """
    return [
        *_texts(),
        _samplers(sampler_steps),
        *_guidance(),
        *_loras(),
        *_pictures(),
        *_interpolations(),
    ]


def _entries(words: Iterable[tuple[list[str], str]], *shared: str) -> list[Entry]:
    return [Entry([*own, *shared], caption) for own, caption in words]


def _texts() -> list[Section]:
    prompts = ("a red apple", "a cat face", "a house", "a red car", "a yellow star", "a blue whale")
    balloon = "white, " * 80 + "a red balloon"
    return [
        Section(
            "Prompts",
            "The embedded model draws 64 × 64 pixels and knows 167 emoji. Later commands start from these.",
            [Entry([text, "--seed", "3"], text, file=f"{text.split()[-1]}.png") for text in prompts],
        ),
        Section(
            "Negative prompts",
            "Pairs from the same noise: without, and with something to move away from.",
            _entries(
                [
                    (["a face", "--seed", "3"], "a face"),
                    (["a face", "--negative-prompt", "a clown face", "--seed", "3"], "not a clown"),
                    (["a face", "--seed", "2"], "a face"),
                    (["a face", "--negative-prompt", "a yellow face", "--seed", "2"], "not yellow"),
                    (["a fruit", "--seed", "9"], "a fruit"),
                    (["a fruit", "--negative-prompt", "a red apple", "--seed", "9"], "not an apple"),
                ],
                "--guidance-scale",
                "2",
            ),
        ),
        Section(
            "Weights, chunks, clip skip",
            "Weights multiply what the text encoder says of a word. A prompt of over 75 tokens is encoded "
            "in chunks, and so is one with BREAK.",
            _entries(
                [
                    (["a (red apple:1.4) BREAK a (lemon:0.4)"], "two chunks, more of an apple"),
                    (["a (red apple:0.2) BREAK a (lemon:1.8)"], "two chunks, more of a lemon"),
                    ([balloon], "the balloon stands after the 75th token"),
                    (["a cat face", "--clip-skip", "1"], "clip skip 1"),
                    (["a (cat) [face]", "--plain-prompt"], "brackets as text"),
                ],
                "--seed",
                "3",
                "--guidance-scale",
                "4",
            ),
        ),
    ]


def _samplers(sampler_steps: Sequence[int]) -> Section:
    words = [
        (["a fox face", "--sampler", name, "--steps", str(steps)], f"{name}, {steps} steps")
        for name in SAMPLERS
        for steps in sampler_steps
    ]
    return Section(
        "Samplers",
        "All from the same noise. lcm and tcd are for models that were distilled for few steps, which this "
        "one was not. pndm and dpm2_a want more than 10 steps of it; diffusers draws the same there.",
        _entries(words, "--seed", "7", "--guidance-scale", "4"),
        columns=len(sampler_steps),
    )


def _guidance() -> list[Section]:
    owl = ["an owl", "--seed", "11"]
    return [
        Section(
            "Guidance",
            "How far to follow the prompt. At 1 the unconditional half is not run at all.",
            _entries(
                [([*owl, "--guidance-scale", f"{w:g}"], f"guidance {w:g}") for w in GUIDANCE],
            ),
        ),
        Section(
            "Guidance: interval, schedule, rescale",
            "Outside of the interval one half is run. Rescale is for v-prediction: here it does little.",
            _entries(
                [
                    ([*owl, "--guidance-scale", "7.5"], "all steps"),
                    (
                        [*owl, "--guidance-scale", "7.5", "--guidance-interval", "0.1,0.6"],
                        "steps 10 % to 60 %",
                    ),
                    (
                        [*owl, "--steps", "10", "--guidance-scale", "9,8,7,6,5,4,3,2,1,1"],
                        "falling from 9 to 1",
                    ),
                    ([*owl, "--guidance-scale", "12"], "12"),
                    ([*owl, "--guidance-scale", "12", "--guidance-rescale", "0.7"], "12, rescaled by 0.7"),
                ],
            ),
        ),
    ]


def _loras() -> list[Section]:
    def at(words: Sequence[str], name: str) -> list[tuple[list[str], str]]:
        return [
            ([*words, "--lora", f"{name}.safetensors={weight:g}"], f"{name} at {weight:g}")
            for weight in LORA_WEIGHTS
        ]

    fruits = [["a fruit", "--seed", str(seed)] for seed in range(1, 5)]
    plain = ["--seed", "3", "--guidance-scale", "3"]
    few = ["--sampler", "lcm", "--steps", "4", "--guidance-scale", "1"]
    return [
        Section(
            "LoRAs",
            "Of models/emoji/lora, at three weights: two styles, a concept that the model does not know, "
            "and that in a style.",
            [
                *_entries(at(["an owl"], "delft"), *plain),
                *_entries(at(["an owl"], "outline"), *plain),
                *_entries(at(["a wizard"], "wizard"), *plain),
                *_entries(at(["a wizard", "--lora", "wizard.safetensors"], "delft"), *plain),
            ],
            columns=len(LORA_WEIGHTS),
        ),
        Section(
            "Few steps",
            "Twenty steps with guidance, four without, four without but with the LoRA distilled for that.",
            [
                *_entries([(words, "20 steps, guidance 5") for words in fruits], "--guidance-scale", "5"),
                *_entries([([*words, *few], "4 steps") for words in fruits]),
                *_entries(
                    [([*words, *few], "4 steps, lcm") for words in fruits], "--lora", "lcm.safetensors"
                ),
            ],
            columns=len(fruits),
        ),
    ]


def _pictures() -> list[Section]:
    strength = [
        (["a green apple", "--image", "apple.png", "--strength", f"{share:g}"], f"strength {share:g}")
        for share in STRENGTHS
    ]
    masks = [
        (["a rainbow", "--image", "apple.png", "--mask", "right-half.png"], "right half: a rainbow"),
        (["a green apple", "--image", "apple.png", "--mask", "right-half.png"], "right half: a green apple"),
        (["a top hat", "--image", "face.png", "--mask", "top-half.png"], "top half: a top hat"),
        (["a cookie", "--image", "apple.png", "--mask", "middle.png"], "middle: a cookie"),
    ]
    expand = [
        (["a house", "--image", "house.png", "--expand", "32,0,32,0"], "32 pixels left and right"),
        (["a rainbow", "--image", "car.png", "--expand", "0,64,0,0"], "64 pixels above: a rainbow"),
        (["a red apple", "--image", "apple.png", "--expand", "64,0,0,0"], "64 pixels left"),
    ]
    variations = [
        (["--image", "apple.png", "--variation", f"{share:g}"], f"{share:g} of the noise is new")
        for share in VARIATIONS
    ]
    kept = "A pixel that the mask keeps is exactly as it was given."
    return [
        Section(
            "Image to image",
            "A red apple on its way to a green one.",
            _entries(strength, "--seed", "5", "--guidance-scale", "2"),
        ),
        Section(
            "Inpainting",
            f"Only what is white in the mask is drawn. {kept}",
            _entries(masks, "--seed", "5", "--guidance-scale", "4"),
        ),
        Section(
            "Outpainting",
            f"A larger canvas. {kept}",
            _entries(expand, "--seed", "5", "--guidance-scale", "4"),
        ),
        Section(
            "Variations without a prompt",
            "The apple is inverted to the noise it would be drawn from; a share of that noise is replaced.",
            _entries(variations, "--seed", "9"),
        ),
    ]


def _interpolations() -> list[Section]:
    frames = ["--frames", str(FRAMES), "--fps", "6"]
    return [
        Section(
            "Interpolation",
            "Animations: between two prompts, between two seeds, and both.",
            _entries(
                [
                    (["a red apple", "--to-prompt", "a green pear", "--seed", "3", *frames], "two prompts"),
                    (["a cat face", "--seed", "3", "--to-seed", "4", *frames], "two seeds"),
                    (
                        [
                            "a fox face",
                            "--to-prompt",
                            "a tiger face",
                            "--seed",
                            "3",
                            "--to-seed",
                            "8",
                            *frames,
                        ],
                        "both",
                    ),
                ]
            ),
        )
    ]
