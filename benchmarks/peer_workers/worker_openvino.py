"""OpenVINO GenAI on the CPU as a worker of ``sd-bench``; its model is a folder of IR files.

python worker_openvino.py [--no-cache]
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from sdrt.benchmarks.peer_workers.worker import (
        STAGE_PROMPT,
        STAGES,
        Drawing,
        Drawn,
        random_array,
        serve,
    )
else:
    from worker import STAGE_PROMPT, STAGES, Drawing, Drawn, random_array, serve

GUIDED: Final = 7.5  # any guidance scale above 1 reshapes the U-Net to two rows a picture


class Shape(NamedTuple):
    """What a pipeline is compiled for."""

    images: int
    height: int
    width: int
    guided: bool


class OpenVino:
    """``Text2ImagePipeline``, reshaped to what it draws: with dynamic shapes it takes twice as long."""

    packages: Sequence[str] = ("openvino-genai", "openvino", "openvino-tokenizers", "numpy")
    stages: Sequence[str] = STAGES

    def __init__(self, *, cache: bool) -> None:
        """``cache`` keeps compiled models on the disk, as users who want a fast start would."""
        self._cache = cache
        self._shape: Shape | None = None
        self._pipe: Any = None
        self.notes: Sequence[str] = (
            "is compiled for each size and batch in the first drawing, since static shapes are twice as fast",
        )
        if cache:
            self.notes = (
                *self.notes,
                "takes compiled models from its cache on the disk (CACHE_DIR), which the first drawing of a "
                "size and batch fills",
            )

    def import_packages(self) -> None:
        """See `Subject.import_packages`."""
        self._ov: Any = import_module("openvino")
        self._genai: Any = import_module("openvino_genai")

    def load(self, model: Path, threads: int) -> None:
        """See `Subject.load`; the size is not known yet, so compiling is left to the first drawing."""
        self._model = model
        # Without the hint a CPU that has AMX or AVX-512 BF16 computes in bfloat16.
        self._properties: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": threads,
        }
        if self._cache:
            self._properties["CACHE_DIR"] = str(model / "compiled")
        self._pipe = self._opened()

    def _opened(self) -> Any:
        genai = self._genai
        pipe = genai.Text2ImagePipeline(self._model)
        config = self._model / "scheduler" / "scheduler_config.json"
        pipe.set_scheduler(genai.Scheduler.from_config(config, genai.Scheduler.Type.DDIM))
        return pipe

    def _compiled(self, shape: Shape) -> Any:
        if shape != self._shape:
            if self._shape is not None:
                self._pipe = None  # its memory is free for the next
                self._pipe = self._opened()
            self._pipe.reshape(shape.images, shape.height, shape.width, GUIDED if shape.guided else 1.0)
            self._pipe.compile("CPU", **self._properties)
            self._shape = shape
        return self._pipe

    def draw(self, drawing: Drawing) -> Drawn:
        """See `Subject.draw`."""
        import numpy as np

        guided = drawing.guidance_scale > 1
        pipe = self._compiled(Shape(drawing.images, drawing.height, drawing.width, guided))
        ends: list[float] = []
        last: list[Any] = []

        def step_ended(step: int, steps: int, latents: Any) -> bool:
            ends.append(time.perf_counter())
            if step == steps - 1:
                last.append(np.array(latents.data))
            return False  # go on

        image = pipe.generate(
            drawing.prompt,
            **({"negative_prompt": drawing.negative_prompt} if guided else {}),
            generator=self._given(iter(drawing.latents)),
            num_images_per_prompt=drawing.images,
            num_inference_steps=drawing.steps,
            guidance_scale=drawing.guidance_scale,
            height=drawing.height,
            width=drawing.width,
            callback=step_ended,
        )
        return Drawn(lambda: np.array(image.data), ends, last[0])

    def _given(self, rows: Iterator[Any]) -> Any:
        """A random generator whose normal numbers are given, float32 [C, h, w] a picture."""
        import numpy as np

        tensor = self._ov.Tensor

        class Given(self._genai.Generator):  # type: ignore[misc,name-defined]
            def randn_tensor(self, shape: Any) -> Any:
                images, *_ = shape
                return tensor(np.stack([next(rows) for _ in range(images)]))

            def next(self) -> float:
                raise RuntimeError("the pipeline asked for a single random number")

        return Given()

    def stage(self, name: str, height: int, width: int, images: int) -> Callable[[], object]:
        """See `Subject.stage`; the networks are loaded a second time for it."""
        import numpy as np

        genai, tensor = self._genai, self._ov.Tensor
        if name == "text_encoder":
            text = genai.CLIPTextModel(self._model / "text_encoder")
            text.reshape(2)
            text.compile("CPU", **self._properties)
            return lambda: text.infer(STAGE_PROMPT, "", True)
        vae = genai.AutoencoderKL(self._model / "vae_encoder", self._model / "vae_decoder")
        factor, channels = vae.get_vae_scale_factor(), vae.get_config().latent_channels
        latents = (channels, height // factor, width // factor)
        if name == "unet":
            return self._unet(2 * images, height, width, latents)
        vae.reshape(images, height, width)
        vae.compile("CPU", **self._properties)
        if name == "vae_decoder":
            decoded = tensor(random_array(images, *latents))
            return lambda: vae.decode(decoded)
        picture = tensor(random_array(images, 3, height, width))
        mean = self._given(itertools.repeat(np.zeros(latents, np.float32)))
        return lambda: vae.encode(picture, mean)

    def _unet(self, rows: int, height: int, width: int, latents: tuple[int, ...]) -> Callable[[], object]:
        import json

        import numpy as np

        genai, tensor = self._genai, self._ov.Tensor
        text, unet = (
            json.loads((self._model / name / "config.json").read_text(encoding="utf-8"))
            for name in ("text_encoder", "unet")
        )
        tokens, width_of_text = text["max_position_embeddings"], unet["cross_attention_dim"]
        network = genai.UNet2DConditionModel(self._model / "unet")
        network.reshape(rows, height, width, tokens)
        network.compile("CPU", **self._properties)
        network.set_hidden_states("encoder_hidden_states", tensor(random_array(rows, tokens, width_of_text)))
        sample, timestep = tensor(random_array(rows, *latents)), tensor(np.array(500, np.int64))
        return lambda: network.infer(sample, timestep)


def main() -> int:
    """Serve until the parent closes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-cache", action="store_true", help="compile anew in every process")
    return serve(OpenVino(cache=not parser.parse_args().no_cache))


if __name__ == "__main__":
    sys.exit(main())
