"""A report as a run makes it, from seeded random numbers: 2 models, 5 subjects, a failure, all quantities."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from sdrt.benchmarks.document.document import (
    Ceilings,
    Document,
    Failure,
    Machine,
    Measurement,
    Model,
    Noise,
    Subject,
    Work,
)

SUBJECTS: Final = (
    Subject("onnxruntime-cpu", "sdrt, ONNX Runtime", "backend", {"sdrt": "0.1.0", "onnxruntime": "1.32.0"}),
    Subject(
        "diffusers",
        "diffusers, eager",
        "peer",
        {"diffusers": "0.42.1", "torch": "2.13.0"},
        ("Reads the checkpoint itself, nothing exported.",),
    ),
    Subject(
        "diffusers-compile", "diffusers, torch.compile", "peer", {"diffusers": "0.42.1", "torch": "2.13.0"}
    ),
    Subject("optimum-onnx", "optimum-onnx", "peer", {"optimum-onnx": "0.2.0", "onnxruntime": "1.32.0"}),
    Subject(
        "openvino-genai", "OpenVINO GenAI", "peer", {"openvino-genai": "2026.3"}, ("Draws with DDIM alone.",)
    ),
)
# What of our times each takes, for cold parts and for networks.
COLD: Final = {
    "onnxruntime-cpu": 1,
    "diffusers": 6.4,
    "diffusers-compile": 19,
    "optimum-onnx": 5.1,
    "openvino-genai": 2.3,
}
WARM: Final = {
    "onnxruntime-cpu": 1,
    "diffusers": 2.2,
    "diffusers-compile": 1.35,
    "optimum-onnx": 1.3,
    "openvino-genai": 1.1,
}
ERROR: Final = 'RuntimeError: expected <Float> & got "Half": see <script>alert(1)</script>'


@dataclass(frozen=True)
class Times:
    """Seconds of sdrt at one picture of the main size."""

    parts: tuple[float, float, float, float, float]  # of a cold start
    text: float
    unet: float
    decoder: float
    host: float


TIMES: Final = {
    "emoji": Times((0.05, 0.21, 0.2, 0.36, 0.02), 0.004, 0.0061, 0.021, 0.0003),
    "sd15": Times((0.05, 0.22, 3.9, 34.0, 0.03), 0.31, 6.4, 5.9, 0.02),
}
MODELS: Final = (
    Model(
        "emoji",
        "models/emoji",
        11_400_000,
        "ddim",
        20,
        7.5,
        "a red apple",
        2,
        ((64, 64), (96, 96), (128, 128)),
    ),
    Model("sd15", "sd15-random", 4_270_000_000, "ddim", 4, 7.5, "a red apple", 2, ((256, 256), (512, 512))),
)
FLOP: Final = {"text_encoder": 0.4e11, "unet": 7.1e11, "vae_decoder": 6.2e11, "vae_encoder": 2.7e11}
BYTES: Final = {"text_encoder": 6e8, "unet": 6.1e9, "vae_decoder": 3.1e9, "vae_encoder": 1.4e9}
ROUNDS: Final = 7


class Maker:
    """Makes measurements from typical values."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.found: list[Measurement] = []

    def around(self, value: float) -> float:
        """A time near ``value``, seldom much above it."""
        slow = 1.25 if self.random.random() < 0.04 else 1.0
        return value * slow * (1 + abs(self.random.gauss(0, 0.025)))

    def add(
        self, where: Sequence[object], quantity: str, value: float, each: int = 1, exact: bool = False
    ) -> None:
        """``where`` is model, subject, height, width, batch, steps; ``each`` values in each round."""
        model, subject, height, width, batch, steps = where
        rounds = tuple(number for number in range(ROUNDS) for _ in range(each))
        values = tuple(value if exact else self.around(value) for _ in rounds)
        entry = Measurement(str(model), str(subject), quantity, 1, 1, 1, 1, values, rounds)
        sizes = {"height": height, "width": width, "batch": batch, "steps": steps}
        self.found.append(replace(entry, **sizes))  # type: ignore[arg-type]


def document() -> Document:
    """The whole run."""
    maker = Maker(0)
    for model in MODELS:
        for subject in SUBJECTS:
            if (model.name, subject.name) != ("sd15", "diffusers-compile"):
                _cold(maker, model, subject.name)
                _warm(maker, model, subject.name)
                _fidelity(maker, model, subject.name)
    probe = tuple(maker.around(0.05) * (1.2 if index % 6 == 5 else 1) for index in range(40))
    return Document(
        "2026-11-26T14:00:00Z",
        ("sd-bench", "models/emoji", "sd15-random", "--report", "out/report & more"),
        True,
        "0.1.0 (1a14baf)",
        Machine("Intel(R) Xeon(R) Processor", 2, 16_700_000_000, "Linux 6.1, Debian 12", "3.11.7"),
        Noise(probe, tuple(1.2 + index % 5 / 4 for index in range(40))),
        (Ceilings(1.9e11, 2.2e10, "product of 2048² fp32 matrices, copy of 256 MB, both on 2 threads"),),
        SUBJECTS,
        tuple(replace(model, work=_work(model)) for model in MODELS),
        tuple(maker.found),
        failures=(Failure("sd15", "diffusers-compile", "cold start", ERROR),),
    )


