"""openvino_genai as far as its worker knows it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from openvino import Tensor
from support.fakes.fake_record import note, pictures


class Generator:
    def randn_tensor(self, shape: Any) -> Tensor:
        raise AssertionError("random numbers, in place of the given latents")


class Scheduler:
    Type = SimpleNamespace(DDIM="DDIM", EULER_DISCRETE="EULER_DISCRETE")

    @staticmethod
    def from_config(config: Path, kind: str) -> str:
        return f"{config.name} {kind}"


class Text2ImagePipeline:
    def __init__(self, model: Path) -> None:
        note("Text2ImagePipeline", model=model)

    def set_scheduler(self, scheduler: str) -> None:
        note("set_scheduler", scheduler=scheduler)

    def reshape(self, *shape: float) -> None:
        note("reshape", shape=shape)

    def compile(self, device: str, **properties: Any) -> None:
        note("compile", device=device, properties=properties)

    def generate(
        self, prompt: str, generator: Generator, callback: Callable[[int, int, Tensor], bool], **options: Any
    ) -> Tensor:
        images, height, width = (options[name] for name in ("num_images_per_prompt", "height", "width"))
        latents = generator.randn_tensor([images, 4, height // 8, width // 8])
        note("generate", prompt=prompt, latents=latents, **options)
        steps = options["num_inference_steps"]
        for step in range(steps):
            assert callback(step, steps, Tensor(latents.data + (step + 1))) is False
        return Tensor(pictures(images, height, width))


class _Network:
    """One network alone; its calls are noted under its class's name."""

    def __init__(self, *folders: Path) -> None:
        self._note("open", folders=[folder.name for folder in folders])

    def _note(self, call: str, **arguments: Any) -> None:
        note(f"{type(self).__name__}.{call}", **arguments)

    def reshape(self, *shape: int) -> None:
        self._note("reshape", shape=shape)

    def compile(self, device: str, **properties: Any) -> None:
        self._note("compile", device=device, properties=properties)


class CLIPTextModel(_Network):
    def infer(self, positive: str, negative: str, guided: bool) -> None:
        self._note("infer", texts=[positive, negative], guided=guided)


class UNet2DConditionModel(_Network):
    def set_hidden_states(self, name: str, states: Tensor) -> None:
        self._note("set_hidden_states", name=name, shape=states.data.shape)

    def infer(self, sample: Tensor, timestep: Tensor) -> None:
        self._note("infer", shape=sample.data.shape, timestep=int(timestep.data))


class AutoencoderKL(_Network):
    def get_vae_scale_factor(self) -> int:
        return 8

    def get_config(self) -> Any:
        return SimpleNamespace(latent_channels=4)

    def decode(self, latents: Tensor) -> None:
        self._note("decode", shape=latents.data.shape)

    def encode(self, picture: Tensor, generator: Generator) -> None:
        noise = generator.randn_tensor([len(picture.data), 4, 8, 8])
        self._note("encode", shape=picture.data.shape, noise=float(np.abs(noise.data).max()))
