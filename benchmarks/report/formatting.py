"""How a report writes numbers: one unit and as many decimals for a whole column, so that its digits align."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from sdrt.benchmarks.document.document import QUANTITIES, Model, Setting
from sdrt.benchmarks.report.derive import Ratio

MISSING: Final = "–"
# What is reached by the largest value of a column is its unit.
UNITS: Final = {
    "s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")),
    "B": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")),
    "dB": ((1.0, "dB"),),
    "1": ((1.0, ""),),
    "flop/s": ((1e12, "Tflop/s"), (1e9, "Gflop/s"), (1e6, "Mflop/s")),
    "B/s": ((1e9, "GB/s"), (1e6, "MB/s")),
}
SHOWN_DIGITS: Final = 3
MOST_DECIMALS: Final = 4
# For people, where a quantity's key is too terse.
TITLES: Final = {
    "cold_total": "Cold start",
    "cold_start": "interpreter",
    "cold_import": "imports",
    "cold_load": "loading",
    "cold_image": "first drawing",
    "cold_save": "saving",
    "cold_peak_memory": "Peak memory, cold",
    "cold_peak_anonymous": "Its own of that, cold",
    "installed_size": "Installed size",
    "image": "Warm image",
    "step": "Guided step",
    "text_encoder": "Text encoder",
    "unet": "U-Net",
    "vae_decoder": "VAE decoder",
    "vae_encoder": "VAE encoder",
    "memory": "Memory, warm",
    "peak_memory": "Peak memory, warm",
    "gpu_memory": "GPU memory, warm",
    "psnr": "PSNR",
    "latent_error": "Latent error",
    "host": "host, between",
    "rest": "rest",
}


@dataclass(frozen=True, slots=True)
class Scale:
    """The unit and the decimals of a column."""

    factor: float
    unit: str
    decimals: int

    def show(self, value: float | None) -> str:
        """The value without its unit."""
        if value is None:
            return MISSING
        return f"{value / self.factor:.{self.decimals}f}" if math.isfinite(value) else "∞"

    def finer(self) -> Scale:
        """For parts of what this scale fits."""
        return replace(self, decimals=min(self.decimals + 1, SHOWN_DIGITS))

    def full(self, value: float | None) -> str:
        """The value and its unit."""
        return f"{self.show(value)} {self.unit}".rstrip() if value is not None else MISSING


def scale(values: Iterable[float | None], unit: str) -> Scale:
    """The one for values in ``unit`` (a key of `UNITS`): `SHOWN_DIGITS` digits of the smallest."""
    finite = [abs(value) for value in values if value is not None and math.isfinite(value) and value != 0]
    units = UNITS[unit]
    largest = max(finite, default=units[0][0])
    factor, name = next((entry for entry in units if largest >= entry[0]), units[-1])
    smallest = min(finite, default=factor) / factor
    decimals = SHOWN_DIGITS - 1 - math.floor(math.log10(smallest))
    return Scale(factor, name, min(max(decimals, 0), 1 if unit == "dB" else MOST_DECIMALS))


def one(value: float | None, unit: str) -> str:
    """A single value with its unit."""
    return scale([value], unit).full(value)


def title(quantity: str) -> str:
    """A quantity's or a part's name for people."""
    return TITLES.get(quantity, quantity)


def quantity_scale(quantity: str, values: Iterable[float | None]) -> Scale:
    """`scale` for values of a quantity."""
    return scale(values, QUANTITIES[quantity][0])


def ratio_text(ratio: Ratio | None) -> str:
    """Median and quartiles: ``0.15 (0.14–0.16)``; of one pair the value alone."""
    if ratio is None:
        return MISSING
    spread = ratio.spread
    if ratio.pairs == 1:
        return factor_text(spread.p50)
    return f"{factor_text(spread.p50)} ({factor_text(spread.p25)}–{factor_text(spread.p75)})"


def factor_text(value: float) -> str:
    """A ratio in two decimals, or more or fewer where it is far from 1."""
    if not math.isfinite(value):
        return "∞"
    return (
        f"{value:.3f}"
        if 0 < value < 0.1
        else f"{value:.2f}"
        if value < 10
        else f"{value:.1f}"
        if value < 100
        else f"{value:.0f}"
    )


def latent_text(value: float | None) -> str:
    """A relative error: ``3e-06``."""
    if value is None:
        return MISSING
    return "0" if value == 0 else f"{value:.0e}"


def psnr_text(value: float | None) -> str:
    """dB, or that the pictures are equal."""
    if value is None:
        return MISSING
    return f"{value:.1f}" if math.isfinite(value) else "equal"


def time_text(moment: str) -> str:
    """``2026-11-26 17:37:55 UTC`` of a moment in UTC as ISO 8601 writes it."""
    return moment.replace("T", " ").replace("+00:00", " UTC").replace("Z", " UTC")


def held_words(model: Model) -> str:
    """A sentence where only one subject was held at a time, after a blank; the warnings have the reason."""
    short = model.memory_shortage
    return " Subjects were held one at a time, for want of memory." if short and short.held else ""


def setting_text(setting: Setting, others: Sequence[str] = ("batch", "steps")) -> str:
    """``512×512, batch 1, 20 steps``, width before height as of pictures."""
    words = [f"{setting.width}×{setting.height}"]
    if "batch" in others:
        words.append(f"batch {setting.batch}")
    if "steps" in others:
        words.append(f"{setting.steps} steps" if setting.steps != 1 else "1 step")
    return ", ".join(words)
