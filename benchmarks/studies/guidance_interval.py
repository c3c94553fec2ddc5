"""What a guidance interval saves: the time of a call against the share of its steps that are guided.

    python -m sdrt.benchmarks.studies.guidance_interval [--bundle DIR] [--repeats N]

Pairs of calls, with an interval in the middle of the run (of no steps: a guidance of 1 in all) and without,
one after the other in one process; ratios of CPU time pair by pair, since the machine may be noisy. The
pictures are not decoded. Expected is ``(1 + f) / 2`` for a share f of guided steps, if the U-Net takes twice
the time for two halves.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence

from sdrt.runtime.pipeline import Pipeline
from sdrt.runtime.request.options import DrawOptions

PROMPT, STEPS, GUIDANCE = "a red apple", 20, 7.5
SHARES = (0.0, 0.25, 0.5, 0.75)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print a table."""
    commands = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands.add_argument("--bundle", help="default: the embedded model")
    commands.add_argument("--repeats", type=int, default=30, help="pairs for each share (default: 30)")
    arguments = commands.parse_args(argv)
    print("guided share   expected   median ratio   quartiles")
    with Pipeline.load(arguments.bundle, threads=1) as pipeline:
        for share in SHARES:
            ratios = interval_ratios(pipeline, share, arguments.repeats)
            low, median, high = statistics.quantiles(ratios, n=4)
            print(f"{share:12.2f} {(1 + share) / 2:10.3f} {median:14.3f}   {low:.3f} … {high:.3f}")
    return 0


def interval_ratios(pipeline: Pipeline, share: float, repeats: int) -> list[float]:
    """A call with a share of its steps guided over one with all, CPU seconds, pair by pair.

    Args:
        pipeline: Loaded.
        share: 0 to 1; the interval is in the middle of the run.
        repeats: Pairs, after one that is not counted.
    """
    start = (1 - share) / 2
    some: DrawOptions = {"guidance_scale": GUIDANCE, "guidance_interval": (start, start + share)}
    none: DrawOptions = {"guidance_scale": 1.0}
    ratios = []
    for pair in range(repeats + 1):
        part = _call_seconds(pipeline, some if share else none)
        whole = _call_seconds(pipeline, {"guidance_scale": GUIDANCE})
        if pair:
            ratios.append(part / whole)
    return ratios


def _call_seconds(pipeline: Pipeline, options: DrawOptions) -> float:
    started = time.process_time()
    shared: DrawOptions = {"seed": 1, "num_inference_steps": STEPS, "output_type": "latents"}
    shared.update(options)
    pipeline(PROMPT, **shared)
    return time.process_time() - started


if __name__ == "__main__":
    sys.exit(main())
