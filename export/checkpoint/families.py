"""The families as their checkpoints have them: diffusers' pipelines, folders, classes, and our networks.

What a family is once it is exported stands in `sdrt.runtime.bundle.families`; everything that only an export
has to know of it stands here. Classes are named and not imported: PyTorch takes seconds to load, and much is
said before.
"""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from sdrt.runtime.bundle.families.components import ENCODER_HIDDEN_STATES
from sdrt.runtime.bundle.families.depth import STABLE_DIFFUSION_DEPTH
from sdrt.runtime.bundle.families.image_variations import IMAGE_VARIATIONS
from sdrt.runtime.bundle.families.instruct_pix2pix import INSTRUCT_PIX2PIX, SDXL_INSTRUCT_PIX2PIX
from sdrt.runtime.bundle.families.record import Family
from sdrt.runtime.bundle.families.sdxl import SDXL, SDXL_REFINER, TEXT_EMBEDS
from sdrt.runtime.bundle.families.stable_diffusion import STABLE_DIFFUSION
from sdrt.runtime.bundle.families.stable_unclip import STABLE_UNCLIP
from sdrt.runtime.bundle.families.x4_upscaler import X4_UPSCALER

TRANSFORMERS, DIFFUSERS = "transformers", "diffusers"
STABLE_DIFFUSION_PARTS: Final = (
    "stable_diffusion"  # what model_index.json calls diffusers' folder of that name
)


@dataclass(frozen=True, slots=True)
class Network:
    """One network of a checkpoint, which has a folder of its own.

    Attributes:
        folder: Its name, in the checkpoint and in ``model_index.json``.
        library: Whose class it is.
        kind: The class, which ``model_index.json`` must name.
        components: The bundle's components that it becomes → the module around it that is exported, as
            ``package.module:Class``.
        config_keys: What an export reads of its ``config.json``: whole numbers, or lists of them for blocks.
        sizes: Axis of the components → the key of ``config.json`` that says its size.
        config_kinds: What ``config.json`` may call itself (``_class_name``, or each of ``architectures``).
        model_type: What ``config.json`` may say that it is; empty for anything.
        beside: A folder that belongs to it → the classes that ``model_index.json`` may give that.
        spare: Tensors beside the network's that leave the picture as it is.
    """

    folder: str
    library: str
    kind: str
    components: Mapping[str, str]
    config_keys: tuple[str, ...]
    sizes: Mapping[str, str]
    config_kinds: tuple[str, ...]
    model_type: str = ""
    beside: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    spare: re.Pattern[str] | None = None

    @property
    def weights(self) -> str:
        """The name of its weights without ``.safetensors``."""
        return "model" if self.library == TRANSFORMERS else "diffusion_pytorch_model"

    def load_kind(self) -> Any:
        """The library's class; the import takes seconds."""
        module = {STABLE_DIFFUSION_PARTS: "diffusers.pipelines.stable_diffusion"}.get(
            self.library, self.library
        )
        return pkgutil.resolve_name(f"{module}:{self.kind}")

    def load_wrapper(self, component: str) -> Any:
        """The class of the module that is exported as a component."""
        return pkgutil.resolve_name(self.components[component])


