"""Checkpoints: what is refused, with which words, and how a scheduler's configuration is read."""

from __future__ import annotations

import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints.checkpoint_damage import (
    SCHEDULER,
    TEXT_CONFIG,
    UNET_CONFIG,
    VAE_CONFIG,
    WEIGHTS,
    Break,
    Tensors,
    add_one,
    change_tensors,
    configure,
    cut,
    drop_one,
    message_of,
    null,
    open_and_load,
    remove,
    shorten_a_matrix,
    spoil,
    write,
)

from sdrt.export.checkpoint.assembly import Parts, assembly_of
from sdrt.export.checkpoint.families import CHECKPOINT_FAMILIES
from sdrt.export.checkpoint.reader import open_checkpoint
from sdrt.export.checkpoint.weights import check_architectures, load_module, release_weights
from sdrt.export.cli import main as cli
from sdrt.runtime.errors import CheckpointError

BAD: dict[str, tuple[Break, tuple[str, ...]]] = {
    "no model_index": (remove("model_index.json"), ("model_index.json is missing",)),
    "index cut": (cut("model_index.json", 0.5), ("model_index.json cannot be read",)),
    "index a list": (write("model_index.json", b"[1]"), ("model_index.json", "JSON object")),
    "index not text": (write("model_index.json", b"\xff\xfe\x00"), ("model_index.json cannot be read",)),
    "no unet": (remove("unet"), ("no folder unet/",)),
    "no vae": (remove("vae"), ("no folder vae/",)),
    "no text encoder": (remove("text_encoder"), ("no folder text_encoder/",)),
    "no tokenizer": (remove("tokenizer"), ("no folder tokenizer/",)),
    "no scheduler": (remove("scheduler"), ("scheduler_config.json is missing",)),
    "no unet config": (remove(UNET_CONFIG), ("unet/config.json is missing",)),
    "no vae config": (remove(VAE_CONFIG), ("vae/config.json is missing",)),
    "no text config": (remove(TEXT_CONFIG), ("text_encoder/config.json is missing",)),
    "config cut": (cut(UNET_CONFIG, 0.9), ("unet/config.json cannot be read",)),
    "config without a key": (configure(TEXT_CONFIG, hidden_size=None), ("hidden_size is missing",)),
    "config of wrong type": (
        configure(UNET_CONFIG, sample_size="big"),
        ("sample_size is 'big'", "whole number"),
    ),
    "config with a zero": (
        configure(VAE_CONFIG, block_out_channels=[8, 0]),
        ("block_out_channels is [8, 0]",),
    ),
    "no unet weights": (remove(WEIGHTS["unet"]), ("unet has no diffusion_pytorch_model.safetensors",)),
    "no text weights": (remove(WEIGHTS["text_encoder"]), ("text_encoder has no model.safetensors",)),
    "no vae weights": (remove(WEIGHTS["vae"]), ("vae has no diffusion_pytorch_model.safetensors",)),
    "text weights cut": (cut(WEIGHTS["text_encoder"], 0.5), ("model.safetensors is truncated",)),
    "unet weights cut": (cut(WEIGHTS["unet"], 0.99), ("diffusion_pytorch_model.safetensors is truncated",)),
    "vae weights empty": (cut(WEIGHTS["vae"], 0), ("diffusion_pytorch_model.safetensors is truncated",)),
    "weights not safetensors": (write(WEIGHTS["unet"], b"\x89PNG\r\n" * 99), ("truncated or damaged",)),
    "weights of 4 channels for 9": (
        configure(UNET_CONFIG, in_channels=9),
        ("conv_in.weight has the shape [",),
    ),
    "widths": (configure(UNET_CONFIG, cross_attention_dim=24), ("gives 16 features", "takes 24")),
    "SDXL": (
        configure("model_index.json", _class_name="StableDiffusionXLPipeline"),
        ("no folder text_encoder_2/",),
    ),
    "transformer": (
        configure("model_index.json", _class_name="StableDiffusion3Pipeline", transformer=["a", "b"]),
        ("a StableDiffusion3Pipeline with a transformer", "not supported"),
    ),
    "layers that the configuration forgets": (
        configure(TEXT_CONFIG, num_hidden_layers=1),
        ("text_encoder: the tensor ", "layers.1.", "has no place in the network"),
    ),
    "scaling factor null": (null(VAE_CONFIG, "scaling_factor"), ("scaling_factor is None", "above 0")),
    "scaling factor 0": (configure(VAE_CONFIG, scaling_factor=0), ("scaling_factor is 0", "above 0")),
    "scaling factor NaN": (configure(VAE_CONFIG, scaling_factor=float("nan")), ("NaN is no finite number",)),
    "shift factor": (
        configure(VAE_CONFIG, shift_factor="x"),
        ("shift_factor is 'x'", "finite number or null"),
    ),
    "vocabulary": (configure(TEXT_CONFIG, vocab_size=600), ("ids up to 713", "embeds 600")),
    "zero SNR": (
        configure(SCHEDULER, rescale_betas_zero_snr=True),
        ("scheduler", "rescale_betas_zero_snr", "predicts the noise"),
    ),
    "thresholding": (configure(SCHEDULER, thresholding=True), ("scheduler", "thresholding is True")),
    "prediction": (configure(SCHEDULER, prediction_type="flow"), ("'flow'", "epsilon, v_prediction")),
    "beta schedule": (configure(SCHEDULER, beta_schedule="wavy"), ("'wavy'", "scaled_linear")),
    "beta": (configure(SCHEDULER, beta_end="0.012"), ("beta_end is '0.012'",)),
    **{
        f"{component} {what}": (change_tensors(component, change), (f"/{component}: ", *words))
        for component in CHECKPOINT_FAMILIES["sd"].folders
        for what, change, words in (
            ("wrong shape", shorten_a_matrix, ("has the shape [", "by config.json it is [")),
            ("tensor too many", add_one, ("the tensor ", "has no place in the network")),
            ("tensor missing", drop_one, ("the tensor ", " is missing")),
            ("NaN", spoil(float("nan")), ("the tensor ", "holds NaN or infinity")),
            ("infinity", spoil(float("inf")), ("the tensor ", "holds NaN or infinity")),
        )
    },
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_checkpoint_is_refused_in_one_line_that_says_what_is_wrong(
    checkpoint_copy: Path, what: str
) -> None:
    damage, words = BAD[what]
    damage(checkpoint_copy)
    message = message_of(checkpoint_copy)
    assert str(checkpoint_copy) in message or "U-Net" in message or "tokenizer" in message
    for word in words:
        assert word in message


# What only a network's constructor finds, with what the library's own text does not say.
SENSELESS: dict[str, tuple[Break, tuple[str, ...]]] = {
    "zero heads": (configure(UNET_CONFIG, attention_head_dim=0), ("unet", "ZeroDivisionError")),
    "zero groups": (configure(UNET_CONFIG, norm_num_groups=0), ("unet", "ZeroDivisionError")),
    "zero groups of the VAE": (configure(VAE_CONFIG, norm_num_groups=0), ("vae", "ZeroDivisionError")),
    "activation": (configure(TEXT_CONFIG, hidden_act="foo"), ("text_encoder", "KeyError", "foo")),
    "activation null": (null(TEXT_CONFIG, "hidden_act"), ("text_encoder", "hidden_act")),
    "heads": (configure(TEXT_CONFIG, num_attention_heads="x"), ("text_encoder", "num_attention_heads")),
    "blocks": (configure(UNET_CONFIG, down_block_types=["A", "B"]), ("unet", "A does not exist")),
}


@pytest.mark.parametrize("what", SENSELESS)
@pytest.mark.parametrize("early", [True, False])
def test_a_configuration_that_is_no_network_is_refused(checkpoint_copy: Path, what: str, early: bool) -> None:
    damage, words = SENSELESS[what]
    damage(checkpoint_copy)
    if early:
        with pytest.raises(CheckpointError) as caught:
            check_architectures(open_checkpoint(str(checkpoint_copy)))
        message = str(caught.value)
        assert "describes no network" in message
    else:
        message = message_of(checkpoint_copy)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_tensors_that_real_text_encoders_have_beside_the_network_are_no_fault(checkpoint_copy: Path) -> None:
    """Stable Diffusion's own file has the positions; a whole CLIP model saved there has the others."""

    def change(tensors: Tensors) -> None:
        prefix = "text_model." if any(key.startswith("text_model.") for key in tensors) else ""
        tensors[f"{prefix}embeddings.position_ids"] = torch.arange(77)[None]
        tensors["text_projection.weight"] = torch.eye(16)
        tensors["logit_scale"] = torch.tensor(1.0)
        tensors["vision_model.post_layernorm.weight"] = torch.ones(16)
        tensors["visual_projection.weight"] = torch.eye(16)

    change_tensors("text_encoder", change)(checkpoint_copy)
    open_and_load(checkpoint_copy)


def test_a_vae_with_the_older_names_of_its_attention_is_accepted(checkpoint_copy: Path) -> None:
    """Stable Diffusion 1.5's VAE names to_q, to_k, to_v and to_out.0 query, key, value and proj_attn."""
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def change(tensors: Tensors) -> None:
        for key in [key for key in tensors if ".attentions." in key]:
            for new, old in older.items():
                if f".{new}." in key:
                    tensors[key.replace(f".{new}.", f".{old}.")] = tensors.pop(key)

    before = load_module(open_checkpoint(str(checkpoint_copy)), "vae").state_dict()
    change_tensors("vae", change)(checkpoint_copy)
    assert any(".query." in key for key in load_file(checkpoint_copy / WEIGHTS["vae"]))
    after = load_module(open_checkpoint(str(checkpoint_copy)), "vae").state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("model", ["x" * 300, "a/" * 3000, "loop"])
def test_a_name_that_the_system_cannot_look_up_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(model)
    assert len(str(caught.value)) < 400


def test_a_folder_whose_files_cannot_be_read_is_one_line(
    checkpoint_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As without permission; root, whom the tests may run as, has it always."""

    def refuse(_folder: Path) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_dir", refuse)
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
        open_checkpoint(str(checkpoint_copy))


@pytest.mark.parametrize("model", ["", " "])
def test_an_empty_name_is_called_empty(model: str) -> None:
    with pytest.raises(CheckpointError, match="MODEL is empty: give a single file, a folder"):
        open_checkpoint(model)


def test_the_untouched_checkpoint_is_accepted(tiny_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    assert checkpoint.factor == 2
    assert checkpoint.size_multiple == 4
    assert checkpoint.sizes() == {
        "tokens": 77,
        "text_width": 16,
        "skips": 1,
        "cross_width": 16,
        "unet_channels": 4,
        "latent_channels": 4,
    }
    for name in CHECKPOINT_FAMILIES["sd"].folders:
        module = load_module(checkpoint, name)
        assert not module.training
        assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["nowhere at all", "/no/such/folder", "a/b/c", "https://example.org/x"])
def test_neither_a_folder_nor_a_hub_id(name: str) -> None:
    with pytest.raises(CheckpointError, match="no file or folder here, and no hub id of the form owner/name"):
        open_checkpoint(name)


def test_a_hub_id_without_a_network_is_one_line_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started = time.perf_counter()
    assert cli.main(["nobody/no-such-model", str(tmp_path / "out")]) == 4
    assert time.perf_counter() - started < 10  # no retries; most of it is an import
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert "'nobody/no-such-model'" in printed.err
    assert "on a machine with a network" in printed.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["model.ckpt", "model.bin", "model.pt", "model.pth"])
def test_a_pickle_is_refused_with_the_way_to_convert_it(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04N.")
    with pytest.raises(CheckpointError, match=rf"{name} is a pickle.*save_pretrained"):
        open_checkpoint(str(tmp_path / name))


@pytest.mark.parametrize("start", [b"PK\x03\x04", b"\x80\x02}q\x00.", b"\x80\x05\x95\x00"])
def test_a_pickle_is_known_by_its_bytes_whatever_its_name_is(tmp_path: Path, start: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(start + bytes(100))
    words = r"model.safetensors is a pickle.*whatever its name says: refused; convert it.*from_single_file"
    for place in (assembly_of, lambda parts: open_checkpoint(parts.model)):
        with pytest.raises(CheckpointError, match=words):
            place(Parts(str(file)))


def test_a_header_that_begins_as_a_pickle_does_is_a_header(tmp_path: Path) -> None:
    """One of 640 bytes: its length begins with those of pickle's second protocol."""
    header = b'{"model.diffusion_model.x":{"dtype":"F16","shape":[1],"data_offsets":[0,2]}}'.ljust(640)
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(2))
    with pytest.raises(CheckpointError, match="the first layer of a U-Net"):
        assembly_of(Parts(str(tmp_path / "model.safetensors")))


class Poison:
    """Unpickling one makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


PICKLES = (
    "text_encoder/pytorch_model.bin",
    "unet/diffusion_pytorch_model.bin",
    "vae/diffusion_pytorch_model.bin",
)


@pytest.mark.parametrize("beside_safetensors", [True, False])
def test_no_pickle_is_ever_opened(checkpoint_copy: Path, tmp_path: Path, beside_safetensors: bool) -> None:
    marker = tmp_path / "poisoned"
    poison = pickle.dumps(Poison(marker))
    for name in PICKLES:
        (checkpoint_copy / name).write_bytes(poison)
    if beside_safetensors:
        open_and_load(checkpoint_copy)
    else:
        (checkpoint_copy / WEIGHTS["unet"]).unlink()
        message = message_of(checkpoint_copy)
        assert "unet has only a pickle (diffusion_pytorch_model.bin)" in message
        assert "safe_serialization=True" in message
    assert not marker.exists()
    pickle.loads(poison)
    assert marker.exists(), "the poison does not work, so this test shows nothing"


def test_released_weights_hold_no_memory(tiny_checkpoint: Path) -> None:
    module = load_module(open_checkpoint(str(tiny_checkpoint)), "vae")
    held = list(module.parameters())  # as a tracer's cache holds them
    assert sum(tensor.numel() for tensor in held) > 0
    release_weights(module)
    assert sum(tensor.untyped_storage().nbytes() for tensor in held) == 0
