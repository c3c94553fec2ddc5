"""Where a LoRA's name leads: to one that was loaded under it, to a file, or into a folder of LoRAs."""

from __future__ import annotations

import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.checks import did_you_mean
from sdrt.runtime.errors import UsageError
from sdrt.runtime.lora.weights import SUFFIX, LoraWeights, checked_weights, short_name
from sdrt.runtime.system.untrusted import open_regular

if TYPE_CHECKING:
    from sdrt.runtime.bundle.weight_map import WeightMap
    from sdrt.runtime.lora.file import LoraFile

SHIPPED: Final = "lora"  # the folder beside the embedded bundle
MAX_NAME: Final = 200  # characters
MAX_KEPT: Final = 8  # files that need not be read again
MAX_FILES: Final = 100_000  # in a folder of LoRAs: a mistyped one may be a whole disk
_SHOWN: Final = 8  # names that a message has
_A1111_DIGITS: Final = 12


class LoraPartialWarning(UserWarning):
    """A part of a LoRA has no place in the model, and is left out, as was asked for."""


class Lora(NamedTuple):
    """A LoRA's file, and what stable-diffusion-webui knows it by.

    Attributes:
        file: As it was read.
        a1111_hash: The first 12 digits of the SHA-256 of all that follows the file's header.
    """

    file: LoraFile
    a1111_hash: str

    @property
    def components(self) -> frozenset[str]:
        """Folders of the checkpoint that it changes something in."""
        return frozenset(key.folder for key in self.file.changes)


class LoraLibrary:
    """LoRAs that were loaded, and those that can be found; any thread may ask.

    Attributes:
        folder: Where names are looked for, with all that is below; None for nowhere.
        adapters: Those that were loaded, by the names that they were given.
        active: Weights of those that a call has which does not say otherwise.
    """

    def __init__(self, bundle: Bundle, folder: str | Path | None = None) -> None:
        """Look at nothing yet but whether the folder is there.

        Args:
            bundle: What the LoRAs are for.
            folder: The folder of LoRAs; by default that of the embedded model's own, for that model.

        Raises:
            UsageError: There is no such folder.
        """
        self._shipped = folder is None and bundle.embedded
        self.folder = None if folder is None else Path(folder)
        if self._shipped:
            self.folder = bundle.path.parent / SHIPPED
        if self.folder is not None and not os.path.isdir(self.folder):  # noqa: PTH112 - raises for no name
            raise UsageError(f"the folder of LoRAs {self.folder} does not exist, or is none")
        self.adapters: dict[str, Lora] = {}
        self.active: dict[str, LoraWeights] = {}
        self._bundle = bundle
        self._weight_map: WeightMap | None = None
        self._kept: OrderedDict[tuple[Any, ...], Lora] = OrderedDict()
        self._lock = threading.Lock()

    def load(self, path: str | Path, name: str | None, *, partial: bool) -> str:
        """Read a file, and make it the one that is active; see `sdrt.runtime.pipeline.Pipeline`.

        Raises:
            UsageError: It cannot be used, or another has the name.
        """
        if not isinstance(path, str | Path):  # diffusers takes tensors, too
            raise UsageError(f"the LoRA is {type(path).__name__}: the path of a .safetensors file is wanted")
        name = checked_name(Path(path).stem if name is None else name)
        lora = self._read(Path(path), partial=partial)
        other = self.adapters.get(name)
        if other is not None and other.file.identity != lora.file.identity:
            raise UsageError(
                f"the name {name!r} is taken by {other.file.path}: give {path} another adapter_name, or "
                "unload that one first (unload_lora_weights)"
            )
        self.adapters = {**self.adapters, name: lora}
        self.active = {name: LoraWeights()}
        return name

    def activate(self, names: str | Sequence[str], weights: Any) -> None:
        """Let calls which do not say otherwise have these adapters, and no others.

        Args:
            names: Of those that were loaded.
            weights: One for all, one for each, or None for 1.

        Raises:
            UsageError: There is no such adapter, one is given twice, or a weight is none.
        """
        names = self._known(names)
        every = list(weights) if isinstance(weights, Sequence) else [weights] * len(names)
        if isinstance(weights, str) or len(every) != len(names):
            raise UsageError(
                f"the weights are {weights!r}: one for all, or one for each of {len(names)} names"
            )
        if len(set(names)) < len(names):
            raise UsageError(f"the adapters {', '.join(names)}: one is given twice")
        given = zip(names, every, strict=True)
        self.active = {name: checked_weights(name, 1.0 if one is None else one) for name, one in given}

    def unload(self, names: str | Sequence[str] | None) -> None:
        """Forget adapters; of None all.

        Raises:
            UsageError: There is no such adapter.
        """
        gone = set(self.adapters if names is None else self._known(names))
        self.active = {name: weights for name, weights in self.active.items() if name not in gone}
        self.adapters = {name: lora for name, lora in self.adapters.items() if name not in gone}

    def find(self, name: str, *, partial: bool = False) -> Lora:
        """The LoRA that a call names: an adapter, a file, or one of the folder.

        Args:
            name: The adapter's, or a path, which is looked for in the folder where it leads to no file.
            partial: See `sdrt.runtime.lora.file.read_lora`.

        Raises:
            UsageError: There is none, or its file cannot be used.
        """
        if name in self.adapters:
            return self.adapters[name]
        if os.path.isfile(name) or (_is_path(name) and os.path.lexists(name)):  # noqa: PTH113 - as above
            return self._read(Path(name), partial=partial)
        return self._of_folder(name, short_name(name), partial=partial)

    def find_tagged(self, name: str, *, partial: bool = False) -> Lora | None:
        """The LoRA that a prompt names: an adapter, or one of the folder, never a path.

        Returns:
            None where no adapter has the name, and nobody said where else to look.

        Raises:
            UsageError: As `find`.
        """
        if name in self.adapters:
            return self.adapters[name]
        if self.folder is None or (self._shipped and name not in _files_below(self.folder)):
            return None
        return self._of_folder(name, partial=partial)

    def _known(self, names: str | Sequence[str]) -> list[str]:
        known = [names] if isinstance(names, str) else list(names)
        for name in known:
            if name not in self.adapters:
                raise self._unknown(str(name), "is not loaded", list(self.adapters))
        return known

    def _of_folder(self, name: str, *others: str, partial: bool) -> Lora:
        if self.folder is None:
            raise self._unknown(name, "is neither loaded nor a file here", list(self.adapters))
        found = _files_below(self.folder)
        places: Sequence[Path] = next((found[one] for one in (name, *others) if one in found), ())
        if not places:
            where = "neither loaded nor a file here" if self._shipped else f"not in {self.folder}"
            raise self._unknown(name, f"is {where}", [*self.adapters, *found])
        if len(places) > 1:
            ways = [place.relative_to(self.folder).with_suffix("") for place in places]
            raise UsageError(f"the LoRA {name!r} is in {self.folder} as {ways[0]} and {ways[1]}: write which")
        return self._read(places[0], partial=partial)

    def _unknown(self, name: str, why: str, known: Sequence[str]) -> UsageError:
        question = did_you_mean(name[:MAX_NAME], known)
        some = ", ".join(sorted(known)[:_SHOWN]) + (" …" if len(known) > _SHOWN else "")
        ways = "give its file (--lora FILE, load_lora_weights)"
        if self.folder is None or self._shipped:
            ways += ", or say where LoRAs lie (--lora-dir DIR, lora_dir)"
        parts = [f"{question} " if question else "", f"there is {some}; or " if known else "", ways]
        return UsageError(f"the LoRA {name[:MAX_NAME]!r} {why}: {''.join(parts)}")

    def _read(self, path: Path, *, partial: bool) -> Lora:
        from sdrt.runtime.bundle.weight_map import read_weight_map  # who draws without LoRAs need not wait
        from sdrt.runtime.lora.file import read_lora
        from sdrt.runtime.lora.peft_config import PEFT_CONFIG

        key = (path, _facts(path), _facts(path.parent / PEFT_CONFIG), partial)
        with self._lock:
            if key not in self._kept:
                if self._weight_map is None:
                    self._weight_map = read_weight_map(self._bundle)
                family = self._bundle.manifest.record
                file = read_lora(path, self._weight_map, family, partial=partial)
                self._kept[key] = Lora(file, _a1111_hash(path))
                if file.left_out:
                    warnings.warn(
                        f"left out of {path}, without a place in this model: {len(file.left_out)} of its "
                        f"keys, such as {file.left_out[0]!r}",
                        LoraPartialWarning,
                        stacklevel=2,
                    )
            self._kept.move_to_end(key)
            while len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
            return self._kept[key]


