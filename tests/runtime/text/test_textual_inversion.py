"""Embeddings of textual inversion: every form that is read, and a table of what is refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from sdrt.runtime.bundle.families.sdxl import SDXL
from sdrt.runtime.bundle.families.stable_diffusion import STABLE_DIFFUSION as SD
from sdrt.runtime.bundle.limits import MAX_EMBEDDING_BYTES
from sdrt.runtime.errors import UsageError
from sdrt.runtime.text.textual_inversion import read_embedding

WIDTH, WIDTH_2 = 6, 10
Tensors = dict[str, NDArray[Any]]


def vectors(count: int = 2, width: int = WIDTH, dtype: str = "float32") -> NDArray[Any]:
    return np.random.default_rng(count * width).standard_normal((count, width)).astype(dtype)


def saved(folder: Path, tensors: Tensors, name: str = "toy.safetensors") -> Path:
    save_file(tensors, folder / name)
    return folder / name


@pytest.mark.parametrize("tensor", ["emb_params", "<toy>", "weights"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_one_tensor(tmp_path: Path, tensor: str, dtype: str) -> None:
    file = saved(tmp_path, {tensor: vectors(dtype=dtype)})
    name, (found,) = read_embedding(file, family=SD, widths=[WIDTH])
    assert name == "toy"
    assert found.dtype == np.float32
    assert np.array_equal(found, vectors(dtype=dtype).astype(np.float32))
    assert read_embedding(str(file), " <cat toy> ", family=SD, widths=[WIDTH]).name == "<cat toy>"


def test_one_vector_without_an_axis_for_their_number(tmp_path: Path) -> None:
    file = saved(tmp_path, {"<toy>": vectors(1)[0]})
    assert np.array_equal(read_embedding(file, family=SD, widths=[WIDTH]).vectors[0], vectors(1))


def test_bfloat16(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch

    tensor = torch.from_numpy(vectors()).bfloat16()
    save_torch({"emb_params": tensor}, tmp_path / "toy.safetensors")
    (found,) = read_embedding(tmp_path / "toy.safetensors", family=SD, widths=[WIDTH]).vectors
    assert np.array_equal(found, tensor.float().numpy())


def test_both_encoders_of_sdxl(tmp_path: Path) -> None:
    given = {"clip_g": vectors(3, WIDTH_2), "clip_l": vectors(3)}
    found = read_embedding(saved(tmp_path, given), family=SDXL, widths=[WIDTH, WIDTH_2]).vectors
    assert np.array_equal(found[0], given["clip_l"])
    assert np.array_equal(found[1], given["clip_g"])


def tensors(**arrays: NDArray[Any]) -> Callable[[Path], Path]:
    return lambda folder: saved(folder, arrays)


def content(data: bytes, name: str = "toy.safetensors") -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return write


def cut(folder: Path) -> Path:
    file = saved(folder, {"emb_params": vectors()})
    file.write_bytes(file.read_bytes()[:-5])
    return file


def huge(folder: Path) -> Path:
    file = folder / "toy.safetensors"
    file.touch()
    os.truncate(file, MAX_EMBEDDING_BYTES + 1)
    return file


NAN, INFINITE = vectors(), vectors()
NAN[1, 2], INFINITE[0, 0] = np.nan, np.inf
REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda folder: folder / "none.safetensors", "there is no file"),
    "folder": (lambda folder: folder, "is a folder: a regular file is wanted"),
    "pickle": (content(b"\x80\x04", "toy.pt"), "toy.pt is a pickle, which can run any program"),
    "pickle in capitals": (content(b"", "toy.BIN"), "is a pickle"),
    "renamed pickle": (content(b"PK\x03\x04" + bytes(100)), "is no safetensors file, or damaged"),
    "empty": (content(b""), "is empty"),
    "text": (content(b"no tensors at all, only words"), "is no safetensors file, or damaged"),
    "cut off": (cut, "is no safetensors file, or damaged"),
    "huge": (
        huge,
        "has more than 16777216 bytes, which is the limit: it is no embedding, perhaps a whole model",
    ),
    "no tensor": (tensors(), "holds nothing: an embedding is emb_params, a single tensor"),
    "many tensors": (tensors(up=vectors(), down=vectors()), "holds 'down', 'up'.*perhaps a LoRA"),
    "width": (tensors(emb_params=vectors(2, 7)), "vectors of 7 numbers, this model's text_encoder takes 6"),
    "rank": (tensors(emb_params=vectors()[None]), r"has the shape \[1, 2, 6\]; an embedding is"),
    "scalar": (tensors(emb_params=np.zeros((), np.float32)), r"has the shape \[\]"),
    "no vector": (tensors(emb_params=np.zeros((0, WIDTH), np.float32)), "with at least one vector"),
    "NaN": (tensors(emb_params=NAN), "holds NaN or infinity"),
    "infinity": (tensors(emb_params=INFINITE), "holds NaN or infinity"),
    "beyond float32": (tensors(emb_params=np.full((1, WIDTH), 1e300)), "holds NaN or infinity"),
    "whole numbers": (tensors(emb_params=np.ones((1, WIDTH), np.int64)), "is I64; an embedding is F16"),
    "of SDXL": (tensors(clip_l=vectors(), clip_g=vectors(2, WIDTH_2)), "is for SDXL, this model is of one"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(tmp_path: Path, case: str) -> None:
    make, words = REFUSED[case]
    with pytest.raises(UsageError, match=words) as caught:
        read_embedding(make(tmp_path), family=SD, widths=[WIDTH])
    assert "\n" not in str(caught.value)


SDXL_REFUSED: dict[str, tuple[Tensors, str]] = {
    "of one encoder": ({"emb_params": vectors()}, "is for one text encoder, this model is of SDXL"),
    "half": ({"clip_l": vectors()}, "is for one text encoder, this model is of SDXL"),
    "other numbers": (
        {"clip_l": vectors(2), "clip_g": vectors(3, WIDTH_2)},
        "has 2 and 3 vectors for the two text encoders",
    ),
    "width": (
        {"clip_l": vectors(2), "clip_g": vectors(2)},
        "vectors of 6 numbers, this model's text_encoder_2 takes 10",
    ),
}


@pytest.mark.parametrize("case", SDXL_REFUSED)
def test_what_sdxl_refuses(tmp_path: Path, case: str) -> None:
    given, words = SDXL_REFUSED[case]
    with pytest.raises(UsageError, match=words):
        read_embedding(saved(tmp_path, given), family=SDXL, widths=[WIDTH, WIDTH_2])


@pytest.mark.parametrize("token", ["", "  ", "BREAK", "a\nb", "x" * 101, 7])
def test_tokens_that_no_prompt_can_have(tmp_path: Path, token: Any) -> None:
    with pytest.raises(UsageError, match=r"the token of an embedding is .*: 1 to 100 printable characters"):
        read_embedding(saved(tmp_path, {"emb_params": vectors()}), token, family=SD, widths=[WIDTH])