def _cold(maker: Maker, model: Model, name: str) -> None:
    where = (model.name, name, *model.sizes[0], 1, model.steps)
    parts = TIMES[model.name].parts
    spent = [part * COLD[name] ** (1 if model.name == "emoji" else 0.3) for part in parts]
    keys = ("cold_start", "cold_import", "cold_load", "cold_image", "cold_save")
    for key, seconds in zip(keys, spent, strict=True):
        maker.add(where, key, seconds)
    maker.add(where, "cold_total", sum(spent) * 1.06)
    base = 60e6 + 40e6 * COLD[name]
    maker.add(
        where,
        "cold_peak_memory",
        base + 1.2 * model.weights_bytes * (1 if name == "onnxruntime-cpu" else 1.7),
    )
    maker.add(where, "cold_peak_anonymous", base + 0.3 * model.weights_bytes)
    maker.add(where, "memory", base + 1.1 * model.weights_bytes)
    maker.add(where, "peak_memory", base + 1.3 * model.weights_bytes)
    maker.add(where, "installed_size", 120e6 * COLD[name] ** 0.9, exact=True)


def _warm(maker: Maker, model: Model, name: str) -> None:
    times, slower, main = TIMES[model.name], WARM[name], model.sizes[0]
    settings = [(*size, 1, model.steps) for size in model.sizes]
    settings += [(*main, batch, model.steps) for batch in (2, 4, 8)]
    settings += [(*main, 1, steps) for steps in (model.steps // 2, model.steps * 2)]
    for height, width, batch, steps in settings:
        where = (model.name, name, height, width, batch, steps)
        more = (height * width / main[0] / main[1]) ** 1.12 * batch**0.93 * slower
        image = times.text * slower * batch + steps * (times.unet * more + times.host) + times.decoder * more
        maker.add(where, "image", image * 1.02)
        if steps != model.steps:
            continue
        maker.add(where, "step", times.unet * more + times.host, each=min(steps, 20))
        maker.add(where, "unet", times.unet * more)
        maker.add(where, "vae_decoder", times.decoder * more)
        maker.add(where, "vae_encoder", times.decoder * more * 0.6)
        if (height, width) == main:
            maker.add(where, "text_encoder", times.text * slower * batch)


def _fidelity(maker: Maker, model: Model, name: str) -> None:
    where = (model.name, name, *model.sizes[0], 1, model.steps)
    value = {"diffusers": None, "openvino-genai": 44.5}.get(name, 71.2 + WARM[name])
    entry = Measurement(model.name, name, "psnr", *model.sizes[0], 1, model.steps, (value,), (0,))
    maker.found.append(entry)
    maker.add(where, "latent_error", {"diffusers": 0.0, "openvino-genai": 4e-3}.get(name, 3e-6), exact=True)


def _work(model: Model) -> tuple[Work, ...]:
    """Counted so that sdrt reaches a little more than half of what the machine can do."""
    share = model.weights_bytes / MODELS[1].weights_bytes / (1 if model.name == "sd15" else 2.3)
    found = []
    for height, width in model.sizes:
        grown = height * width / model.sizes[0][0] / model.sizes[0][1]
        for name in FLOP:
            size = 1.0 if name == "text_encoder" else grown
            flop, moved = int(FLOP[name] * share * size), int(BYTES[name] * share * size)
            found.append(Work(name, height, width, 1, flop, moved))
    return tuple(found)


def small_document() -> Document:
    """Two subjects, ``a`` and ``b``, one model ``m``, nothing measured."""
    return replace(
        document_without_measurements(),
        subjects=(Subject("a", "A", "backend"), Subject("b", "B", "peer")),
        models=(Model("m", "models/m", 1000, "ddim", 10, 7.5, "a prompt", 2, ((64, 64),)),),
    )


def document_without_measurements() -> Document:
    """What a run that was interrupted at once leaves."""
    return Document(
        "2026-11-26T14:00:00Z",
        ("sd-bench", "models/m"),
        True,
        "0.1.0",
        Machine("a processor", 2, 16_000_000_000, "Linux", "3.11.7"),
        subjects=SUBJECTS[:1],
    )