@dataclass(frozen=True, slots=True)
class CheckpointFamily:
    """What the checkpoints of a family are, and how diffusers draws with them.

    Attributes:
        record: The family.
        pipelines: diffusers' classes over its networks. Those for tasks (a picture to start from, a mask)
            draw with the same networks in the same way, and a bundle does these tasks too.
        networks: In the order in which they are read.
        draws: diffusers' class that draws with them, from text if they read any; of a latent consistency
            model too, since it takes any scheduler.
        encodes: Its class that reads prompts as that one does, where that one cannot be asked for it alone.
        inpaints: The class for a U-Net that reads a mask.
        settings: With what these are made, so that they neither check nor mark pictures.
        embeddings: Input of the U-Net → their argument for what the encoders gave; the unconditional half's
            has ``negative_`` before it.
        guidance: Their default ``guidance_scale``.
        added: What the U-Net's ``addition_embed_type`` must be; empty for none.
        vae_fields: Fields of the VAE's ``config.json`` that they read and those of other families do not.
        marker: The setting of ``model_index.json`` that tells its checkpoints from another family's with
            pipelines of the same classes; empty for none.
        from_picture: Whether `draws` wants a picture to start from.
        trusts_size: Whether they take a small ``sample_size`` of old diffusers as it stands.
        corrections: Whether it inpaints → what their constructors write over the scheduler's file.
        scales_picture: Whether the encoder's latents are brought to the sampler's scale.
        noising: The folder of the scheduler that lays noise over a given picture; empty for none.
        most_noise: The setting in ``model_index.json`` that bounds its level, and its default; by default all
            levels may be asked for.
        vae_factor: The VAE's ``scaling_factor``, whatever its file says; None for the file's.
        class_embedding: The field of the U-Net's configuration for what it is told so → what it must be; None
            for any whole number.
    """

    record: Family
    pipelines: tuple[str, ...]
    networks: tuple[Network, ...]
    draws: str
    inpaints: str
    settings: Mapping[str, Any]
    embeddings: Mapping[str, str]
    guidance: float
    added: str = ""
    vae_fields: frozenset[str] = frozenset()
    marker: str = ""
    from_picture: bool = False
    trusts_size: bool = False
    corrections: Mapping[bool, Mapping[str, Any]] = field(default_factory=dict)
    encodes: str = ""
    scales_picture: bool = True
    noising: str = ""
    most_noise: tuple[str, int] | None = None
    vae_factor: float | None = None
    class_embedding: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders of the networks."""
        return tuple(network.folder for network in self.networks)

    @property
    def tokenizers(self) -> dict[str, str]:
        """Folder of a text encoder → that of its tokenizer; in the order of the encoders."""
        return {entry.component: entry.tokenizer for entry in self.record.encoders if entry.tokenizer}

    def network(self, folder: str) -> Network:
        """The network in a folder.

        Raises:
            KeyError: The family has none there.
        """
        return {network.folder: network for network in self.networks}[folder]

    def network_of(self, component: str) -> Network:
        """The network that becomes a component.

        Raises:
            KeyError: The family has no such component.
        """
        return {name: network for network in self.networks for name in network.components}[component]


_OURS: Final = "sdrt.export.graphs.networks"
_TOKENIZER: Final = ("CLIPTokenizer", "CLIPTokenizerFast")
_TEXT_KINDS: Final = ("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPModel")
_TEXT_KEYS: Final = ("hidden_size", "max_position_embeddings", "num_hidden_layers", "vocab_size")
# The positions 0, 1, … that older transformers saved (Stable Diffusion 1.x and 2.x have them), and the rest
# of a whole CLIP model.
_POSITIONS: Final = r"(.*\.)?position_ids"
_CLIP: Final = rf"{_POSITIONS}|text_projection\.weight|logit_scale"

_TEXT_ENCODER: Final = Network(
    folder="text_encoder",
    library=TRANSFORMERS,
    kind="CLIPTextModel",
    components={"text_encoder": f"{_OURS}:TextEncoder"},
    config_keys=_TEXT_KEYS,
    sizes={"text_width": "hidden_size"},
    config_kinds=_TEXT_KINDS,
    model_type="clip_text_model",
    beside={"tokenizer": _TOKENIZER},
    spare=re.compile(rf"{_CLIP}|(vision_model|visual_projection)\..*"),
)
_IMAGE_ENCODER: Final = Network(
    folder="image_encoder",
    library=TRANSFORMERS,
    kind="CLIPVisionModelWithProjection",
    components={"image_encoder": f"{_OURS}:ImageEncoder"},
    config_keys=("image_size", "projection_dim"),
    sizes={"encoder_size": "image_size"},
    config_kinds=("CLIPVisionModelWithProjection", "CLIPVisionModel", "CLIPModel"),
    model_type="clip_vision_model",
    # Elsewhere it prepares what a safety checker looks at.
    beside={"feature_extractor": ("CLIPImageProcessor", "CLIPFeatureExtractor")},
    spare=re.compile(rf"{_CLIP}|text_model\..*"),
)
_TEXT_ENCODER_2: Final = Network(
    folder="text_encoder_2",
    library=TRANSFORMERS,
    kind="CLIPTextModelWithProjection",
    components={"text_encoder_2": f"{_OURS}:TextEncoder2"},
    config_keys=(*_TEXT_KEYS, "projection_dim"),
    sizes={"text_width_2": "hidden_size", "projection_width": "projection_dim"},
    config_kinds=_TEXT_KINDS,
    model_type="clip_text_model",
    beside={"tokenizer_2": _TOKENIZER},
    spare=re.compile(_POSITIONS),  # the projection is its own
)
_UNET: Final = Network(
    folder="unet",
    library=DIFFUSERS,
    kind="UNet2DConditionModel",
    components={"unet": f"{_OURS}:UNet"},
    config_keys=("block_out_channels", "cross_attention_dim", "in_channels", "out_channels", "sample_size"),
    sizes={"cross_width": "cross_attention_dim"},
    config_kinds=("UNet2DConditionModel",),
)
_VAE: Final = Network(
    folder="vae",
    library=DIFFUSERS,
    kind="AutoencoderKL",
    components={"vae_decoder": f"{_OURS}:VaeDecoder", "vae_encoder": f"{_OURS}:VaeEncoder"},
    config_keys=("block_out_channels", "latent_channels"),
    sizes={"latent_channels": "latent_channels"},
    config_kinds=("AutoencoderKL",),
)
_UNCHECKED: Final = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
_XL_EMBEDDINGS: Final = {ENCODER_HIDDEN_STATES: "prompt_embeds", TEXT_EMBEDS: "pooled_prompt_embeds"}
_XL_VAE_FIELDS: Final = frozenset({"latents_mean", "latents_std", "force_upcast"})

_FAMILIES: Final = (
    CheckpointFamily(
        record=STABLE_DIFFUSION,
        pipelines=(
            "StableDiffusionPipeline",
            "StableDiffusionImg2ImgPipeline",
            "StableDiffusionInpaintPipeline",
            "LatentConsistencyModelPipeline",
            "LatentConsistencyModelImg2ImgPipeline",
        ),
        networks=(_TEXT_ENCODER, _UNET, _VAE),
        draws="StableDiffusionPipeline",
        inpaints="StableDiffusionInpaintPipeline",
        settings=_UNCHECKED,
        embeddings={ENCODER_HIDDEN_STATES: "prompt_embeds"},
        guidance=7.5,
        corrections={
            False: {"steps_offset": 1, "clip_sample": False},
            True: {"steps_offset": 1, "skip_prk_steps": True},
        },
    ),
    CheckpointFamily(
        record=STABLE_DIFFUSION_DEPTH,
        pipelines=("StableDiffusionDepth2ImgPipeline",),
        networks=(_TEXT_ENCODER, _UNET, _VAE),
        draws="StableDiffusionDepth2ImgPipeline",
        inpaints="StableDiffusionDepth2ImgPipeline",
        settings={"depth_estimator": None, "feature_extractor": None},
        embeddings={ENCODER_HIDDEN_STATES: "prompt_embeds"},
        guidance=7.5,
        from_picture=True,
    ),
    CheckpointFamily(
        record=SDXL,
        pipelines=(
            "StableDiffusionXLPipeline",
            "StableDiffusionXLImg2ImgPipeline",
            "StableDiffusionXLInpaintPipeline",
        ),
        networks=(
            _TEXT_ENCODER,
            _TEXT_ENCODER_2,
            _UNET,
            _VAE,
        ),
        draws="StableDiffusionXLPipeline",
        inpaints="StableDiffusionXLInpaintPipeline",
        settings={"add_watermarker": False},
        embeddings=_XL_EMBEDDINGS,
        guidance=5.0,
        added="text_time",
        vae_fields=_XL_VAE_FIELDS,
        trusts_size=True,
    ),
    CheckpointFamily(
        record=SDXL_REFINER,
        pipelines=("StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"),
        networks=(_TEXT_ENCODER_2, _UNET, _VAE),
        draws="StableDiffusionXLImg2ImgPipeline",
        inpaints="StableDiffusionXLInpaintPipeline",
        settings={
            **{"text_encoder": None, "tokenizer": None},
            **{"add_watermarker": False, "requires_aesthetics_score": True},
        },
        embeddings=_XL_EMBEDDINGS,
        guidance=5.0,
        added="text_time",
        vae_fields=_XL_VAE_FIELDS,
        marker="requires_aesthetics_score",
        from_picture=True,
        trusts_size=True,
    ),
    CheckpointFamily(
        record=IMAGE_VARIATIONS,
        pipelines=("StableDiffusionImageVariationPipeline",),
        networks=(
            _IMAGE_ENCODER,
            _UNET,
            _VAE,
        ),
        draws="StableDiffusionImageVariationPipeline",
        inpaints="StableDiffusionImageVariationPipeline",
        settings=_UNCHECKED,
        embeddings={},
        guidance=7.5,
    ),
)


def _read_by_unet(of: Family, record: Family, pipeline: str, **changes: Any) -> CheckpointFamily:
    """A family's networks with a U-Net that reads a picture beside the noise, and the one pipeline for it."""
    (plain,) = (family for family in _FAMILIES if family.record is of)
    usual: dict[str, Any] = {
        "draws": pipeline,
        "inpaints": pipeline,
        "encodes": plain.draws,
        "trusts_size": True,
        "corrections": {},
    }
    return replace(plain, record=record, pipelines=(pipeline,), **{**usual, **changes})


