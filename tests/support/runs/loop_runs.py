"""The sampling loop by itself: a U-Net of NumPy, a device that counts, and whole runs in float64."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdrt.kernels.sampler_row import HISTORY, Column
from sdrt.runtime.backends.executor import FixedWeights, check_buffers
from sdrt.runtime.bundle.families.registry import FAMILIES
from sdrt.runtime.devices.device import Device
from sdrt.runtime.devices.host import HostDevice
from sdrt.runtime.drawing.loop import DenoiseLoop, StepKind
from sdrt.runtime.samplers.schedule import FloatArray
from sdrt.runtime.samplers.table import SamplerTable

TOKENS, WIDTH = 5, 6
SIZES = {
    "tokens": TOKENS,
    "text_width": WIDTH,
    "cross_width": WIDTH,
    "unet_channels": 4,
    "latent_channels": 4,
}
MORE_SIZES = {**SIZES, "projection_width": 3, "guidance_width": 7, "inpainting_channels": 5}
IMAGES, SIZE = 2, (3, 4)  # half the rows end off every alignment
EVEN_SIZE = (4, 8)  # half the rows of the latents are 1024 bytes
STATE = (IMAGES, 4, *SIZE)
SCALE = 3.0
Array = NDArray[Any]


class FakeUNet(FixedWeights):
    """Linear in its sample, so that errors stay small; the halves' texts change its mean and its spread."""

    capturable = False

    def __init__(self, family: str = "sd", sizes: Mapping[str, int] = SIZES) -> None:
        self.spec = FAMILIES[family].components["unet"].resolve(sizes, "fp32")
        self.timesteps: list[float] = []
        self.rows: list[int] = []  # of each evaluation
        self.bindings = 0

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Callable[[], None]:
        check_buffers(self.spec, inputs, outputs)
        self.bindings += 1

        def evaluate() -> None:
            (timestep,) = set(inputs["timestep"].tolist())  # the same in every row
            self.timesteps.append(timestep)
            self.rows.append(len(inputs["sample"]))
            outputs["noise_pred"][...] = predict(**inputs)

        return evaluate

    def close(self) -> None:
        """There is nothing to give back."""


def predict(sample: Array, timestep: Any, encoder_hidden_states: Array, **more: Array) -> Array:
    """A quarter of x, more or less by the text, and what every other input adds to it."""
    t = np.broadcast_to(np.asarray(timestep, np.float32), len(sample))[:, None, None, None]
    text = encoder_hidden_states.mean(axis=(1, 2))[:, None, None, None]
    result: Array = (0.25 + text) * sample + t / 4000 + text
    for value in more.values():
        axes = tuple(range(1, value.ndim)) if value.ndim == 2 else 1
        result = result + 0.1 * value.mean(axis=axes).reshape(len(sample), 1, *value.shape[2:] or (1, 1))
    return result


