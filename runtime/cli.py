"""``sd-run PROMPT``: draw from a bundle."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import sdrt
from sdrt.runtime.command import Parser, put, run_command, say
from sdrt.runtime.saving import BASE64, check_output, save

if TYPE_CHECKING:
    from sdrt.runtime.bundle import Bundle
    from sdrt.runtime.pipeline import Pipeline, PipelineOutput
    from sdrt.runtime.request import Request

EPILOG: Final = """exit status: 0 done; 2 usage; 3 the bundle cannot be used; 6 NaN or infinity;
7 the backend is missing or fails; 8 the picture cannot be written; 130 interrupted; 1 anything else.
No file is left half written."""


def parser() -> argparse.ArgumentParser:
    """The command line of ``sd-run``."""
    result = Parser(
        prog="sd-run",
        description="Draw pictures from a prompt.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = result.add_argument
    add("prompt", metavar="PROMPT", nargs="?", help="what to draw")
    add("--negative-prompt", metavar="TEXT", help="what to move away from")
    add("--bundle", metavar="DIR", help="a folder that sd-export made (default: the embedded emoji model)")
    add(
        "--steps",
        "--num-inference-steps",
        type=int,
        metavar="N",
        help="sampling steps (default: the bundle's)",
    )
    add(
        "--guidance-scale",
        type=float,
        metavar="W",
        help="how far to follow the prompt; 1 or less: no guidance (default: the bundle's)",
    )
    add("--seed", type=int, metavar="N", help="of the first picture; the others count up (default: random)")
    add(
        "--num-images",
        "--num-images-per-prompt",
        type=int,
        default=1,
        metavar="N",
        help="how many pictures (default: 1)",
    )
    add("--height", type=int, metavar="PIXELS", help="default: the bundle's")
    add("--width", type=int, metavar="PIXELS", help="default: the bundle's")
    add(
        "--sampler",
        metavar="NAME",
        help="such as ddim, dpmpp_2m or euler; an unknown name lists all (default: the bundle's)",
    )
    add("--karras", action="store_true", help="noise levels of Karras et al. 2022 (if the sampler has them)")
    add(
        "--eta",
        type=float,
        metavar="SHARE",
        help="fresh noise per step, 0 to 1 (if the sampler has it; default: the sampler's own)",
    )
    add(
        "--rng",
        default="philox",
        metavar="NAME",
        help="philox or cpu: the noise of PyTorch's CUDA or CPU generator (default: philox)",
    )
    add(
        "--output",
        "-o",
        type=Path,
        metavar="PATH",
        help="a .png, or a folder (default: ./PROMPT-SEED.png); "
        "with --interactive also base64: pictures come in the results",
    )
    add("--json", action="store_true", help="print one JSON object: paths, seeds, seconds per stage")
    add("--quiet", "-q", action="store_true", help="print errors only")
    add(
        "--backend",
        default="auto",
        metavar="NAME",
        help="tensorrt, tensorrt-rtx, onnxruntime-cuda or onnxruntime-cpu (default: auto, the first of these "
        "that can run the bundle here)",
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
    add("--no-verify", action="store_true", help="compare sizes but not hashes of the bundle's files")
    add("--version", action="version", version=f"sdrt {sdrt.__version__}")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    commands = parser()
    arguments = commands.parse_args(argv)
    if arguments.interactive and arguments.prompt is not None:
        commands.error("--interactive takes its prompts from standard input: leave PROMPT out")
    if not arguments.interactive and arguments.prompt is None:
        commands.error("the following arguments are required: PROMPT")
    if arguments.warm_up and not arguments.interactive:
        commands.error("--warm-up goes with --interactive")
    return run_command("sd-run", lambda: _run(arguments), quiet=arguments.quiet)


def _run(arguments: argparse.Namespace) -> None:
    started = time.perf_counter()
    if not (arguments.interactive and arguments.output == Path(BASE64)):
        check_output(arguments.output)
    # NumPy and the rest only now: what argparse refuses need not wait for them.
    from sdrt.runtime.bundle import Bundle
    from sdrt.runtime.request import build_request

    bundle = Bundle.open(arguments.bundle, verify=False)
    options = _options(arguments)
    request = build_request(bundle.manifest, arguments.prompt or "", **options)  # before anything is loaded
    if arguments.negative_prompt and not request.guided and not arguments.quiet:
        say("sd-run", "warning: at a guidance scale of 1 or less the negative prompt is not used")
    with _load(arguments, bundle, request) as pipeline:
        loaded = time.perf_counter() - started
        if arguments.interactive:
            from sdrt.runtime.interactive import serve

            serve(pipeline, options, arguments.output, load_seconds=loaded, warm_up=arguments.warm_up)
            return
        batches = -(-arguments.num_images // bundle.manifest.limits.max_batch)
        with _progress(arguments, len(request.table.timesteps) * batches) as on_step:
            output = pipeline(
                arguments.prompt,
                **options,
                callback_on_step_end=on_step,
                callback_on_step_end_tensor_inputs=(),
            )
        saving = time.perf_counter()
        paths = save(output, arguments.output)
        ended = time.perf_counter()
    seconds = {"load": loaded, **output.timings, "save": ended - saving, "command": ended - started}
    _report(arguments, paths, output, seconds)


def _load(arguments: argparse.Namespace, bundle: Bundle, request: Request) -> Pipeline:
    """The pipeline on a backend that admits the request; says which one, where that was left to us."""
    from sdrt.runtime.backends import AUTO, RequestShape
    from sdrt.runtime.pipeline import Pipeline

    limits = bundle.manifest.limits
    images = max(limits.min_batch, min(len(request.prompts), limits.max_batch))
    pipeline = Pipeline.load(
        bundle,
        backend=arguments.backend,
        device=arguments.device,
        threads=arguments.threads,
        verify=not arguments.no_verify,
        request_shape=RequestShape(images, request.height, request.width, request.guided),
    )
    if arguments.backend == AUTO and not arguments.quiet:
        # What is the matter, without what could be done about it: that is in the error of a named backend.
        reasons = [reason.partition("; ")[0] for reason in pipeline.backend_reasons]
        say("sd-run", f"backend {pipeline.backend} ({'; '.join(reasons)})")
    return pipeline


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments that the command shares with `Pipeline.__call__`, by its names."""
    return {
        "negative_prompt": arguments.negative_prompt,
        "height": arguments.height,
        "width": arguments.width,
        "num_inference_steps": arguments.steps,
        "guidance_scale": arguments.guidance_scale,
        "num_images_per_prompt": arguments.num_images,
        "seed": arguments.seed,
        "rng": arguments.rng,
        "sampler": arguments.sampler,
        "karras": arguments.karras,
        "eta": arguments.eta,
    }


