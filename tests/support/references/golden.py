"""Makes the golden numbers of `docs/golden`, to which other implementations of the runtime are held.

``make golden`` writes the files; `docs/golden/README.md` says what their fields are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from support.references.golden_steps import SCHEDULES, runs
from support.references.golden_text import short, text_of

from sdrt.kernels.image_to_uint8 import image_to_uint8
from sdrt.kernels.philox import philox4x32
from sdrt.kernels.philox_normal import NO_DRAW
from sdrt.kernels.sampler_row import HISTORY, Column
from sdrt.runtime.pictures.canvas import image_to_float, latent_mask
from sdrt.runtime.request.picture import draws_at_start
from sdrt.runtime.samplers.guidance import guidance_embedding, guidance_weights
from sdrt.runtime.samplers.noise import noise_source
from sdrt.runtime.samplers.registry import SAMPLERS, first_step, make_table
from sdrt.runtime.samplers.sampler import Sampler
from sdrt.runtime.samplers.table import NO_OPTIONS, SamplerOptions, SamplerTable
from sdrt.runtime.samplers.timestep import inversion_table
from sdrt.runtime.text.chunks import Chunk, Prompt, PromptPlanner
from sdrt.runtime.text.syntax import parse_prompt
from sdrt.runtime.text.tokenizer import Tokenizer

ROOT: Final = Path(__file__).parents[3]
FOLDER: Final = ROOT / "docs/golden"
TOKENIZER: Final = ROOT / "models/emoji/bundle/tokenizer.json"
SPECIAL: Final = {"max_length": 77, "bos": 4094, "eos": 4095, "pad": 4095}  # of that tokenizer
MAX_CHUNKS: Final = 4

Case = dict[str, Any]


def golden() -> dict[str, dict[str, Any]]:
    """Each file's name, and what is in it."""
    return {
        "tables.json": {
            "columns": [column.name for column in Column],
            "history": HISTORY,
            "cases": list(tables()),
        },
        "noise.json": {
            "philox4x32": list(philox_words()),
            "cases": list(noise()),
            "draws": list(draws()),
        },
        "guidance.json": {"weights": list(weights()), "embedding": list(embeddings())},
        "steps.json": {"columns": [column.name for column in Column], "cases": list(runs())},
        "tokens.json": {
            "tokenizer": {"file": TOKENIZER.relative_to(ROOT).as_posix(), **SPECIAL},
            "max_chunks": MAX_CHUNKS,
            "cases": list(prompts()),
        },
        "pictures.json": pictures(),
    }


def tables() -> Iterator[Case]:
    for sampler in SAMPLERS.values():
        for schedule, count, strength, options in _runs(sampler):
            steps = options.num_given_steps if count is None else count
            assert steps is not None
            start = 0 if strength is None else first_step(steps, strength)
            table = make_table(sampler.name, SCHEDULES[schedule], count, options, start=start)
            yield {
                "sampler": sampler.name,
                "schedule": SCHEDULES[schedule].to_dict(),
                "num_inference_steps": steps,
                "strength": strength,
                "options": options.to_dict(),
                **_table(table),
            }
    for schedule in ("sd15", "v_prediction"):
        yield {
            "sampler": "ddim_inverse",
            "schedule": SCHEDULES[schedule].to_dict(),
            "num_inference_steps": 6,
            "strength": 0.7,
            "options": {},
            **_table(inversion_table(SCHEDULES[schedule], 6, first_step(6, 0.7))),
        }


def _runs(sampler: Sampler) -> Iterator[tuple[str, int | None, float | None, SamplerOptions]]:
    """Schedule, steps, strength and options of each case of a sampler."""
    several: dict[str, tuple[Any, ...]] = {
        "spacing": ("leading", "trailing", "linspace"),
        "sigma_schedule": ("karras", "exponential", "beta"),
        "eta": (0.0, 0.3, 1.0),
        "solver_order": tuple(range(1, sampler.max_order + 1)),
        "lower_order_final": (False,),
        "final_sigmas_type": ("sigma_min",),
        "euler_at_final": (True,),
        "original_inference_steps": (20,),
        "timesteps": ((901.0, 500.0, 77.0),),
        "sigmas": ((11.5, 3.25, 0.75, 0.0),),
        "solver_type": ("bh1" if sampler.name == "unipc" else "heun",),
    }
    yield "sd15", 1, None, NO_OPTIONS
    yield "sd15", 20, None, NO_OPTIONS
    yield "sd15", 8, 0.5, NO_OPTIONS
    for schedule in ("unsaid", "v_prediction", "sample"):
        yield schedule, 5, None, NO_OPTIONS
    yield "cosine", 5, None, NO_OPTIONS
    if sampler.zero_snr:
        yield "zero_snr", 5, None, NO_OPTIONS
    if sampler.edm:
        yield "edm", 4, None, NO_OPTIONS
        yield "edm_v", 4, None, NO_OPTIONS
    for name, values in several.items():
        if name in sampler.options:
            for value in values:
                given = name in ("timesteps", "sigmas")
                yield "sd15", None if given else 6, None, SamplerOptions(**{name: value})
    if "algorithm_type" in sampler.options:
        options = SamplerOptions(algorithm_type="dpmsolver", final_sigmas_type="sigma_min", solver_order=3)
        yield "sd15", 6, None, options


