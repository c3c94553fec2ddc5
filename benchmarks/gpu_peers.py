"""PyTorch peers of the GPU benchmark: diffusers' own pipeline, eager and compiled.

Both get the networks of the checkpoint in fp16 with channels-last convolutions, DDIM and the same latents,
and draw as their users would: text encoder, ``pipe(...)``, VAE decoder, bytes on the host.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from sdrt.export.checkpoint.weights import load_module
from sdrt.runtime.samplers.registry import SAMPLERS

if TYPE_CHECKING:
    from sdrt.export.checkpoint.checkpoint import Checkpoint
    from sdrt.runtime.text.tokenizer import Tokenizer

GUIDANCE: Final = 7.5
COMPILE_MODE: Final = "reduce-overhead"


class Texts(NamedTuple):
    """What a drawing is asked for."""

    prompt: str
    negative: str


@dataclass(frozen=True, slots=True)
class Drawing:
    """One call: seconds per stage, and what was drawn.

    Attributes:
        seconds: ``text_encoder``, ``denoise``, ``step``, ``vae_decoder`` and ``total``.
        latents: float32 [N, C, h, w].
        pixels: uint8 [N, H, W, 3].
    """

    seconds: dict[str, float]
    latents: NDArray[np.float32]
    pixels: NDArray[np.uint8]


@dataclass(slots=True)
class Stopwatch:
    """Times of marks: events in the GPU's stream, or the wall clock where there is no GPU."""

    device: torch.device
    marks: list[tuple[str, Any]] = field(default_factory=list)

    def mark(self, name: str) -> None:
        """The stage ``name`` ends here."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self.marks.append((name, event))
        else:
            self.marks.append((name, time.perf_counter()))

    def seconds(self) -> dict[str, float]:
        """Seconds of each stage; waits for the GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        pairs = zip(self.marks, self.marks[1:], strict=False)
        return {name: _between(first, last) for (_, first), (name, last) in pairs}


def _between(first: Any, last: Any) -> float:
    if isinstance(first, float):
        return float(last - first)
    return float(first.elapsed_time(last)) / 1000


class DiffusersPeer:
    """diffusers on one device; ``compiled`` puts the U-Net and the VAE decoder through torch.compile.

    With ``mode="reduce-overhead"``: default kernels, in CUDA graphs. ``max-autotune``, which also tries out
    kernels, had not compiled SD 1.5 after 330 s on an H100.
    """

    def __init__(
        self, checkpoint: Checkpoint, tokenizer: Tokenizer, device: torch.device, *, compiled: bool
    ) -> None:
        self.name = "torch.compile" if compiled else "diffusers"
        self.device = device
        self.dtype = torch.float16 if device.type == "cuda" else torch.float32
        self.xl = checkpoint.family == "sdxl"
        names = ("text_encoder", "text_encoder_2") if self.xl else ("text_encoder",)
        self.text_encoders = [self._load(checkpoint, name) for name in names]
        self.unet = self._load(checkpoint, "unet")
        self.vae = self._load(checkpoint, "vae")
        self._tokenizer = tokenizer
        self.scaling = float(self.vae.config.scaling_factor)
        self._pipe = self._pipeline(checkpoint)
        if compiled:
            self._compile()

    def _load(self, checkpoint: Checkpoint, name: str) -> Any:
        module: Any = load_module(checkpoint, name).to(self.dtype).to(self.device)
        # What tensor cores want; on a CPU it only costs.
        return module.to(memory_format=torch.channels_last) if self.device.type == "cuda" else module

    def _compile(self) -> None:
        # The pipeline's attribute is replaced too: its loop must call the compiled network.
        self._pipe.unet = torch.compile(self.unet, mode=COMPILE_MODE, fullgraph=True)
        self.decode = torch.compile(self.decode, mode=COMPILE_MODE, fullgraph=True)  # type: ignore[method-assign]

    def _pipeline(self, checkpoint: Checkpoint) -> Any:
        from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

        schedule = SAMPLERS["ddim"].reads(checkpoint.schedule)
        scheduler = DDIMScheduler(
            num_train_timesteps=schedule.num_train_timesteps,
            beta_start=schedule.beta_start,
            beta_end=schedule.beta_end,
            beta_schedule=schedule.beta_schedule,
            prediction_type=schedule.prediction_type,
            timestep_spacing=schedule.timestep_spacing,
            set_alpha_to_one=schedule.set_alpha_to_one,
            clip_sample=False,
            steps_offset=1,
        )
        # The prompts come as embeddings, so no tokenizer and no text encoder are needed inside.
        parts: dict[str, Any] = {"vae": self.vae, "unet": self.unet, "scheduler": scheduler}
        if self.xl:
            pipe = StableDiffusionXLPipeline(
                **parts,
                text_encoder=None,
                text_encoder_2=None,
                tokenizer=None,
                tokenizer_2=None,
                add_watermarker=False,
            )
        else:
            pipe = StableDiffusionPipeline(
                **parts,
                text_encoder=None,
                tokenizer=None,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def draw(self, texts: Texts, latents: NDArray[np.float32], steps: int) -> Drawing:
        """Draw one picture per row of the latents, each from the same texts.

        Args:
            texts: Prompt and negative prompt.
            latents: float32 [N, C, h, w], unit variance.
            steps: DDIM steps.
        """
        started = time.perf_counter()
        clock = Stopwatch(self.device)
        with torch.inference_mode():
            clock.mark("")
            arguments = self._encode(texts, len(latents))
            clock.mark("text_encoder")
            size = {
                "height": latents.shape[2] * self._factor,
                "width": latents.shape[3] * self._factor,
            }
            denoised = self._pipe(
                **arguments,
                **size,
                latents=torch.from_numpy(latents).to(self.device, self.dtype),
                num_inference_steps=steps,
                guidance_scale=GUIDANCE,
                output_type="latent",
            ).images
            clock.mark("denoise")
            pixels = self.decode(denoised)
            clock.mark("vae_decoder")
            host = pixels.cpu().numpy()
        ended = time.perf_counter()
        seconds = clock.seconds()
        seconds["step"] = seconds["denoise"] / steps
        seconds["total"] = ended - started
        return Drawing(seconds, denoised.float().cpu().numpy(), host)

    @property
    def _factor(self) -> int:
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents → uint8 [N, H, W, 3] on the device."""
        image = self.vae.decode(latents / self.scaling, return_dict=False)[0]
        scaled = ((image / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        pixels: torch.Tensor = scaled.permute(0, 2, 3, 1).contiguous()
        return pixels

    def _encode(self, texts: Texts, images: int) -> dict[str, torch.Tensor]:
        """The pipeline's arguments for the two texts, repeated for every image."""
        rows = [self._tokenizer.encode(text).ids for text in (texts.negative, texts.prompt)]
        ids = torch.tensor(np.stack(rows), dtype=torch.int64, device=self.device)
        outputs = [encoder(ids, output_hidden_states=True) for encoder in self.text_encoders]
        if self.xl:
            states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
            pooled = outputs[-1].text_embeds
        else:
            states, pooled = outputs[0].last_hidden_state, None
        named = {
            "negative_prompt_embeds": states[:1].repeat(images, 1, 1),
            "prompt_embeds": states[1:].repeat(images, 1, 1),
        }
        if pooled is not None:
            named["negative_pooled_prompt_embeds"] = pooled[:1].repeat(images, 1)
            named["pooled_prompt_embeds"] = pooled[1:].repeat(images, 1)
        return named
