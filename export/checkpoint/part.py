"""One network of a checkpoint that is put together from parts, and the folder that it becomes.

A part is a folder in diffusers' format, which is linked as it is, or a safetensors file, whose tensors are
written under diffusers' names. Either may be edited on the way, tensor by tensor.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from safetensors import SafetensorError

from sdrt.export.checkpoint.families import Network
from sdrt.export.checkpoint.files import file_tensors, tensor_shapes, variant_of, weight_files
from sdrt.export.checkpoint.single_file.header import Header, load_tensors
from sdrt.export.checkpoint.single_file.names import renamed
from sdrt.runtime.errors import CheckpointError, OutputError
from sdrt.runtime.system.files import temporary_folder

if TYPE_CHECKING:
    import torch

# A tensor under the name that its file gives it, as it was read → what is written in its place: of the same
# shape, and of any floating dtype.
Edit = Callable[[str, "torch.Tensor"], "torch.Tensor"]

_SYSTEM_ERROR: Final = re.compile(r"\(os error (\d+)\)")  # as Rust writes it
SHARD_BYTES: Final = 1 << 30  # of one file: what of a network is in memory twice while it is written


@dataclass(frozen=True, slots=True)
class FolderPart:
    """A network that lies as diffusers saves it; its weights may be there as a variant alone."""

    network: Network
    place: Path

    @property
    def variant(self) -> str:
        """The variant that stands for the weights, such as ``fp16``; empty where they are there as usual."""
        return variant_of(self.place, self.network.weights)[0]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Its tensors by the names that its files give them, without their numbers."""
        with self._plain() as place:
            return {name: shape for name, (_, shape) in tensor_shapes(place, self.network.weights).items()}

    def write(self, folder: Path, edit: Edit | None = None) -> None:
        """Make ``folder`` this network: a link, or with ``edit`` its files with weights of their own.

        Raises:
            CheckpointError: The weights cannot be read.
            OutputError, OSError: ``folder`` cannot be written.
        """
        if edit is None and not self.variant:
            folder.symlink_to(self.place.resolve(), target_is_directory=True)
            return
        folder.mkdir()
        if edit is None:
            self._link(folder)
            return
        for entry in self.place.iterdir():
            if entry.is_file() and entry.suffix in (".json", ".txt") and ".safetensors." not in entry.name:
                (folder / entry.name).symlink_to(entry.resolve())
        with self._plain() as place:
            files = weight_files(place, self.network.weights)
            headers = [Header(file, *file_tensors(file)) for file in files if file.suffix == ".safetensors"]
            tensors = (
                pair for header in headers for pair in load_tensors(header, header.tensors, meta=False)
            )
            write_weights(folder, self.network.weights, tensors, edit)

    @contextlib.contextmanager
    def _plain(self) -> Iterator[Path]:
        """The folder with weights that have their usual names."""
        if not self.variant:
            yield self.place
            return
        with temporary_folder() as folder:
            self._link(folder)
            yield folder

    def _link(self, folder: Path) -> None:
        """Link the files into ``folder``, the variant's under the names that loaders look for."""
        _, renamed_files = variant_of(self.place, self.network.weights)
        plain = {entry.name: entry for entry in self.place.iterdir() if entry.is_file()}
        for name, entry in {**plain, **renamed_files}.items():
            (folder / name).symlink_to(entry.resolve())


@dataclass(frozen=True, slots=True)
class FilePart:
    """A network inside of a safetensors file.

    Attributes:
        network: Which.
        header: Of the file.
        names: See `sdrt.export.checkpoint.single_file.names.names_in`.
        config: The ``config.json`` that it gets.
    """

    network: Network
    header: Header
    names: Mapping[str, str]
    config: Mapping[str, Any]

    @property
    def place(self) -> Path:
        """The file."""
        return self.header.path

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Its tensors by the names that they are written under, without their numbers."""
        return {name: tuple(tensor.shape) for name, tensor in self._renamed(meta=True).items()}

    def _renamed(self, *, meta: bool) -> dict[str, torch.Tensor]:
        loaded = dict(load_tensors(self.header, self.names.values(), meta=meta))
        tensors = {short: loaded[name] for short, name in self.names.items()}
        return renamed(self.network.folder, tensors, self.config, self.header.path)

    def write(self, folder: Path, edit: Edit | None = None) -> None:
        """Make ``folder`` this network in diffusers' format; as `FolderPart.write`."""
        folder.mkdir()
        text = json.dumps(self.config, indent=2, sort_keys=True)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
        tensors = self._renamed(meta=False)
        names = list(tensors)  # each is let go of once it is written
        write_weights(folder, self.network.weights, ((name, tensors.pop(name)) for name in names), edit)


Part = FolderPart | FilePart


def write_weights(
    folder: Path, stem: str, tensors: Iterator[tuple[str, torch.Tensor]], edit: Edit | None = None
) -> None:
    """Write a network's weights as diffusers saves them: one file, or shards with an index.

    Args:
        folder: Of the network.
        stem: Of the files' names.
        tensors: Name and tensor; let go of as soon as they are written.
        edit: What is written in place of each.

    Raises:
        CheckpointError: ``edit`` gave a tensor of another shape.
        OSError: The disk is full, or the folder cannot be written.
    """
    shards: list[tuple[Path, list[str]]] = []
    waiting: dict[str, torch.Tensor] = {}
    total, size = 0, 0

    def put() -> None:
        file = folder / f"{stem}-{len(shards)}.part"
        _save(file, waiting)
        shards.append((file, list(waiting)))
        waiting.clear()

    for name, tensor in tensors:
        new = tensor if edit is None else edit(name, tensor)
        if new.shape != tensor.shape:
            raise CheckpointError(f"{name} became {list(new.shape)}, it is {list(tensor.shape)}")
        # A copy: what was read may be a view of more.
        waiting[name] = new.detach().clone().contiguous()
        bytes_ = prod(new.shape) * new.element_size()
        size, total = size + bytes_, total + bytes_
        if size >= SHARD_BYTES:
            put()
            size = 0
    if waiting or not shards:
        put()
    _name_shards(folder, stem, shards, total)


def _save(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), file, metadata={"format": "pt"})
    except SafetensorError as error:
        # The system's reason, for whoever calls: a full disk is one.
        number = _SYSTEM_ERROR.search(str(error))
        if number is None:
            raise OutputError(f"cannot write {file}: {error}") from error
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def _name_shards(folder: Path, stem: str, shards: list[tuple[Path, list[str]]], total: int) -> None:
    if len(shards) == 1:
        shards[0][0].rename(folder / f"{stem}.safetensors")
        return
    places: dict[str, str] = {}
    for number, (file, names) in enumerate(shards, 1):
        name = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        file.rename(folder / name)
        places |= dict.fromkeys(names, name)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
