"""Write the trained networks as a diffusers folder: fp16 safetensors, tokenizer, scheduler, index.

python make_checkpoint.py .                 # beside the recipe: the folder is the checkpoint
python make_checkpoint.py OTHER --random    # seeded random weights of the same shapes
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline

from architecture import build_autoencoder, build_scheduler
from data import cache_folder, read_captions
from latents import captioned_images, frozen_autoencoder
from make_tokenizer import write_tokenizer
from train_denoiser import STATE, Denoiser
from training import averaged_parameters

INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def trained_networks() -> tuple[AutoencoderKL, Denoiser]:
    """Both stages with their averaged parameters."""
    autoencoder, _ = frozen_autoencoder(captioned_images(read_captions()))
    denoiser = Denoiser()
    denoiser.load_state_dict(averaged_parameters(cache_folder() / STATE))
    return autoencoder, denoiser


def random_networks(seed: int) -> tuple[AutoencoderKL, Denoiser]:
    """Untrained networks: what a program that reads checkpoints can be tested with."""
    torch.manual_seed(seed)
    return build_autoencoder(), Denoiser()


def write_checkpoint(folder: Path, autoencoder: AutoencoderKL, denoiser: Denoiser) -> None:
    """Write all parts aside, check that a pipeline loads from them, and swap them in; other files stay."""
    part = folder / ".part"
    shutil.rmtree(part, ignore_errors=True)
    autoencoder.half().save_pretrained(part / "vae")
    denoiser.unet.half().save_pretrained(part / "unet")
    denoiser.text_encoder.half().save_pretrained(part / "text_encoder")
    build_scheduler().save_pretrained(part / "scheduler")
    write_tokenizer(part / "tokenizer")
    (part / "model_index.json").write_text(json.dumps(INDEX, indent=2) + "\n")
    # transformers loads in the dtype named here, diffusers in fp32 unless told: they must agree.
    amend(part / "text_encoder" / "config.json", {"dtype": "float32"})
    # PNDM does not know this key, but DDIM made from its configuration reads it (default: true).
    amend(part / "scheduler" / "scheduler_config.json", {"clip_sample": False})
    for file in part.rglob("*.safetensors"):
        file.chmod(0o644)
    StableDiffusionPipeline.from_pretrained(part)
    for new in sorted(part.iterdir()):
        swap(new, folder / new.name)
    part.rmdir()


def amend(file: Path, changes: dict[str, object]) -> None:
    """Set keys of a JSON file."""
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def swap(new: Path, place: Path) -> None:
    """Put a file or folder in the place of an older one."""
    if not place.is_dir():
        new.replace(place)
        return
    old = place.with_name(place.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    place.replace(old)
    new.replace(place)
    shutil.rmtree(old)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the checkpoint folder.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--random", action="store_true", help="seeded random weights")
    parser.add_argument("--seed", type=int, default=0, help="seed of --random")
    arguments = parser.parse_args()
    networks = random_networks(arguments.seed) if arguments.random else trained_networks()
    write_checkpoint(arguments.folder, *networks)


if __name__ == "__main__":
    main()