def _table(table: SamplerTable) -> Case:
    return {
        "init_noise_sigma": table.init_noise_sigma,
        "steps": table.steps.tolist(),
        "draws": table.draws.tolist(),
        "timesteps": table.timesteps.tolist(),
        "rows": table.rows.tolist(),
    }


def philox_words() -> Iterator[Case]:
    for counter, key in (
        ((0, 0, 0, 0), (0, 0)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)),
        ((3, 0, 70_000, 0), (1234, 1)),
    ):
        words = philox4x32(np.array(counter, np.uint32), np.array(key, np.uint32))
        yield {"counter": counter, "key": key, "words": words.tolist()}


def noise() -> Iterator[Case]:
    for rng in ("philox", "cpu"):
        for seed in (0, 1, 42, 2**32 + 42, 2**64 - 1):
            for shape in ((4, 4, 4), (3, 5), (4, 64, 64)):
                for draw in (0, 1, 5) if seed < 42 else (0,):
                    (values,) = noise_source(rng, [seed]).draw(draw, shape)
                    yield {
                        "rng": rng,
                        "seed": seed,
                        "shape": shape,
                        "draw": draw,
                        **_ends(values),
                    }


def _ends(values: NDArray[np.float32]) -> Case:
    """All of few numbers, or the first and the last of many."""
    if values.size <= 64:
        return {"values": short(values)}
    return {"first": short(values.ravel()[:8]), "last": short(values.ravel()[-8:])}


def draws() -> Iterator[Case]:
    """Which draw of an image's stream is what: before the first row, and of each row."""
    for task, masked, from_noise, reads_mask in (
        ("text to image", None, True, False),
        ("image to image", False, False, False),
        ("inpainting", True, True, False),
        ("inpainting", True, False, False),
        ("inpainting", True, True, True),
        ("inpainting", True, False, True),
    ):
        canvas = SimpleNamespace(mask=None if not masked else ())
        picture: Any = SimpleNamespace(variation=None, input="", canvas=canvas, starts_from_noise=from_noise)
        manifest: Any = SimpleNamespace(reads_mask=reads_mask)
        before = draws_at_start(None if masked is None else picture, manifest)
        strength = 1.0 if from_noise else 0.6
        for sampler in ("euler_a", "dpmpp_sde", "ddpm", "ddim"):
            table = make_table(sampler, SCHEDULES["sd15"], 5, start=first_step(5, strength))
            yield {
                "task": task,
                "strength": strength,
                "unet_reads_mask": reads_mask,
                "before": before,
                "sampler": sampler,
                "num_inference_steps": 5,
                "rows": np.where(table.draws < 0, NO_DRAW, table.draws + len(before)).tolist(),
            }


def weights() -> Iterator[Case]:
    for sampler, count, start in (("ddim", 10, 0), ("heun", 5, 2), ("pndm", 4, 0), ("euler", 3, 1)):
        table = make_table(sampler, SCHEDULES["sd15"], count, start=start)
        for scale in (7.5, [1.0 + step / 2 for step in range(count)]):
            for interval in ((0.0, 1.0), (0.2, 0.8), (0.34, 0.67)):
                yield {
                    "sampler": sampler,
                    "num_inference_steps": count,
                    "start": start,
                    "guidance_scale": scale,
                    "guidance_interval": interval,
                    "weights": guidance_weights(table, scale, interval).tolist(),
                }


def embeddings() -> Iterator[Case]:
    for w, width in ((0.0, 8), (0.5, 8), (6.5, 16), (7.0, 9), (0.5, 256)):
        yield {"w": w, "width": width, "embedding": short(guidance_embedding(w, width))}


