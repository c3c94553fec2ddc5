"""Low-rank adapters on the embedded checkpoint: attach, train, write.

PEFT adds the layers (Hu et al. 2022: W + B·A, B starts at zero); the loop is that of `training.py`. Files are
fp16 safetensors, in the names of diffusers and PEFT or in those of kohya and LyCORIS.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextModel

from data import cache_folder
from latents import encode
from train_denoiser import Denoiser
from training import Options, load_state, options_from, train

FOLDER = Path(__file__).parent
CHECKPOINT = FOLDER.parent
BASE_MODEL = "sdrt models/emoji"
PREFIX = "unet."
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")


@dataclass(frozen=True)
class Adapter:
    """What is attached: the rank of each pair, `alpha`, and the ends of the layers' names.

    What a pair adds is multiplied by alpha / rank; PEFT's files do not say it, so there the two are equal.
    """

    rank: int
    alpha: int
    layers: tuple[str, ...]


def load_denoiser() -> Denoiser:
    """The checkpoint's U-Net and text encoder in fp32, frozen."""
    denoiser = Denoiser()
    denoiser.unet = UNet2DConditionModel.from_pretrained(CHECKPOINT, subfolder="unet")
    denoiser.text_encoder = CLIPTextModel.from_pretrained(CHECKPOINT, subfolder="text_encoder")
    return denoiser.requires_grad_(False).eval()


@torch.no_grad()
def scaled_latents(images: Tensor) -> Tensor:
    """uint8 pictures [N, 3, 64, 64] → what the U-Net learns from: [N, 4, 16, 16]."""
    vae = AutoencoderKL.from_pretrained(CHECKPOINT, subfolder="vae").eval()
    latents: Tensor = encode(vae, images) * vae.config.scaling_factor
    return latents


def attach(unet: UNet2DConditionModel, adapter: Adapter, seed: int) -> nn.ParameterList:
    """Add the adapter's layers, seeded and without effect yet; returns their parameters."""
    torch.manual_seed(seed)
    layers = list(adapter.layers)
    unet.add_adapter(LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=layers))
    return nn.ParameterList(p for p in unet.parameters() if p.requires_grad)


def train_adapter(
    denoiser: Denoiser,
    adapter: Adapter,
    loss_of: Callable[[torch.Generator, float], Tensor],
    options: Options,
) -> dict[str, Tensor]:
    """Train for `options.steps`; returns the averaged layers under PEFT's names, fp32.

    Ends the program where a signal ended the training before: half of one is no file to ship.
    """
    parameters = attach(denoiser.unet, adapter, options.seed)
    print(f"{sum(p.numel() for p in parameters)} parameters learn", flush=True)
    average = train(parameters, loss_of, options)
    if (step := load_state(options.state)["step"]) != options.steps:
        raise SystemExit(f"stopped at step {step} of {options.steps}: the same command goes on from there")
    average.copy_to(parameters)
    layers: dict[str, Tensor] = get_peft_model_state_dict(denoiser.unet, adapter_name="default")
    return {name: value.detach().cpu() for name, value in layers.items()}


def kohya_names(layers: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """PEFT's names → kohya's (`lora_unet_<layer>.lora_down.weight`), with the `alpha` that these carry."""
    renamed = {}
    for name, value in layers.items():
        layer, half, _ = name.rsplit(".", 2)
        key = "lora_unet_" + layer.replace(".", "_")
        renamed[f"{key}.{'lora_down' if half == 'lora_A' else 'lora_up'}.weight"] = value
        renamed[f"{key}.alpha"] = torch.tensor(float(alpha))
    return renamed


def write(path: Path, tensors: dict[str, Tensor], adapter: Adapter, about: dict[str, str]) -> None:
    """Write an fp16 file; its metadata, named as in SAI's model spec, say what it is for and whose it is."""
    metadata = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.author": "the authors of sdrt",
        "modelspec.license": "Apache-2.0",
        "ss_base_model_version": BASE_MODEL,
        "ss_network_dim": str(adapter.rank),
        "ss_network_alpha": str(adapter.alpha),
        **about,
    }
    halves = {name: value.half().contiguous() for name, value in sorted(tensors.items())}
    save_file(halves, path, metadata=metadata)
    path.chmod(0o644)
    print(f"wrote {path}: {len(halves)} tensors, {path.stat().st_size} bytes", flush=True)


def training_options(
    parser: argparse.ArgumentParser, state: str, steps: int, learning_rate: float
) -> tuple[argparse.Namespace, Options]:
    """Parse the command line. The length is a number of steps: the same seed gives the same file again.

    `state` names the file from which an interrupted training goes on; it may name arguments: `{style}.pt`.
    """
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.set_defaults(device="cpu", minutes=0.0, until=None, polite=False)
    arguments = parser.parse_args()
    path = cache_folder() / "lora" / state.format(**vars(arguments))
    return arguments, options_from(arguments, path, learning_rate, average=0.99)
