"""optimum.onnxruntime as far as its worker knows it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from support.fakes.fake_record import note, pictures


class ORTStableDiffusionPipeline:
    vae_scale_factor = 8

    def __init__(self) -> None:
        self.scheduler: Any = SimpleNamespace(config={"beta_start": 0.1})
        self.unet: Any = _Noted("unet", SimpleNamespace(in_channels=4, cross_attention_dim=6))
        self.tokenizer = SimpleNamespace(model_max_length=5)
        self.vae = SimpleNamespace(decode=_Noted("decode"), encode=_Noted("encode"))

    @classmethod
    def from_pretrained(cls, model: Path, session_options: Any, **options: Any) -> ORTStableDiffusionPipeline:
        note("from_pretrained", model=model, threads=session_options.intra_op_num_threads, **options)
        return cls()

    def set_progress_bar_config(self, **options: Any) -> None:
        note("set_progress_bar_config", **options)

    def encode_prompt(self, **arguments: Any) -> None:
        note("encode_prompt", **arguments)

    def __call__(self, prompt: str, callback_on_step_end: Any, latents: Any, **options: Any) -> Any:
        scheduler = type(self.scheduler).__name__
        note("draw", prompt=prompt, latents=latents, scheduler=scheduler, **options)
        for step in range(options["num_inference_steps"]):
            state = {"latents": type(latents)(latents.data + (step + 1))}
            callback_on_step_end(self, step, 0, state)
        found = pictures(options["num_images_per_prompt"], options["height"], options["width"])
        return SimpleNamespace(images=list(found))


class _Noted:
    """A network that notes the shapes it is given."""

    def __init__(self, name: str, config: Any = None) -> None:
        self._name, self.config = name, config

    def __call__(self, *arguments: Any, **named: Any) -> None:
        shapes = [list(getattr(entry.data, "shape", ())) for entry in arguments]
        context = named.pop("encoder_hidden_states", None)
        note(self._name, shapes=shapes, context=None if context is None else context.data.shape, **named)
