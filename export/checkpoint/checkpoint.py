"""A checkpoint in the diffusers folder format, as `sdrt.export.checkpoint.reader` has read and checked it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdrt.export.checkpoint.families import CHECKPOINT_FAMILIES, CheckpointFamily
from sdrt.export.checkpoint.few_steps import FewSteps
from sdrt.export.checkpoint.fields import LatentScaling, latent_scaling
from sdrt.export.checkpoint.tokenizer_json import ClipTokenizer
from sdrt.runtime.bundle.families.components import DEPTH
from sdrt.runtime.bundle.families.record import Family
from sdrt.runtime.bundle.manifest import ImageProcessorFacts, NoisingFacts
from sdrt.runtime.samplers.schedule import NoiseSchedule
from sdrt.runtime.samplers.table import NO_OPTIONS, SamplerOptions


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checked diffusers folder, or the configurations of one and a seed in place of its weights.

    Attributes:
        path: The folder.
        source: What the user named: the folder, the hub id, or the architecture.
        family: A name in `sdrt.runtime.bundle.families.registry.FAMILIES`.
        pipeline: diffusers' class that the checkpoint names.
        configs: ``config.json`` of each network, in the order of its family.
        schedule: The scheduler's configuration as a noise schedule.
        sampler: Our sampler that is the scheduler's equal, or the nearest one.
        sampler_options: What the scheduler's configuration says for this sampler, or for others.
        tokenizers: One for each text encoder: vocabulary, length and special ids.
        image_processor: Of the image encoder; None where there is none.
        noising: How noise is laid over a given picture; None where it is not.
        force_zeros_for_empty_prompt: See `sdrt.runtime.bundle.manifest.Manifest`.
        random_seed: Of random weights; None where the folder holds weights.
        few_steps: How it is drawn by default, if it was distilled to a few steps.
        read_as: What a single file was taken for, in one line; empty where a folder says it all.
        loras: Name, weight and SHA-256 of each LoRA that was merged into its weights.
        remarks: What whoever exports must know, one line each: what is left out or drawn otherwise.
    """

    path: Path
    source: str
    family: str
    pipeline: str
    configs: dict[str, dict[str, Any]]
    schedule: NoiseSchedule
    sampler: str
    tokenizers: tuple[ClipTokenizer, ...]
    image_processor: ImageProcessorFacts | None = None
    noising: NoisingFacts | None = None
    force_zeros_for_empty_prompt: bool = False
    random_seed: int | None = None
    sampler_options: SamplerOptions = NO_OPTIONS
    remarks: tuple[str, ...] = ()
    read_as: str = ""
    loras: tuple[Mapping[str, Any], ...] = ()
    few_steps: FewSteps | None = None

    @property
    def record(self) -> Family:
        """What its family is."""
        return self.kind.record

    @property
    def kind(self) -> CheckpointFamily:
        """What checkpoints of its family are."""
        return CHECKPOINT_FAMILIES[self.family]

    @property
    def tokenizer(self) -> ClipTokenizer:
        """Of the (first) text encoder."""
        return self.tokenizers[0]

    @property
    def factor(self) -> int:
        """Image pixels per latent along one side."""
        return int(2 ** (len(self.configs["vae"]["block_out_channels"]) - 1))

    @property
    def native_size(self) -> int:
        """The side in pixels that the model was trained at."""
        return int(self.configs["unet"]["sample_size"]) * self.factor

    @property
    def size_multiple(self) -> int:
        """Sizes in pixels that every level of the U-Net halves without a remainder."""
        return int(self.factor * 2 ** (len(self.configs["unet"]["block_out_channels"]) - 1))

    def text_layers(self, name: str) -> int:
        """The layers of one text encoder."""
        return int(self.configs[name]["num_hidden_layers"])

    @property
    def max_clip_skip(self) -> int:
        """The layers that can be left out, so that each text encoder still has a penultimate state."""
        return min((self.text_layers(name) for name in self.kind.tokenizers), default=1) - 1

    @property
    def distilled_guidance(self) -> bool:
        """Whether the U-Net is told the guidance scale, as that of a latent consistency model is."""
        return self.configs["unet"].get("time_cond_proj_dim") is not None

    @property
    def decoded(self) -> LatentScaling:
        """What the VAE's decoder is given for a sampler's latents."""
        return latent_scaling(self.family, self.configs["vae"])

    @property
    def encoded(self) -> LatentScaling:
        """What a sampler is given for the latents of the VAE's encoder.

        StableDiffusionXLInpaintPipeline reads ``latents_mean`` and ``latents_std`` only to decode, and its
        U-Net has learned from that. One that edits pictures reads them as the VAE gives them.
        """
        if not self.kind.scales_picture:
            return LatentScaling(1.0)
        return LatentScaling(self.decoded.factor) if "inpainting_channels" in self.sizes() else self.decoded

    def sizes(self) -> dict[str, int]:
        """The checkpoint's entries for the axes that the family's record leaves open."""
        unet, vae = self.configs["unet"], self.configs["vae"]
        latent_channels, unet_channels = int(vae["latent_channels"]), int(unet["in_channels"])
        sizes = {
            axis: int(self.configs[network.folder][key])
            for network in self.kind.networks
            for axis, key in network.sizes.items()
        }
        # Beside the noisy latents an inpainting U-Net takes the mask and the masked picture's latents.
        if unet_channels == 2 * latent_channels + 1:
            sizes["inpainting_channels"] = unet_channels - latent_channels
        sizes["unet_channels"] = unet_channels - sizes.get("inpainting_channels", 0)
        for name in (self.record.picture_input, DEPTH):
            entry = self.record.components["unet"].input(name)
            if entry is not None and "latent_height" in entry.shape:  # it stands beside the latents
                channels = entry.shape[1]
                sizes["unet_channels"] -= channels if isinstance(channels, int) else sizes[channels]
        if self.distilled_guidance:
            sizes["guidance_width"] = int(unet["time_cond_proj_dim"])
        if self.tokenizers:
            sizes |= {"tokens": self.tokenizer.ids["max_length"], "skips": 1}
        return sizes