@contextmanager
def _progress(
    arguments: argparse.Namespace, steps: int
) -> Iterator[Callable[[Pipeline, int, float, dict[str, Any]], None] | None]:
    """A bar that moves with each step, on a terminal; nothing elsewhere."""
    if arguments.quiet or sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("drawing", total=steps)

        def on_step(_pipeline: Pipeline, _step: int, _timestep: float, _state: dict[str, Any]) -> None:
            bar.advance(task)

        yield on_step


def _report(
    arguments: argparse.Namespace, paths: list[Path], output: PipelineOutput, seconds: dict[str, float]
) -> None:
    seeds = [recipe["seed"] for recipe in output.recipes]
    if arguments.json:
        document = {
            "images": [{"path": str(path), "seed": seed} for path, seed in zip(paths, seeds, strict=True)],
            "seed": seeds[0],
            "seconds": {stage: round(value, 4) for stage, value in seconds.items()},
        }
        put(json.dumps(document))
    elif not arguments.quiet:
        for path, seed in zip(paths, seeds, strict=True):
            put(f"{path}  seed {seed}")
        stages = ("load", "text_encoder", "denoise", "vae_decoder", "save")
        parts = ", ".join(f"{stage} {seconds[stage]:.2f}" for stage in stages)
        put(f"{seconds['command']:.2f} s ({parts})")


if __name__ == "__main__":
    sys.exit(main())
