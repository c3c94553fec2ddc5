"""What is no LoRA for the model at hand is refused in one line that says what it is."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.references.lora_files import as_diffusers, as_kohya, checkpoint_map, layers, pairs, write

from sdrt.runtime.bundle.families.registry import FAMILIES
from sdrt.runtime.bundle.limits import MAX_LORA_HEADER_BYTES
from sdrt.runtime.bundle.weight_map import WeightMap
from sdrt.runtime.errors import UsageError
from sdrt.runtime.lora.file import LoraFile, read_lora

BLOCK = "down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
CROSS = f"lora_unet_{BLOCK}"
BASE, ARCHITECTURE = "ss_base_model_version", "modelspec.architecture"
MATRIX = np.ones((4, 4), np.float32)


@pytest.fixture(scope="module")
def weights(tiny_checkpoint: Path) -> WeightMap:
    return checkpoint_map(tiny_checkpoint)


@pytest.fixture
def good(weights: WeightMap) -> dict[str, Any]:
    """The tensors of a LoRA that fits."""
    return as_kohya(pairs(weights, {"unet": layers(weights, "unet")}))


def read(file: Path, weights: WeightMap, *, partial: bool = False) -> LoraFile:
    return read_lora(file, weights, FAMILIES["sd"], partial=partial)


def test_keys_without_a_place_are_refused_or_left_out(
    tmp_path: Path, weights: WeightMap, good: dict[str, Any]
) -> None:
    known = len(read(write(tmp_path / "good.safetensors", good), weights).changes)
    wrong = {
        "lora_unet_middle_block_9_conv.lora_down.weight": MATRIX,  # no such layer
        "lora_unet_middle_block_9_conv.lora_up.weight": MATRIX,
        "lora_unet_conv_in.oft_blocks": MATRIX,  # no such part
        "lora_unet_conv_out.weight": MATRIX,  # (IA)³ says on_input as well
        "lora_unet_conv_in.diff": MATRIX,  # of another shape
    }
    file = write(tmp_path / "wrong.safetensors", {**good, **wrong})
    message = rf"'lora_unet_conv_in.diff' does not fit: .*\(5 such of {len(good) + 5} keys\).*--lora-partial"
    with pytest.raises(UsageError, match=message):
        read(file, weights)
    lora = read(file, weights, partial=True)
    assert (len(lora.changes), set(lora.left_out)) == (known, set(wrong))


@pytest.mark.parametrize(
    ("tensors", "said", "message"),
    [
        ({f"{CROSS}.lora_down.weight": np.ones((4, 2048))}, {}, "is for SDXL, this model is one whose text"),
        ({f"{CROSS}.hada_w1_b": np.ones((4, 768))}, {}, r"is for Stable Diffusion 1\.x, this model"),
        ({"unet.x.attn2.to_k.lora_A.weight": np.ones((4, 1024))}, {}, r"2\.x, this model"),
        ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.diff": MATRIX}, {}, "SDXL, with two text encoders"),
        ({"lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": MATRIX}, {}, "is for Flux"),
        ({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": MATRIX}, {}, "Stable Diffusion 3"),
        ({"lora_unet_x.lora_up.weight": MATRIX}, {BASE: "sdxl_base_v1-0"}, "it is for SDXL"),
        ({"lora_unet_x.lora_up.weight": MATRIX}, {ARCHITECTURE: "stable-diffusion-v1/lora"}, r"1\.x"),
        ({"emb_params": MATRIX}, {}, "has nothing that this model can use: the key 'emb_params'"),
        ({"": MATRIX}, {}, "has nothing that this model can use: the key ''"),
        ({"<s>": np.ones(())}, {"<s>": "<embed>"}, "has nothing that this model can use: the key '<s>'"),
        ({}, {}, "is empty"),
    ],
)  # fmt: skip
def test_for_another_model(
    tmp_path: Path, weights: WeightMap, tensors: dict[str, Any], said: dict[str, str], message: str
) -> None:
    file = write(tmp_path / "x.safetensors", tensors, **said)
    for partial in (False, True):
        with pytest.raises(UsageError, match=message):
            read(file, weights, partial=partial)


def layer(**parts: Any) -> dict[str, Any]:
    return {
        f"lora_unet_conv_out.{part.replace('0', '.')}": np.asarray(value) for part, value in parts.items()
    }


# The tiny U-Net's conv_out is [4, 16, 3, 3].
UP, DOWN = np.ones((4, 2, 1, 1), np.float32), np.ones((2, 16, 3, 3), np.float32)
FULL = np.ones((4, 16, 3, 3), np.float32)
FLAT = DOWN.reshape(2, -1)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (layer(lora_up0weight=UP), "its down is missing"),
        (layer(lora_up0weight=UP, lora_down0weight=DOWN[:1]), r"its down has the shape \[1, 16, 3, 3\]"),
        (layer(lora_up0weight=UP[:3], lora_down0weight=DOWN), r"its up has the shape \[3, 2, 1, 1\]"),
        (layer(lora_up0weight=UP[:, 0, 0, 0], lora_down0weight=DOWN), "a matrix is wanted"),
        (layer(lora_up0weight=UP, lora_down0weight=DOWN, alpha=[1.0, 2.0]), "its alpha has the shape"),
        (layer(lora_up0weight=UP, lora_down0weight=DOWN, dora_scale=np.ones(5)), "its dora_scale has"),
        (layer(lora_up0weight=UP, lora_down0weight=DOWN, lokr_w2=UP), "its lokr_w2 belongs to no kind"),
        (layer(lora_up0weight=UP, lora_down0weight=DOWN, lora_mid0weight=DOWN), "its middle has the shape"),
        (layer(lokr_w1=np.ones((3, 4)), lokr_w2=UP), "its lokr_w1 .* does not divide"),
        (layer(lokr_w1=np.ones((2, 4)), lokr_w2=UP), "its lokr_w2 has the shape"),
        (layer(lokr_w1_a=np.ones((5, 1)), lokr_w1_b=np.ones((1, 9)), lokr_w2=UP), "too large"),
        (layer(lokr_w1_a=np.ones(4), lokr_w1_b=np.ones((1, 9)), lokr_w2=UP), "too large"),
        (layer(hada_w1_a=UP, hada_w1_b=DOWN), "its hada_w1_b has the shape"),
        (layer(weight=np.ones(4), on_input=True), "its weight has the shape"),
        (layer(hada_w1_a=UP, hada_w1_b=FLAT, hada_w2_a=UP[:, 0, 0, 0], hada_w2_b=FLAT), "its hada_w2_a has"),
        (layer(alpha=1.0), "its alpha belongs to no kind"),
        (layer(diff=np.ones((1,) * 20, np.float32)), "has 20 axes of up to 1"),
        (layer(diff=np.full((4, 16, 3, 3), np.inf)), "'lora_unet_conv_out.diff' holds NaN or infinity"),
        (layer(diff=np.full((4, 16, 3, 3), 1e39)), "holds NaN or infinity"),
        (layer(diff=np.ones((4, 16, 3, 3), np.complex64)), "is C64; a LoRA is F32"),
        ({**layer(diff=FULL), "lora_unet_out_2.diff": FULL}, "changed twice"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit(
    tmp_path: Path, weights: WeightMap, tensors: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        read(write(tmp_path / "x.safetensors", tensors), weights)


def header(text: str | bytes, length: int | None = None) -> bytes:
    content = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(content) if length is None else length) + content


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.ckpt", b"", "is a pickle: refused"),
        ("x.safetensors", b"PK\x03\x04archive", "is a pickle, whatever its name"),
        ("x.safetensors", b"\x80\x02}q\x00.", "is a pickle, whatever its name"),
        ("x.safetensors", b"", "is no safetensors file, or damaged"),
        ("x.safetensors", header("{}", 1 << 62), f"the limit is {MAX_LORA_HEADER_BYTES}"),
        ("x.safetensors", header("[" * 100_000), "is no safetensors file"),
        ("x.safetensors", header("[]"), "its header is no object"),
        ("x.safetensors", header(b"\xff"), "is no safetensors file"),
        ("x.safetensors", header('{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'), "damaged"),
        ("x.safetensors", header('{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,0]}}'), "damaged"),
        ("x.safetensors", header(json.dumps({f"{n}": 0 for n in range(50_001)})), "50001 tensors"),
    ],
)
def test_files_that_are_none(
    tmp_path: Path, weights: WeightMap, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read(tmp_path / name, weights)


def test_a_header_that_begins_as_a_pickle_does(tmp_path: Path, weights: WeightMap) -> None:
    """One of 640 bytes: its length begins with those of pickle's second protocol."""
    shape = weights.tensors["unet"]["conv_out.bias"].shape
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * shape[0]]}
    header = json.dumps({"lora_unet_conv_out.diff_b": entry}).encode().ljust(640)
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4 * shape[0]))
    assert file.read_bytes()[:2] == b"\x80\x02"
    assert len(read(file, weights).changes) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "there is no file"),
        (lambda path: path.mkdir(), "is a folder"),
        (lambda path: path.symlink_to("/dev/zero"), "is a device"),
    ],
)
def test_places_without_a_file(
    tmp_path: Path, weights: WeightMap, make: Callable[[Path], object], message: str
) -> None:
    make(tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match=message):
        read(tmp_path / "x.safetensors", weights)


