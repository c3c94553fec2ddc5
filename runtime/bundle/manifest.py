"""The manifest: everything a program must know to draw from a bundle, as data.

``manifest.json`` is the only file that is found by name; every other file is named in it with its size
and SHA-256. `sdrt.runtime.bundle.manifest_json` reads and writes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from sdrt.runtime.bundle.families.components import DEPTH, INPAINTING
from sdrt.runtime.bundle.families.record import ComponentSpec, Family, Precision
from sdrt.runtime.bundle.families.registry import FAMILIES
from sdrt.runtime.bundle.json_records import OPTIONAL
from sdrt.runtime.samplers.schedule import NoiseSchedule
from sdrt.runtime.samplers.table import NO_OPTIONS, SamplerOptions

FORMAT: Final = "sdrt-bundle"
FORMAT_VERSION: Final = 4  # the only one that is read
MANIFEST_NAME: Final = "manifest.json"


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of the bundle: path relative to it with ``/``, size in bytes, SHA-256 in hex."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Component:
    """One exported component: its graph, all of its files, its precision, and what goes in and out."""

    model: str
    files: tuple[FileEntry, ...]
    precision: Precision
    spec: ComponentSpec

    @property
    def model_entry(self) -> FileEntry:
        """The graph among its files."""
        return next(entry for entry in self.files if entry.path == self.model)


@dataclass(frozen=True, slots=True)
class LatentGeometry:
    """Latents have ``channels`` channels and are ``factor`` times smaller than the image per side."""

    channels: int
    factor: int


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """The tokenizer's file and what the file does not say: length, and the three special ids."""

    file: FileEntry
    max_length: int
    bos: int
    eos: int
    pad: int


@dataclass(frozen=True, slots=True)
class ImageProcessorFacts:
    """How a CLIP image encoder wants its picture: ``size`` pixels a side, less ``mean``, over ``std``.

    The shorter side is brought to ``size`` with a bicubic filter, the middle is cut out, and mean and std are
    of RGB in [0, 1].
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class NoisingFacts:
    """How noise is laid over what the U-Net reads of a given picture: p becomes √ᾱ · p + √(1 − ᾱ) · noise.

    Attributes:
        schedule: Whose alphas_cumprod ᾱ are; its other fields mean nothing here.
        max_level: The highest noise level, an index of them, that a request may ask for.
    """

    schedule: NoiseSchedule
    max_level: int


@dataclass(frozen=True, slots=True)
class Preview:
    """The affine map from latents to RGB in [-1, 1] that is nearest to the VAE decoder at the latents' size.

    ``rgb = latents · weights + bias``; ``weights`` has a row of three for each latent channel.
    """

    weights: tuple[tuple[float, float, float], ...]
    bias: tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class SizeLimit:
    """Sizes of one side in pixels that the graphs admit: ``minimum … maximum`` in steps of ``multiple``."""

    minimum: int
    maximum: int
    multiple: int

    def admits(self, size: int) -> bool:
        """Whether ``size`` pixels may be asked for."""
        return self.minimum <= size <= self.maximum and size % self.multiple == 0

    def __str__(self) -> str:
        if self.minimum == self.maximum:
            return f"{self.minimum}"
        return f"multiples of {self.multiple} from {self.minimum} to {self.maximum}"


@dataclass(frozen=True, slots=True)
class Limits:
    """What one call may ask of the graphs; more images than ``max_batch`` are drawn in several batches.

    A prompt may have ``max_chunks`` times the tokens that the text encoder reads at once. ``max_clip_skip``
    layers of the text encoders may be left out.
    """

    min_batch: int
    max_batch: int
    height: SizeLimit
    width: SizeLimit
    max_chunks: int = 1
    max_clip_skip: int = 0


@dataclass(frozen=True, slots=True)
class Defaults:
    """What `sd-run` uses for an option that was not given.

    ``sampler_options`` are those of the checkpoint's scheduler; a sampler takes the ones that it has, see
    `sdrt.runtime.samplers.sampler.Sampler.inherited`.
    """

    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    sampler: str
    sampler_options: SamplerOptions = NO_OPTIONS


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a manifest says beside its components.

    Attributes:
        family: A name in `sdrt.runtime.bundle.families.registry.FAMILIES`.
        weights: The weight map's file (`sdrt.runtime.bundle.weight_map`).
        latents: Their geometry.
        schedule: The noise schedule the model was trained on.
        tokenizers: One for each text encoder; none in a family without text.
        text_output: The output of text encoders that the U-Net was trained on; empty where there is none.
        force_zeros_for_empty_prompt: Whether the embeddings of a negative prompt that was not given are
            zeros in place of the empty text's (SDXL base).
        image_processor: Of the image encoder; None in families without one.
        noising: Of the given picture; None in families that read it as it is.
        preview: From latents to a small picture without the decoder.
        defaults: Of a request.
        limits: Of a request.
        provenance: Where the bundle comes from.
        parity: What was compared with PyTorch, the figures, and what was left out.
        ranges: Component → its range audit: the largest magnitudes on a calibration run of an fp16 graph.
    """

    family: str
    weights: FileEntry
    latents: LatentGeometry
    schedule: NoiseSchedule
    tokenizers: tuple[TokenizerFacts, ...]
    text_output: str
    force_zeros_for_empty_prompt: bool = False
    image_processor: ImageProcessorFacts | None = None
    preview: Preview
    defaults: Defaults
    limits: Limits
    noising: NoisingFacts | None = field(default=None, metadata={OPTIONAL: True})
    provenance: Mapping[str, Any] = field(default_factory=dict)
    parity: Mapping[str, Any] = field(default_factory=dict)
    ranges: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest(Facts):
    """The parsed manifest: its facts, and the components by name."""

    components: Mapping[str, Component]

    @property
    def reads_mask(self) -> bool:
        """Whether the U-Net reads a mask and the masked picture (inpainting checkpoints)."""
        return self.components["unet"].spec.input(INPAINTING) is not None

    @property
    def reads_depth(self) -> bool:
        """Whether the U-Net reads a depth map."""
        return self.components["unet"].spec.input(DEPTH) is not None

    @property
    def needs_picture(self) -> bool:
        """Whether nothing is drawn without a given picture."""
        return self.reads_mask or bool(self.record.picture_input) or not self.record.reads_text

    @property
    def record(self) -> Family:
        """What its family is."""
        return FAMILIES[self.family]

    @property
    def tokens(self) -> int:
        """What the U-Net reads of one chunk of a prompt; 1, an embedding, in a family without text."""
        return self.tokenizers[0].max_length if self.tokenizers else 1

    def files(self) -> tuple[FileEntry, ...]:
        """Every file of the bundle except the manifest itself."""
        entries = [entry for part in self.components.values() for entry in part.files]
        return (*entries, *(facts.file for facts in self.tokenizers), self.weights)