_LONG: Final = ", ".join(f"a small red apple number {number} on the old table" for number in range(9))
PROMPTS: Final = (
    *("", " ", "a red apple", "A RED Apple!", "a  red\tapple\n", "🍎", "a 🍎 and a 👩‍🚀"),
    *("don't", "it's 2024, isn't it?", "a, b ,c,,d", "a &amp; b", "“curly” ‘quotes’ ﬁ ligature"),
    *("(a red apple)", "((a) red) apple", "(a red apple:1.3)", "[a red] apple", "[[a]] (b:0.5)"),
    *("(a (b:2):0.5) c", r"\(a\) \[b\] \\ c", "a (b", "a b) c", "a [b) c]", "(a:1.2) (b:1.2)"),
    *("(a:-1) b", "a:1.3 b", "(a: 1.5 ) b", "a BREAK b", "BREAK", "a BREAK BREAK b"),
    *("aBREAK b break", "(a BREAK b:1.4)", "a <lora:x:0.8> b", "a AND b", "[a|b] c", "{a|b}"),
    *("naïve café Ångström", "e\u0301 and é", "ſtraſſe ǅ İ", "日本語 한국어 עברית العربية"),
    *("ﾊﾝｶｸ ① ² ½", "\u200bzero\u200dwidth", "<|endoftext|> a <|startoftext|>", "a,<|endoftext|>"),
    *("x" * 80, "ab" * 120, "🍎" * 30, _LONG, f"({_LONG}:0.9)", _LONG.replace(",", "")),
    " ".join(["word"] * 74) + ", green leaf behind it",
    " ".join([_LONG] * 6),
    " ".join(["word"] * 60) + ", a phrase that is kept whole for it is short enough",
)


def prompts() -> Iterator[Case]:
    tokenizer = Tokenizer.from_file(TOKENIZER, **SPECIAL)
    planner = PromptPlanner([tokenizer], max_chunks=MAX_CHUNKS, max_clip_skip=0)
    cases = [Prompt(text) for text in PROMPTS]
    cases += [Prompt("(a:1.3) BREAK [b]", plain=True), Prompt(PROMPTS[-1], comma_lookback=0)]
    for prompt in cases:
        assert prompt.text is not None
        plan = planner.plan(prompt)
        yield {
            "prompt": prompt.text,
            **({"plain": True} if prompt.plain else {}),
            **({"comma_lookback": 0} if not prompt.comma_lookback else {}),
            "sections": [
                [[piece.text, piece.weight] for piece in section]
                for section in parse_prompt(prompt.text, plain=prompt.plain)
            ],
            "chunks": [_chunk(part) for part in plan.chunks if isinstance(part, Chunk)],
            "cut_off": plan.cut_off,
        }


def _chunk(chunk: Chunk) -> Case:
    """Without the padding behind the end, which says nothing."""
    (row,) = chunk.rows
    end = next(place for place in range(1, len(row.ids)) if set(row.ids[place:]) == {SPECIAL["pad"]})
    return {"ids": row.ids[: end + 1], **({"weights": row.weights[: end + 1]} if row.weights else {})}


def pictures() -> dict[str, Any]:
    random = np.random.default_rng(0)
    halves = (np.arange(0, 255, 15, dtype=np.float32) + np.float32(0.5)) / np.float32(127.5) - np.float32(1)
    edges = np.array([-7, -1, -1 + 2**-9, -0.0, 0, 0.5, 1 - 2**-9, 1, 1.00390625, 7], np.float32)
    values = np.concatenate([edges, halves, random.uniform(-1.1, 1.1, 21).astype(np.float32)])
    assert len(values) % 3 == 0
    pixels = image_to_uint8(values.reshape(1, 3, 1, -1)).transpose(0, 3, 1, 2)
    levels = np.arange(0, 255, 5, dtype=np.uint8)
    mask = random.choice([0.0, 0.25, 1.0], (4, 8), p=[0.7, 0.2, 0.1]).astype(np.float32)
    return {
        "decoded": {"float": short(values), "uint8": pixels.ravel().tolist()},
        "read": {
            "uint8": levels.tolist(),
            "float": short(image_to_float(levels.reshape(1, -1, 3)).transpose(0, 2, 3, 1)),
        },
        "mask": {"pixels": short(mask), "factor": 2, "latents": short(latent_mask(mask, 2))},
        "scaling_factor": {
            name: json.loads((ROOT / f"export/data/architectures/{name}/vae/config.json").read_text())[
                "scaling_factor"
            ]
            for name in ("sd15", "sd21", "sdxl")
        },
    }


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, data in golden().items():
        (FOLDER / name).write_text(text_of(data), encoding="utf-8")
        print(f"{name}: {(FOLDER / name).stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
