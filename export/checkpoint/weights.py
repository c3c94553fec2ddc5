"""Weights → PyTorch modules: whole, of the right shapes and finite, or refused."""

from __future__ import annotations

import contextlib
import json
import pkgutil
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import torch

from sdrt.export.checkpoint.checkpoint import Checkpoint
from sdrt.export.checkpoint.families import TRANSFORMERS, Network
from sdrt.export.checkpoint.files import tensor_shapes
from sdrt.export.checkpoint.fit import MisfitError
from sdrt.export.checkpoint.random_weights import fill_with_random_weights, network_from_config
from sdrt.runtime.errors import CheckpointError, NumericsError

HALF_LARGEST: Final = float(torch.finfo(torch.float16).max)
_PREFIX: Final = re.compile(r"^(text_model|vision_model)\.")
_OLD_ATTENTION: Final = re.compile(r"(.*\battentions\.\d+\.)(query|key|value|proj_attn)(\.\w+)")
_NEW_ATTENTION: Final = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# safetensors' names of dtypes.
_DTYPES: Final = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64"}
# Of a library's networks, whatever their configuration says: the one that is exported as one operator.
ATTENTION: Final = {TRANSFORMERS: {"attn_implementation": "sdpa"}}
# Errors whose text alone says what is wrong; of the others ('foo', "division by zero") the type is told.
_SPEAKING: Final = (OSError, ValueError, RuntimeError)


class HalfOverflowError(NumericsError):
    """fp16 cannot hold a weight, or what a network computes of it.

    Attributes:
        what: The layer or the weights.
        largest: The magnitude that is reached.
    """

    def __init__(self, what: str, largest: float) -> None:
        super().__init__(f"{what} reach {largest:,.0f}, and fp16 holds {HALF_LARGEST:,.0f}")
        self.what, self.largest = what, largest


def check_architectures(checkpoint: Checkpoint) -> None:
    """Build every network without memory for its weights, and compare it with the headers of its files.

    What a configuration forbids, and a tensor that is missing, not known or of a wrong shape, is found before
    anything is loaded.

    Raises:
        CheckpointError: A configuration describes no network, or another one than the files hold.
    """
    for name in checkpoint.configs:
        folder = checkpoint.path / name
        try:
            module = meta_module(checkpoint, name)
        except Exception as error:  # whatever a wrong value leads to, deep inside of the libraries
            raise CheckpointError(
                f"{folder / 'config.json'} describes no network: {error_words(error)}"
            ) from error
        if checkpoint.random_seed is None:
            _check_headers(folder, checkpoint.kind.network(name), module)


def _check_headers(folder: Path, network: Network, module: torch.nn.Module) -> None:
    given = {_known_name(key): (key, *tensor) for key, tensor in tensor_shapes(folder).items()}
    wanted = {_known_name(key): (key, tuple(tensor.shape)) for key, tensor in module.state_dict().items()}
    both = given.keys() & wanted.keys()
    wrong = [(given[key][0], given[key][2], wanted[key][1]) for key in both]
    _refuse_tensors(
        folder,
        network,
        mismatched=[entry for entry in wrong if entry[1] != entry[2]],
        missing=[wanted[key][0] for key in wanted.keys() - given.keys()],
        unexpected=[given[key][0] for key in given.keys() - wanted.keys()],
    )
    whole = sorted(given[key][:2] for key in both if not given[key][1].startswith(("F", "BF")))
    if whole:
        key, dtype = whole[0]
        raise CheckpointError(
            f"{folder}: the tensor {key} is {dtype}, whole numbers: quantised weights are not supported, "
            "give the checkpoint that they were made from"
        )


def _known_name(key: str) -> str:
    """A tensor's name as all versions of the libraries agree on it.

    transformers 5 saves a text model without ``text_model.``, and its loaders take both; diffusers renamed
    the parts of a VAE's attention.
    """
    key = _PREFIX.sub("", key)
    old = _OLD_ATTENTION.fullmatch(key)
    return key if old is None else f"{old[1]}{_NEW_ATTENTION[old[2]]}{old[3]}"


def checkpoint_tensors(checkpoint: Checkpoint, name: str) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """The tensors of one network, by the names that its files give them.

    Returns:
        Name → dtype, shape, and the name that the network has for it; empty for one that it does not have.
        Of random weights, which no file holds, the network's own names.
    """
    network = meta_module(checkpoint, name).state_dict()
    if checkpoint.random_seed is not None:
        return {
            key: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), key)
            for key, tensor in network.items()
        }
    own = {_known_name(key): key for key in network}
    return {
        key: (_DTYPES.get(dtype, dtype), shape, own.get(_known_name(key), ""))
        for key, (dtype, shape) in tensor_shapes(checkpoint.path / name).items()
    }