class CountingDevice(HostDevice):
    """Counts every method that is called."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def __getattribute__(self, name: str) -> Any:
        if name != "calls" and not name.startswith("__"):
            self.calls[name] += 1
        return super().__getattribute__(name)


def normal(*shape: int, seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def new_loop(
    unet: FakeUNet | None = None,
    *,
    guided: bool = True,
    device: Device | None = None,
    size: tuple[int, int] = SIZE,
) -> DenoiseLoop:
    """A loop on the host, its texts written."""
    loop = DenoiseLoop(
        device or HostDevice(), unet or FakeUNet(), IMAGES, size, guided=guided, context=TOKENS
    )
    for row, text in zip(loop.conditioning["encoder_hidden_states"], texts(guided=guided), strict=True):
        row[...] = text
    return loop


def texts(*, guided: bool) -> NDArray[np.float32]:
    return normal(2 * IMAGES if guided else IMAGES, TOKENS, WIDTH, seed=2)


def start(loop: DenoiseLoop, table: SamplerTable, kind: StepKind, *, seed: int = 1, **more: Any) -> None:
    """Begin a run of steps of one kind from the noise of ``seed``."""
    loop.prepare([kind])
    shape = tuple(loop.noise.shape)
    options: dict[str, Any] = {"latents": normal(*shape, seed=seed), "seeds": [0] * IMAGES, **more}
    loop.start(table, np.full(len(table), SCALE), **options)


def run(loop: DenoiseLoop, table: SamplerTable, *, guided: bool, seed: int = 1) -> NDArray[np.float32]:
    """A whole run of steps of one kind; row k adds the noise of seed 100 + k."""
    kind = StepKind(guided=guided)
    start(loop, table, kind, seed=seed)
    for step in range(len(table)):
        if table.uses_noise:
            loop.set_noise(normal(*loop.noise.shape, seed=100 + step))
        loop.step(kind)
    result = loop.result(pixels=False)
    result.faults.raise_if_any(table, [""] * (2 * IMAGES), ["text_encoder"])
    return result.latents


@dataclass(frozen=True)
class Blend:
    """Latents to keep."""

    mask: NDArray[np.float32]
    known: NDArray[np.float32]
    known_noise: NDArray[np.float32]


def new_blend(size: tuple[int, int] = SIZE) -> Blend:
    """A mask of 0, 1 and what lies between, and latents."""
    mask = np.random.default_rng(7).uniform(-0.5, 1.5, (IMAGES, 1, *size)).clip(0, 1).astype(np.float32)
    known, noise = (normal(IMAGES, 4, *size, seed=seed) for seed in (8, 9))
    return Blend(mask, known, noise)


@dataclass
class Exact:
    """A run in float64 by its definition: x, and the guess of the clean latents, after each row."""

    latents: list[FloatArray]
    denoised: list[FloatArray]


def exact_run(
    table: SamplerTable,
    evaluate: Callable[[FloatArray, float], FloatArray],
    kinds: Sequence[StepKind],
    guidance: FloatArray,
    x: FloatArray,
    *,
    phi: float = 0.0,
    blend: Blend | None = None,
    noise: FloatArray | None = None,
) -> Exact:
    """`sdrt.runtime.samplers.table.run_table` with guidance of each row, rescaling and blending.

    Args:
        table: The rows.
        evaluate: From the scaled x and the timestep the prediction of both halves, [2·N, C, h, w].
        kinds: Of each row.
        guidance: w of each row.
        x: At the first row.
        phi: Of rescaling.
        blend: For rows that blend.
        noise: [n, N, C, h, w].
    """
    history, saved, result = [np.zeros_like(x)] * HISTORY, np.zeros_like(x), Exact([], [])
    for i, (row, kind) in enumerate(zip(table.rows, kinds, strict=True)):
        unconditional, m = np.split(evaluate(row[Column.INPUT_SCALE] * x, float(table.timesteps[i])), 2)
        if kind.guided:
            conditional, m = m, unconditional + guidance[i] * (m - unconditional)
            if kind.rescales:
                ratio = np.std(conditional, (1, 2, 3)) / np.std(m, (1, 2, 3))
                m = (phi * ratio + 1 - phi)[:, None, None, None] * m
        result.denoised.append(row[Column.X0_X] * x + row[Column.X0_M] * m)
        history = [row[Column.P] * x + row[Column.Q] * m, *history[:-1]]
        new_x = row[Column.A] * x + row[Column.E] * saved
        new_x += sum(row[Column.B0 + k] * d for k, d in enumerate(history))
        if noise is not None:
            new_x += row[Column.C] * noise[i]
        saved = x if row[Column.SAVE] else saved
        x = new_x
        if kind.blends and blend is not None:
            after = table.rows[i + 1] if i + 1 < len(table) else None
            signal, sigma = (1.0, 0.0) if after is None else (after[Column.SIGNAL], after[Column.NOISE])
            mask = blend.mask.astype(np.float64)
            x = mask * x + (1 - mask) * (signal * blend.known + sigma * blend.known_noise.astype(np.float64))
        result.latents.append(x)
    return result