_WITH_PICTURE: Final = (
    _read_by_unet(
        STABLE_DIFFUSION,
        INSTRUCT_PIX2PIX,
        "StableDiffusionInstructPix2PixPipeline",
        scales_picture=False,
    ),
    _read_by_unet(
        SDXL,
        SDXL_INSTRUCT_PIX2PIX,
        "StableDiffusionXLInstructPix2PixPipeline",
        scales_picture=False,
    ),
    _read_by_unet(
        STABLE_DIFFUSION,
        STABLE_UNCLIP,
        "StableUnCLIPImg2ImgPipeline",
        networks=(
            _TEXT_ENCODER,
            replace(
                _IMAGE_ENCODER,
                components={"image_encoder": f"{_OURS}:LabelEncoder"},
                sizes={"encoder_size": "image_size"},
            ),
            Network(
                folder="image_normalizer",
                library=STABLE_DIFFUSION_PARTS,
                kind="StableUnCLIPImageNormalizer",
                components={},
                config_keys=("embedding_dim",),
                sizes={},
                config_kinds=("StableUnCLIPImageNormalizer",),
            ),
            replace(
                _UNET,
                config_keys=(*_UNET.config_keys, "projection_class_embeddings_input_dim"),
                sizes={**_UNET.sizes, "label_width": "projection_class_embeddings_input_dim"},
            ),
            _VAE,
        ),
        settings={},
        guidance=10.0,
        noising="image_noising_scheduler",
        class_embedding={"class_embed_type": "projection"},
    ),
    _read_by_unet(
        STABLE_DIFFUSION,
        X4_UPSCALER,
        "StableDiffusionUpscalePipeline",
        networks=(
            _TEXT_ENCODER,
            replace(_UNET, config_keys=(*_UNET.config_keys, "num_class_embeds")),
            _VAE,
        ),
        settings={"safety_checker": None, "feature_extractor": None, "watermarker": None},
        guidance=9.0,
        noising="low_res_scheduler",
        most_noise=("max_noise_level", 350),
        vae_factor=0.08333,
        class_embedding={"num_class_embeds": None},
    ),
)
CHECKPOINT_FAMILIES: Final = {family.record.name: family for family in (*_FAMILIES, *_WITH_PICTURE)}
PIPELINES: Final = {
    pipeline: family
    for family in CHECKPOINT_FAMILIES.values()
    if not family.marker
    for pipeline in family.pipelines
}
SUPPORTED: Final = (
    "supported are those of Stable Diffusion 1.x, 2.x and XL for text to image, image to image and "
    "inpainting, with depth maps, of SDXL's refiner, of latent consistency models, of image variations, of "
    "InstructPix2Pix, of Stable unCLIP and of the x4 upscaler"
)
