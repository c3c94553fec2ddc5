"""What the machine can do at most, measured in the same run: fp16 arithmetic and memory bandwidth.

A speed is told beside its share of these, so that a figure says how much is left.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from sdrt.export.checkpoint.checkpoint import Checkpoint

SIDE: Final = 8192  # of the square matrices: large enough to fill every multiprocessor
COPY_BYTES: Final = 2**32
REPEATS: Final = 20


def measure_ceilings(device: torch.device) -> dict[str, float]:
    """fp16 matrix product in FLOP/s and a device-to-device copy in bytes/s (read and written).

    The operands are random: products of zeros run faster than any real work.
    """
    a = torch.randn(SIDE, SIDE, device=device, dtype=torch.float16)
    b = torch.randn(SIDE, SIDE, device=device, dtype=torch.float16)
    product = _median_seconds(lambda: torch.mm(a, b))
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = _median_seconds(lambda: target.copy_(source))
    return {"fp16_flop_per_s": 2 * SIDE**3 / product, "bytes_per_s": 2 * COPY_BYTES / copy}


def _median_seconds(work: Any) -> float:
    for _ in range(3):
        work()
    seconds = []
    for _ in range(REPEATS):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        first.record()
        work()
        last.record()
        last.synchronize()
        seconds.append(float(first.elapsed_time(last)) / 1000)
    return statistics.median(seconds)


def guided_step_flop(checkpoint: Checkpoint, size: int) -> int:
    """Operations (2 per multiply-add) of one guided step at ``size`` × ``size`` pixels: two U-Net rows.

    Counted by running the network on the meta device: shapes only, no arithmetic and no memory.
    """
    from sdrt.export.checkpoint.weights import meta_module
    from sdrt.export.graphs.networks import UNet, example_inputs

    side = size // checkpoint.factor
    context = checkpoint.sizes().get("tokens", 1)  # a picture's embedding is one
    axes = {"rows": 2, "latent_height": side, "latent_width": side, "context": context}
    inputs = example_inputs(checkpoint, "unet", axes, torch.Generator().manual_seed(0))
    module = UNet(meta_module(checkpoint, "unet")).to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*(tensor.to("meta") for tensor in inputs))
    return int(counter.get_total_flops())
