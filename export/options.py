"""What is asked of the export of a bundle."""

from __future__ import annotations

from dataclasses import dataclass

from sdrt.runtime.bundle.families.record import Precision


@dataclass(frozen=True, slots=True)
class AxisRange:
    """Sizes that one dynamic axis may take: ``multiple · k``, from ``minimum`` to ``maximum``."""

    minimum: int
    maximum: int
    multiple: int = 1

    @property
    def fixed(self) -> bool:
        """Whether there is only one size, so that the graph can have it as a constant."""
        return self.minimum == self.maximum

    def nearest(self, size: int) -> int:
        """The largest size of the range up to ``size``; the smallest of all if ``size`` is below it."""
        return max(self.minimum, min(size, self.maximum) // self.multiple * self.multiple)


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What the user asked of an export.

    Attributes:
        precision: Of weights and arithmetic in the graphs.
        fp16_weights: Store fp32 weights as fp16 where that loses nothing (precision fp32 only).
        batch: Images per call.
        height: Pixels.
        width: Pixels.
        chunks: The most chunks of a long prompt.
        opset: ONNX opset.
        full_parity: Compare a large model at its own size too: minutes longer.
        steps: Of a request that does not say it; None: what the checkpoint says.
        guidance: Likewise.
        vae_precision: Of the VAE in an fp16 bundle; None: fp16 where that holds it, else fp32.
    """

    precision: Precision
    fp16_weights: bool
    batch: AxisRange
    height: AxisRange
    width: AxisRange
    chunks: int
    opset: int
    full_parity: bool = False
    vae_precision: Precision | None = None
    steps: int | None = None
    guidance: float | None = None