def checked_name(name: Any) -> str:
    """The name of an adapter.

    Raises:
        UsageError: Empty, too long, or not printable.
    """
    if not isinstance(name, str) or not name.strip() or len(name) > MAX_NAME or not name.isprintable():
        raise UsageError(f"adapter_name is {str(name)[:MAX_NAME]!r}: 1 to {MAX_NAME} printable characters")
    return name


def _facts(path: Path) -> tuple[int, ...]:
    """What is another where a file was changed; what is the matter with it is told when it is read."""
    try:
        facts = path.stat()
    except (OSError, ValueError):
        return ()
    return facts.st_size, facts.st_mtime_ns, facts.st_ino


def _is_path(name: str) -> bool:
    return name.lower().endswith(SUFFIX) or os.sep in name


def _files_below(folder: Path) -> Mapping[str, tuple[Path, ...]]:
    """What files of a folder are called: by their stem, and by the way to them without its ending."""
    found: dict[str, tuple[Path, ...]] = {}
    seen: set[str] = set()
    count = 0
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:  # a link that leads up again
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        count += len(files)
        if count > MAX_FILES:
            raise UsageError(f"{folder} holds more than {MAX_FILES} files: give a folder of LoRAs alone")
        for file in sorted(files):
            if not file.lower().endswith(SUFFIX):
                continue
            path = Path(parent, file)
            way = path.relative_to(folder).with_suffix("").as_posix()
            for name in dict.fromkeys((path.stem, way)):
                found[name] = (*found.get(name, ()), path)
    return found


def _a1111_hash(path: Path) -> str:
    """See `Lora`; ``addnet_hash_safetensors`` of stable-diffusion-webui's ``modules/hashes.py``."""
    import hashlib

    digest = hashlib.sha256()
    with open_regular(path) as stream:
        stream.seek(8 + int.from_bytes(stream.read(8), "little"))
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:_A1111_DIGITS]
