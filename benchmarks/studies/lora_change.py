"""What it costs to change to another LoRA, to the same at another weight, and back to none.

    python -m sdrt.benchmarks.studies.lora_change [--bundle DIR] [--backend NAME] [--feed-forward]

Two LoRAs of random numbers, rank 8, in all attentions of U-Net and text encoders (``--feed-forward``: in the
layers between them, too), change places in calls of one step; what is counted is all between two steps:
merging, and replacing the weights of each component. A LoRA's first use is told apart from later ones. And
the time of a step with a LoRA over one without, in two pipelines in turns.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from safetensors.numpy import save_file

from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.bundle.weight_map import read_weight_map
from sdrt.runtime.pipeline import Pipeline

RANK: Final = 8
_ATTENTION: Final = r"attn\d\.to_(q|k|v|out\.0)|self_attn\.(q|k|v|out)_proj"
_FEED_FORWARD: Final = r"ff\.net\.(0\.proj|2)|mlp\.fc\d"
_PREFIXES: Final = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
_STEP: Final[dict[str, Any]] = {"seed": 1, "num_inference_steps": 1, "output_type": "latent"}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print a table."""
    commands = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands.add_argument("--bundle", help="default: the embedded model")
    commands.add_argument("--backend", default="onnxruntime-cpu")
    commands.add_argument("--repeats", type=int, default=10, help="changes of each kind (default: 10)")
    commands.add_argument("--feed-forward", action="store_true", help="change these layers, too")
    arguments = commands.parse_args(argv)
    layers = f"{_ATTENTION}|{_FEED_FORWARD}" if arguments.feed_forward else _ATTENTION
    with (
        tempfile.TemporaryDirectory() as folder,
        Pipeline.load(arguments.bundle, backend=arguments.backend) as pipeline,
    ):
        files = [Path(folder) / f"{name}.safetensors" for name in "ab"]
        for seed, file in enumerate(files):
            write_lora(file, pipeline.bundle, layers, seed)
            pipeline.load_lora_weights(file)
        for kind, seconds in changes(pipeline, arguments.repeats).items():
            low, high = min(seconds), max(seconds)
            print(
                f"{kind:22} {statistics.median(seconds) * 1e3:8.0f} ms   {low * 1e3:.0f} … {high * 1e3:.0f}"
            )
        with Pipeline.load(arguments.bundle, backend=arguments.backend) as plain:
            pipeline.set_adapters("a", 0.8)
            ratios = step_ratios(pipeline, plain, arguments.repeats)
    low, median, high = statistics.quantiles(ratios, n=4)
    print(f"a step with / without  {median:8.3f}      {low:.3f} … {high:.3f}")
    return 0


def write_lora(file: Path, bundle: Bundle, layers: str, seed: int) -> None:
    """Write a LoRA of random numbers with kohya's names.

    Args:
        file: Where to.
        bundle: For which.
        layers: A regular expression; the weights of those whose names end so are changed.
        seed: Of the numbers.
    """
    random = np.random.default_rng(seed)
    arrays = {}
    for folder, tensors in read_weight_map(bundle).tensors.items():
        for name, tensor in tensors.items():
            if folder not in _PREFIXES or not re.fullmatch(rf"(.*\.)?({layers})\.weight", name):
                continue
            layer = f"{_PREFIXES[folder]}_{name.removesuffix('.weight').replace('.', '_')}"
            down, up = (RANK, tensor.shape[1]), (tensor.shape[0], RANK)
            arrays[f"{layer}.lora_down.weight"] = random.normal(0, 0.1, down).astype(np.float32)
            arrays[f"{layer}.lora_up.weight"] = random.normal(0, 0.02, up).astype(np.float32)
    save_file(arrays, file)


def changes(pipeline: Pipeline, repeats: int) -> dict[str, list[float]]:
    """Kind of change → its seconds, each time.

    Args:
        pipeline: With two LoRAs, ``a`` and ``b``, loaded, neither of them used yet.
        repeats: How often each is done; a LoRA's first use comes once.
    """
    seconds: dict[str, list[float]] = {}

    def change(kind: str, names: Sequence[str], weight: float = 1.0) -> None:
        pipeline.set_adapters(names, weight)
        seconds.setdefault(kind, []).append(pipeline("a cat", **_STEP).timings["lora"])

    pipeline.set_adapters(())
    pipeline("a cat", **_STEP)
    change("the first LoRA", ["a"])
    change("another's first use", ["b"])
    for number in range(repeats):
        change("from LoRA to LoRA", ["a"])
        change("another weight", ["a"], 0.5 + number / 100)
        change("two at once", ["a", "b"])
        change("to none", ())
        change("from none", ["b"])
    return seconds


def step_ratios(one: Pipeline, other: Pipeline, repeats: int) -> list[float]:
    """Seconds of a call in ``one`` over those in ``other``, in turns."""
    ratios = []
    for pair in range(repeats + 1):
        times = []
        for pipeline in (one, other):
            begun = time.perf_counter()
            pipeline("a cat", **_STEP | {"num_inference_steps": 4})
            times.append(time.perf_counter() - begun)
        if pair:
            ratios.append(times[0] / times[1])
    return ratios


if __name__ == "__main__":
    sys.exit(main())
