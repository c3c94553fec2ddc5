"""Which files of a checkpoint are fetched, read and hashed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

from sdrt.export.checkpoint.files import HUB_PATTERNS, find_checkpoint, weight_files
from sdrt.export.checkpoint.fingerprint import fingerprint
from sdrt.export.checkpoint.reader import open_checkpoint
from sdrt.export.checkpoint.weights import load_module
from sdrt.runtime.errors import CheckpointError

UNET = "unet/diffusion_pytorch_model.safetensors"

# As in stable-diffusion-v1-5/stable-diffusion-v1-5, the shards of other repositories, and what unCLIP and the
# x4 upscaler have beside that.
WANTED = [
    "README.md",
    "feature_extractor/preprocessor_config.json",
    "image_noising_scheduler/scheduler_config.json",
    "image_normalizer/config.json",
    "image_normalizer/diffusion_pytorch_model.safetensors",
    "low_res_scheduler/scheduler_config.json",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.safetensors.index.json",
    "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
]
UNWANTED = [
    ".gitattributes",
    "safety_checker/config.json",
    "safety_checker/model.fp16.safetensors",
    "safety_checker/model.safetensors",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/pytorch_model.bin",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
    "unet/diffusion_pytorch_model-00001-of-00002.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "v1-5-pruned-emaonly.ckpt",
    "v1-5-pruned-emaonly.safetensors",
    "v1-inference.yaml",
    "vae/diffusion_pytorch_model.fp16.safetensors",
]


def test_only_what_is_read_is_fetched_from_the_hub() -> None:
    assert list(filter_repo_objects(WANTED + UNWANTED, allow_patterns=list(HUB_PATTERNS))) == WANTED


def rename(old: str, new: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / old).rename(folder / new)

    return apply


def lora_beside_a_pickle(folder: Path) -> None:
    (folder / UNET).rename(folder / "unet/lora.safetensors")
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(b"")


def index(text: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / UNET).unlink()
        (folder / f"{UNET}.index.json").write_text(text)

    return apply


NAME = "diffusion_pytorch_model"


def test_where_a_repository_has_variants_alone_one_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a hub of the test's own: what the patterns allow is there afterwards."""
    asked = []
    repository = [
        *("model_index.json", "unet/config.json", "vae/config.json", f"vae/{NAME}.safetensors"),
        *(f"unet/{NAME}.{name}.safetensors" for name in ("fp16", "bf16", "non_ema")),
        f"vae/{NAME}.fp16.safetensors",
    ]

    def download(model: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((model, revision))
        for name in filter_repo_objects(repository, allow_patterns=allow_patterns):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert find_checkpoint("owner/name", "main") == tmp_path
    assert sorted(file.name for file in (tmp_path / "unet").iterdir()) == [
        "config.json",
        f"{NAME}.bf16.safetensors",
    ]
    assert [file.name for file in (tmp_path / "vae").glob("*.safetensors")] == [f"{NAME}.safetensors"]
    assert set(asked) == {("owner/name", "main")}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            rename(UNET, f"unet/{NAME}.fp16.safetensors"),
            rf"only a variant \({NAME}.fp16.safetensors\): load it with diffusers' variant=.* save it again",
        ),
        (lora_beside_a_pickle, rf"only a pickle \({NAME}.bin\)"),
        (rename(UNET, f"unet/._{NAME}.safetensors"), f"has no {NAME}.safetensors: the checkpoint is incompl"),
        (index("{}"), "has no weight_map"),
        (index('{"weight_map": {"a": "../x.safetensors"}}'), "names '../x.safetensors'.*refused"),
        (index('{"weight_map": {"a": "x.bin"}}'), "names 'x.bin'.*refused"),
        (index('{"weight_map": {"a": "x.safetensors"}}'), r"x.safetensors is missing, .* names it"),
    ],
)
def test_weights_that_no_loader_would_take_are_refused_at_once(
    checkpoint_copy: Path, damage: Callable[[Path], None], words: str
) -> None:
    damage(checkpoint_copy)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(str(checkpoint_copy))


def test_a_network_in_shards_is_read_whole(checkpoint_copy: Path) -> None:
    folder = checkpoint_copy / "unet"
    whole = load_module(open_checkpoint(str(checkpoint_copy)), "unet").state_dict()
    unet = UNet2DConditionModel.from_pretrained(folder)
    (checkpoint_copy / UNET).unlink()
    unet.save_pretrained(folder, max_shard_size="100KB")
    checkpoint = open_checkpoint(str(checkpoint_copy))
    files = weight_files(folder)
    assert len(files) > 2
    assert files[0].name == f"{NAME}.safetensors.index.json"
    assert set(json.loads(files[0].read_text())["weight_map"].values()) == {file.name for file in files[1:]}
    loaded = load_module(checkpoint, "unet").state_dict()
    assert all(torch.equal(loaded[key], whole[key]) for key in whole)


def test_the_fingerprint_is_that_of_the_files_that_are_read(checkpoint_copy: Path) -> None:
    before = fingerprint(open_checkpoint(str(checkpoint_copy)))
    for name in (
        f"unet/{NAME}.non_ema.safetensors",
        f"unet/{NAME}.fp16.safetensors.index.json",
        f"unet/._{NAME}.safetensors",
        "unet/._config.json",
        f"vae/{NAME}.bin",
    ):
        (checkpoint_copy / name).write_bytes(b"not used")
    assert fingerprint(open_checkpoint(str(checkpoint_copy))) == before
    (checkpoint_copy / "unet/config.json").open("a").write("\n")
    assert fingerprint(open_checkpoint(str(checkpoint_copy))) != before
