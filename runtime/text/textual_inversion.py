"""Embeddings of textual inversion: a word of one's own, as vectors in the place of tokens (arXiv 2208.01618).

Only safetensors files are read, in the forms that are about: ``emb_params`` [k, width] (of
stable-diffusion-webui and diffusers), a single tensor of any name, and for a family of several text encoders
a tensor for each, named as in the family's record (``clip_l`` and ``clip_g`` for SDXL).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sdrt.runtime.bundle.families.record import Family
from sdrt.runtime.bundle.families.registry import FAMILIES
from sdrt.runtime.bundle.limits import MAX_EMBEDDING_BYTES, MAX_EMBEDDING_NAME
from sdrt.runtime.errors import UsageError
from sdrt.runtime.system.untrusted import PICKLE_SUFFIXES, library_errors, read_limited

WEBUI: Final = "emb_params"
_DTYPES: Final = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


class Embedding(NamedTuple):
    """An embedding as `sdrt.runtime.drawing.text_conditioning.PromptEncoder.add_embedding` takes it.

    Attributes:
        name: What stands for it in a prompt.
        vectors: For each text encoder float32 [k, width].
    """

    name: str
    vectors: tuple[NDArray[np.float32], ...]


def read_embedding(
    path: str | Path, token: str | None = None, *, family: Family, widths: Sequence[int]
) -> Embedding:
    """Read an embedding for a model.

    Args:
        path: A safetensors file.
        token: What will stand for it in a prompt; by default the file's name without its ending.
        family: The model's.
        widths: Numbers of one token's embedding, for each of the model's text encoders.

    Raises:
        UsageError: No such file, a pickle, damaged, too large, not of one of the forms, of another model's
            width, or with NaN or infinity; or a token that cannot be found in a prompt.
    """
    file = Path(path)
    name = checked_token(file.stem if token is None else token)
    found = _vectors(file, _tensors(file, _content(file)), family)
    for vectors, width, encoder in zip(found, widths, family.encoders, strict=True):
        if vectors.shape[1] != width:
            raise UsageError(
                f"{file} has vectors of {vectors.shape[1]} numbers, this model's {encoder.component} takes "
                f"{width}: it was made for another kind (Stable Diffusion 1.x has 768, 2.x 1024, SDXL 768 "
                "and 1280)"
            )
        if not np.isfinite(vectors).all():
            raise UsageError(f"{file} holds NaN or infinity: the embedding cannot be used")
    return Embedding(name, found)


def checked_token(token: str) -> str:
    """The name of an embedding, without white space around it.

    Raises:
        UsageError: Empty, too long, not printable, or a word that means something else in a prompt.
    """
    name = token.strip() if isinstance(token, str) else ""
    if not name or len(name) > MAX_EMBEDDING_NAME or not name.isprintable() or name == "BREAK":
        raise UsageError(
            f"the token of an embedding is {str(token)[:MAX_EMBEDDING_NAME]!r}: "
            f"1 to {MAX_EMBEDDING_NAME} printable characters, such as <cat-toy>, and not BREAK"
        )
    return name


def _content(file: Path) -> bytes:
    if file.suffix.lower() in PICKLE_SUFFIXES:
        raise UsageError(
            f"{file} is a pickle, which can run any program when it is read: refused; convert it to "
            "safetensors"
        )
    try:
        content = read_limited(file, MAX_EMBEDDING_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"there is no file {file}: give an embedding in the safetensors format") from None
    except ValueError as error:
        raise UsageError(f"{error}: it is no embedding, perhaps a whole model") from None
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from error
    if not content:
        raise UsageError(f"{file} is empty")
    return content


def _tensors(file: Path, content: bytes) -> dict[str, NDArray[np.float32]]:
    import safetensors  # only who uses embeddings waits for it

    deserialize: Callable[[bytes], list[tuple[str, Mapping[str, Any]]]] = safetensors.deserialize
    with library_errors(UsageError, f"{file} is no safetensors file, or damaged"):
        entries = deserialize(content)
        return {name: _array(file, name, entry) for name, entry in entries}


def _array(file: Path, name: str, entry: Mapping[str, Any]) -> NDArray[np.float32]:
    """One tensor in float32."""
    kind, data, shape = entry["dtype"], entry["data"], tuple(entry["shape"])
    if kind == "BF16":  # the upper half of a float32
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
    if kind not in _DTYPES:
        raise UsageError(f"{file}: the tensor {name!r} is {kind}; an embedding is F16, BF16, F32 or F64")
    with np.errstate(over="ignore"):  # beyond float32: infinity, which is refused
        return np.frombuffer(data, _DTYPES[kind]).reshape(shape).astype(np.float32)


def _vectors(
    file: Path, tensors: Mapping[str, NDArray[np.float32]], family: Family
) -> tuple[NDArray[np.float32], ...]:
    """The tensors that are the embedding, one for each text encoder, as [k, width]."""
    names = _names(file, tensors, family)
    arrays = []
    for name in names:
        array = tensors[name]
        array = array[None] if array.ndim == 1 else array
        if array.ndim != 2 or not array.size:
            raise UsageError(
                f"{file}: the tensor {name!r} has the shape {list(tensors[name].shape)}; an embedding is "
                "[vectors, width] with at least one vector"
            )
        arrays.append(array)
    if len({len(array) for array in arrays}) > 1:
        counts = " and ".join(str(len(array)) for array in arrays)
        encoders = _count(len(arrays))
        raise UsageError(f"{file} has {counts} vectors for the {encoders} text encoders: as many are needed")
    return tuple(arrays)


def _names(file: Path, tensors: Mapping[str, Any], family: Family) -> Sequence[str]:
    own = _keys(family)
    if all(own) and set(own) <= set(tensors):
        return own
    others = [one for one in FAMILIES.values() if len(one.encoders) > 1]
    meant = next((one for one in others if set(_keys(one)) <= set(tensors)), None)
    wanted = family if len(family.encoders) > 1 else None
    if (meant and _keys(meant)) != (wanted and _keys(wanted)):
        given = meant.title if meant else "one text encoder"
        needed = (
            f"{wanted.title}, with {_count(len(wanted.encoders))} of them" if wanted else "one text encoder"
        )
        raise UsageError(f"{file} is for {given}, this model is of {needed}: another embedding is needed")
    if WEBUI in tensors:
        return (WEBUI,)
    if len(tensors) != 1:
        held = ", ".join(map(repr, sorted(tensors)))[:200] or "nothing"
        forms = " or ".join(dict.fromkeys(" and ".join(_keys(one)) for one in others))
        raise UsageError(
            f"{file} holds {held}: an embedding is {WEBUI}, a single tensor, or {forms}; this "
            "is something else, perhaps a LoRA"
        )
    return tuple(tensors)


def _keys(family: Family) -> tuple[str, ...]:
    """What files for a family of several text encoders call the vectors of each."""
    return tuple(encoder.embedding for encoder in family.encoders)


def _count(number: int) -> str:
    return {2: "two", 3: "three"}.get(number, str(number))
