"""The options of ``sd-run``, and what they are called in `Pipeline.__call__`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import sdrt
from sdrt.runtime.backends.backend import BACKENDS
from sdrt.runtime.cli.lora_options import add_lora_options
from sdrt.runtime.cli.prompts import has_prompt
from sdrt.runtime.cli.saving import STDOUT
from sdrt.runtime.console.run_command import Parser
from sdrt.runtime.request.option_names import OPTION_NAMES, command_name

EPILOG: Final = """exit status: 0 done; 2 usage; 3 the bundle cannot be used; 6 NaN or infinity;
7 the backend is missing or fails; 8 the picture cannot be written; 130 interrupted; 1 anything else.
No file is left half written.

An option may have underscores for dashes, and other tools' names are understood:"""

REFINE_FROM: Final = 0.8  # of diffusers' examples
ONE_PROMPT: Final = "--to-prompt and --to-seed go from one PROMPT: give one"

# What the command alone calls otherwise.
_ITS_OWN: Final = {"prompt": ("-p",), "mask_image": ("--mask-image",)}
# Its option → what other tools call it.
_BY_OPTION: Final = {
    f"--{command_name(option).replace('_', '-')}": (
        *_ITS_OWN.get(option, ()),
        *(f"--{other.replace('_', '-')}" for other in names.others),
    )
    for option, names in OPTION_NAMES.items()
    if names.others or option in _ITS_OWN
}
ALSO_CALLED: Final = {other: ours for ours, others in _BY_OPTION.items() for other in others}
# What means one thing there and another here.
NOT_CALLED: Final = {
    "-m": "--bundle, a folder that sd-export made",
    "--model": "--bundle, a folder that sd-export made",
    "--ckpt": "--bundle, a folder that sd-export made",
    "-s": "--steps or --seed",
    "-i": "--image or --interactive",
    "-b": "--num-images or --bundle",
}

# What the command shares with the pipeline, by the pipeline's names.
_SHARED: Final = (
    *("negative_prompt", "plain_prompt", "comma_lookback", "clip_skip", "loras", "lora_partial"),
    *("height", "width", "num_images_per_prompt"),
    *("seed", "rng", "image", "strength", "mask_image", "depth_map", "expand", "variation"),
    *("num_inference_steps", "guidance_scale", "image_guidance_scale", "noise_level"),
    *("guidance_interval", "guidance_rescale"),
    *("refine_from", "aesthetic_score", "negative_aesthetic_score"),
    *("sampler", "karras", "spacing", "sigma_schedule", "timesteps", "sigmas", "eta", "solver_order"),
    *("lower_order_final", "original_inference_steps"),
)