def test_alpha_in_the_header(tmp_path: Path, weights: WeightMap) -> None:
    """diffusers since 0.34 keeps PEFT's configuration there."""
    found = pairs(weights, {"unet": layers(weights, "unet")[:2]})
    first, second = found["unet"]
    patterns = {f"^{second.rpartition('.')[2]}": 5.0, f"^{second}": 3.0}  # of whole names
    said = {"unet.r": 4, "unet.lora_alpha": 8, "unet.alpha_pattern": patterns}
    file = write(tmp_path / "x.safetensors", as_diffusers(found), lora_adapter_metadata=said)
    scales = [getattr(change, "scale", None) for change in read(file, weights).changes.values()]
    assert scales == [8 / len(found["unet"][first].down), 3 / len(found["unet"][second].down)]
    for damaged in (
        *("[", "[1]", '{"unet.lora_alpha": "x"}', '{"unet.lora_alpha": true}'),
        '{"unet.lora_alpha": 1' + "0" * 400 + "}",
        '{"unet.alpha_pattern": {".*to_q": 8}}',
    ):
        file = write(tmp_path / "x.safetensors", as_diffusers(found), lora_adapter_metadata=damaged)
        with pytest.raises(UsageError, match=r"the PEFT configuration of .* is damaged"):
            read(file, weights)