def meta_module(checkpoint: Checkpoint, name: str) -> torch.nn.Module:
    """One network without memory for its weights."""
    with torch.device("meta"):
        return network_from_config(checkpoint.kind.network(name).load_kind(), checkpoint.configs[name])


def parameter_count(checkpoint: Checkpoint, name: str) -> int:
    """The parameters of one network."""
    network = checkpoint.kind.network(name)
    return _parameter_count(network.library, network.kind, json.dumps(checkpoint.configs[name]))


@lru_cache(maxsize=8)
def _parameter_count(library: str, kind: str, config: str) -> int:
    with torch.device("meta"):
        module = network_from_config(pkgutil.resolve_name(f"{library}:{kind}"), json.loads(config))
    return sum(parameter.numel() for parameter in module.parameters())


def load_module(checkpoint: Checkpoint, name: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Load one network on the CPU, in evaluation mode.

    Args:
        checkpoint: The checked folder.
        name: A key of the checkpoint's configs.
        dtype: Of the weights, which are rounded to it.

    Raises:
        CheckpointError: A tensor is missing, not known to the network, of a wrong shape, or holds NaN or
            infinity; or the configuration describes no network.
        HalfOverflowError: fp16 is asked for and cannot hold a weight.
    """
    if checkpoint.random_seed is not None:
        module = meta_module(checkpoint, name)
        fill_with_random_weights(module, dtype, checkpoint.random_seed, name)
        return module.eval().requires_grad_(False)
    folder, network = checkpoint.path / name, checkpoint.kind.network(name)
    try:
        with offline():
            module, report = network.load_kind().from_pretrained(
                folder,
                torch_dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                low_cpu_mem_usage=False,
                **ATTENTION.get(network.library, {}),
                ignore_mismatched_sizes=True,  # reported, and refused by name below
                output_loading_info=True,
            )
    except Exception as error:  # as in `check_architectures`
        raise CheckpointError(f"{folder} cannot be loaded: {error_words(error)}") from error
    _check_report(folder, network, report)
    module.to(dtype)  # diffusers leaves a tensor as it is that has another dtype than the file's others
    for key, tensor in module.state_dict().items():
        if not tensor.is_floating_point() or torch.isfinite(tensor).all():
            continue
        if dtype is torch.float16:  # as it stands in the file it may be finite; if not, this refuses it
            given = load_module(checkpoint, name).state_dict()[key]
            raise HalfOverflowError(f"the weights {key}", float(given.abs().max()))
        raise CheckpointError(f"{folder}: the tensor {key} holds NaN or infinity")
    loaded: torch.nn.Module = module.eval().requires_grad_(False)
    return loaded


def release_weights(module: torch.nn.Module) -> None:
    """Free a network's weights, whoever still holds the network: the tracer keeps what it has traced."""
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = torch.empty(0, dtype=tensor.dtype)


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Inside, no library of Hugging Face asks the network, whatever a configuration names."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def error_words(error: Exception) -> str:
    """One line about a library's error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) if lines else "no reason given"
    return text if lines and isinstance(error, _SPEAKING) else f"{type(error).__name__}: {text}"


def _check_report(folder: Path, network: Network, report: dict[str, Any]) -> None:
    """Turn a loader's silent re-initialisations and omissions into errors."""
    _refuse_tensors(
        folder,
        network,
        mismatched=report.get("mismatched_keys") or (),
        missing=report.get("missing_keys") or (),
        unexpected=report.get("unexpected_keys") or (),
    )


def _refuse_tensors(
    folder: Path,
    network: Network,
    *,
    mismatched: Iterable[tuple[str, Sequence[int], Sequence[int]]],
    missing: Iterable[str],
    unexpected: Iterable[str],
) -> None:
    """Refuse tensors that are not the network's; ``mismatched`` is (name, shape, shape by config.json)."""
    if wrong := sorted(mismatched):
        key, given, wanted = wrong[0]
        raise MisfitError(
            f"{folder}: {key} has the shape {list(given)}, by config.json it is {list(wanted)} "
            f"({len(wrong)} of wrong shape in all)"
        )
    if absent := sorted(key for key in missing if not str(key).endswith("position_ids")):
        raise MisfitError(f"{folder}: the tensor {absent[0]} is missing ({len(absent)} missing in all)")
    spare = network.spare
    if extra := sorted(key for key in unexpected if not (spare and spare.fullmatch(key))):
        raise MisfitError(
            f"{folder}: the tensor {extra[0]} has no place in the network that config.json describes "
            f"({len(extra)} such in all): the two are not of one model"
        )