def parser() -> Parser:
    """The command line of ``sd-run``."""
    others = [f"  {ours}: {', '.join(names)}" for ours, names in _BY_OPTION.items()]
    result = Parser(
        prog="sd-run",
        description="Draw pictures from a prompt, or from a picture.",
        epilog="\n".join([EPILOG, *others]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    result.also_called, result.not_called = ALSO_CALLED, NOT_CALLED
    _add_drawing(result)
    _add_picture(result.add_argument_group("from a picture"))
    _add_interpolation(result.add_argument_group("from one to another"))
    _add_sampling(result.add_argument_group("sampling"))
    _add_running(result.add_argument_group("running"))
    return result


def parsed(commands: Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; options and prompts may come in any order, and after ``--`` all are prompts."""
    words = commands.own_words(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    arguments = commands.parse_intermixed_args(words[:end])
    arguments.prompt += words[end + 1 :]
    arguments.recipe_prompt = None  # of --from
    return arguments


def pipeline_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments that the command shares with `Pipeline.__call__`, by its names; those that were given."""
    found = {name: getattr(arguments, command_name(name)) for name in _SHARED}
    return {name: value for name, value in found.items() if value is not None}


def check_usage(commands: Parser, arguments: argparse.Namespace) -> None:
    """Refuse options that do not go together: one line, and the end with status 2."""
    prompted = has_prompt(arguments)
    several = len(arguments.prompt) + len(arguments.more_prompts) > 1 or arguments.prompts is not None
    animates = interpolates(arguments)
    for wrong, words in (
        (
            arguments.interactive and prompted,
            "--interactive takes its prompts from standard input: leave PROMPT out",
        ),
        (
            not arguments.interactive and not prompted and arguments.image is None,
            "the following arguments are required: PROMPT",
        ),
        (arguments.preview and arguments.interactive, "--preview does not go with --interactive"),
        (arguments.warm_up and not arguments.interactive, "--warm-up goes with --interactive"),
        (
            arguments.interactive and arguments.quality is not None,
            "--quality does not go with --interactive",
        ),
        (arguments.json and arguments.output == STDOUT, "--json does not go with --output -"),
        (animates and arguments.interactive, "--to-prompt and --to-seed do not go with --interactive"),
        (animates and not prompted, "--to-prompt and --to-seed need a PROMPT to go from"),
        (animates and several, ONE_PROMPT),
        (
            animates and arguments.num_images != 1,
            "--num-images does not go with --to-prompt and --to-seed: --frames says how many",
        ),
        (
            not animates and (arguments.frames is not None or arguments.fps is not None),
            "--frames and --fps go with --to-prompt or --to-seed",
        ),
    ):
        if wrong:
            commands.error(words)


def interpolates(arguments: argparse.Namespace) -> bool:
    """Whether frames are asked for, from one end to another."""
    return arguments.to_prompt is not None or arguments.to_seed is not None


def _numbers(text: str) -> list[float]:
    """Numbers between commas."""
    return [float(part) for part in text.split(",")]


def _whole_numbers(text: str) -> list[int]:
    """Whole numbers between commas."""
    return [int(part) for part in text.split(",")]


def _number_or_numbers(text: str) -> float | list[float]:
    """One number, or several between commas."""
    found = _numbers(text)
    return found if len(found) > 1 else found[0]


# What argparse says that a value is not.
_numbers.__name__, _whole_numbers.__name__ = "list of numbers", "list of whole numbers"
_number_or_numbers.__name__ = "number or list of numbers"


def _add_drawing(result: argparse.ArgumentParser) -> None:
    add = result.add_argument
    add(
        "prompt",
        metavar="PROMPT",
        nargs="*",
        help="what to draw, in quotes; (word:1.3) weighs, BREAK begins a chunk; - reads prompts from "
        "standard input, one a line",
    )
    add(
        "--prompt",
        dest="more_prompts",
        action="append",
        default=[],
        metavar="TEXT",
        help="the same as PROMPT; may be given several times",
    )
    add(
        "--prompts",
        metavar="FILE",
        help="prompts from a file (- is standard input): one a line, empty lines left out; or lines of JSON "
        "with the names of --interactive",
    )
    add(
        "--from",
        dest="from_picture",
        metavar="FILE",
        help="draw the picture of a .png, .jpg or .webp that sdrt wrote again, by the recipe inside; what "
        "else is given here takes the place of what the recipe says",
    )
    add("--negative-prompt", metavar="TEXT", help="what to move away from")
    add("--plain-prompt", action="store_true", default=None, help="brackets and BREAK are text")
    add(
        "--comma-lookback",
        type=int,
        metavar="N",
        help="part long prompts behind a comma within N tokens of a chunk's end (default: 20; 0: anywhere)",
    )
    add("--clip-skip", type=int, metavar="N", help="leave out the text encoder's last N layers (default: 0)")
    add(
        "--embedding",
        action="append",
        default=[],
        metavar="FILE[=WORD]",
        help="a textual-inversion file (.safetensors) and the word that stands for it in prompts "
        "(default: the file's name); may be given several times",
    )
    add_lora_options(add)
    add("--bundle", metavar="DIR", help="a folder that sd-export made (default: the embedded emoji model)")
    add("--refiner", metavar="DIR", help="a second bundle, SDXL's refiner, which draws the last steps")
    add(
        "--seed",
        type=int,
        metavar="N",
        help="of the first picture; the others count up (default, and -1: random)",
    )
    add(
        "--num-images",
        "--num-images-per-prompt",
        "-n",
        type=int,
        default=1,
        metavar="N",
        help="how many pictures of each prompt (default: 1)",
    )
    add("--height", "-H", type=int, metavar="PIXELS", help="default: the given picture's, or the bundle's")
    add("--width", "-W", type=int, metavar="PIXELS", help="likewise")
    add(
        "--output",
        "-o",
        type=Path,
        metavar="PATH",
        help="a .png, .jpg or .webp, or a folder (default: ./PROMPT-SEED.png); - is standard output, for one "
        "picture as PNG; frames: an animated .webp or .png, or a folder (default: ./PROMPT-SEED.webp); with "
        "--interactive also base64: pictures come in the results",
    )
    add(
        "--quality",
        type=int,
        metavar="N",
        help="1 to 100, of a .jpg (default: 95), or of a .webp (default: without loss)",
    )
    add("--json", action="store_true", help="print one JSON object: paths, seeds, seconds per stage")
    add("--quiet", "-q", action="store_true", help="print errors only")
    add("--verbose", "-v", action="store_true", help="say why this backend was taken and no other")
    add("--preview", action="store_true", help="show it on the terminal while it is drawn")
    add("--version", action="version", version=f"sdrt {sdrt.__version__}")


def _add_picture(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--image",
        metavar="FILE",
        help="a picture to start from; without a mask it is resized, and cut in its middle, to what the "
        "bundle draws; what is transparent becomes white",
    )
    add(
        "--strength",
        type=float,
        metavar="SHARE",
        help="the share of the steps that are run on it, above 0 to 1, one step at least; a strong guidance "
        "changes much in few steps (default: 0.8, SDXL's refiner 0.3; with a mask 1)",
    )
    add("--mask", metavar="FILE", help="draw where this picture is white; where it is black, nothing changes")
    add("--depth", metavar="FILE", help="a depth map, bright is near, for a bundle that draws with one")
    add(
        "--expand",
        type=_whole_numbers,
        metavar="LEFT,TOP,RIGHT,BOTTOM",
        help="enlarge the picture by so many pixels a side, and draw there",
    )
    add(
        "--variation",
        type=float,
        metavar="SHARE",
        help="invert the picture to noise, take this share of the noise from the seed, and draw: little of "
        "it keeps the picture nearly as it is, 1 is another (default without PROMPT: 0.3)",
    )


def _add_interpolation(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--to-prompt", metavar="TEXT", help="draw frames from PROMPT to this one")
    add("--to-seed", type=int, metavar="N", help="draw frames from --seed to this one")
    add("--frames", type=int, default=None, metavar="N", help="how many (default: 16)")
    add("--fps", type=float, default=None, metavar="N", help="frames per second (default: 8)")


def _add_sampling(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--steps",
        "--num-inference-steps",
        type=int,
        metavar="N",
        help="sampling steps (default: the bundle's)",
    )
    add(
        "--guidance-scale",
        type=_number_or_numbers,
        metavar="W[,W…]",
        help="how far to follow the prompt; 1 or less: no guidance; several: one for each step "
        "(default: the bundle's)",
    )
    add(
        "--image-guidance-scale",
        type=float,
        metavar="V",
        help="of an instruct-pix2pix bundle: how far to keep to the picture, from 1 (default: 1.5)",
    )
    add(
        "--noise-level",
        type=int,
        metavar="N",
        help="of a stable-unclip or x4-upscaler bundle: noise over the given picture (default: 0 and 20)",
    )
    add(
        "--guidance-interval",
        type=_numbers,
        metavar="START,STOP",
        help="guide only between these shares of the steps, such as 0.1,0.8; the others take half the work",
    )
    add(
        "--guidance-rescale",
        type=float,
        metavar="PHI",
        help="against overexposure by strong guidance, 0 to 1 (default: 0)",
    )
    add(
        "--refine-from",
        type=float,
        metavar="SHARE",
        help=f"the share of the schedule that the bundle draws before --refiner (default: {REFINE_FROM})",
    )
    for name, default in (("aesthetic-score", "6"), ("negative-aesthetic-score", "2.5")):
        add(f"--{name}", type=float, metavar="N", help=f"that SDXL's refiner is told (default: {default})")
    add(
        "--sampler",
        metavar="NAME",
        help="such as ddim, dpmpp_2m or euler, or as A1111 and diffusers call it ('DPM++ 2M Karras', "
        "EulerDiscreteScheduler); an unknown name lists all (default: the bundle's)",
    )
    add("--karras", action="store_true", default=None, help="short for --sigma-schedule karras")
    add("--sigma-schedule", metavar="NAME", help="noise levels: karras, exponential, beta, or normal")
    add("--spacing", metavar="NAME", help="of timesteps: leading, trailing (sgm_uniform) or linspace")
    add("--timesteps", type=_numbers, metavar="T,T…", help="the timesteps themselves, falling")
    add("--sigmas", type=_numbers, metavar="S,S…", help="the noise levels themselves, falling to 0")
    add(
        "--eta",
        type=float,
        metavar="SHARE",
        help="fresh noise per step, 0 to 1 (if the sampler has it; default: the sampler's own)",
    )
    add("--solver-order", type=int, metavar="N", help="of a multistep sampler")
    add(
        "--no-lower-order-final",
        dest="lower_order_final",
        action="store_false",
        default=None,
        help="keep a multistep sampler's order to the end",
    )
    add(
        "--original-inference-steps",
        type=int,
        metavar="N",
        help="steps that a model for lcm or tcd was distilled for (default: 50)",
    )
    add(
        "--rng",
        metavar="NAME",
        help="philox or cpu: the noise of PyTorch's CUDA or CPU generator (default: philox)",
    )


def _add_running(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    *others, last = BACKENDS
    add(
        "--backend",
        default="auto",
        metavar="NAME",
        help=f"{', '.join(others)} or {last} (default: auto, the first of these that can run the bundle "
        "here)",
    )
    add("--device", type=int, metavar="N", help="number of the GPU (default: 0)")
    add(
        "--threads",
        type=int,
        metavar="N",
        help="on the CPU, threads inside one operator (default: one per core)",
    )
    add(
        "--interactive",
        action="store_true",
        help="stay loaded: one JSON request a line on standard input, one result a line on standard output; "
        "the options given here are the requests' defaults",
    )
    add("--warm-up", action="store_true", help="with --interactive: draw a picture before the first request")
    verify = group.add_mutually_exclusive_group()
    verify.add_argument(
        "--verify",
        action="store_const",
        const="always",
        default=True,
        help="compare the hashes of the bundle's files and of what is in the cache also where that was done "
        "before and nothing was touched since",
    )
    verify.add_argument(
        "--no-verify",
        dest="verify",
        action="store_const",
        const=False,
        help="compare sizes but not hashes of the bundle's files",
    )
