"""A checkpoint from parts → a folder in diffusers' format, which is then read as any other.

MODEL may be a folder or a single file, and other files or folders may bring or replace its VAE and its text
encoders. Whatever already lies in diffusers' format is linked; of the rest copies are written, in the files'
own dtypes. The folder lies beside OUT, on whose disk there is room, and is gone when the export ends.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from sdrt.export.checkpoint.architectures import FOLDER
from sdrt.export.checkpoint.checkpoint import Checkpoint
from sdrt.export.checkpoint.classes import pipeline_family
from sdrt.export.checkpoint.families import DIFFUSERS, TRANSFORMERS, CheckpointFamily, Network
from sdrt.export.checkpoint.few_steps import few_steps, names_of
from sdrt.export.checkpoint.files import find_checkpoint, read_json, reading
from sdrt.export.checkpoint.fit import MisfitError, check_fit
from sdrt.export.checkpoint.kinds import refuse_file, refuse_folder
from sdrt.export.checkpoint.limits import MAX_CONFIG_BYTES
from sdrt.export.checkpoint.overrides import Overrides, with_overrides
from sdrt.export.checkpoint.part import Edit, FilePart, FolderPart, Part
from sdrt.export.checkpoint.reader import read_checkpoint
from sdrt.export.checkpoint.scheduler import FILE as SCHEDULER_FILE
from sdrt.export.checkpoint.single_file.header import check_storage, read_header
from sdrt.export.checkpoint.single_file.names import UNET, names_in
from sdrt.export.checkpoint.single_file.published import INDEX_FILE
from sdrt.export.checkpoint.single_file.reading import read_single_file, scheduler_in
from sdrt.export.checkpoint.tokenizer_json import open_tokenizer, vocabulary_from_clip, write_tokenizer_folder
from sdrt.runtime.errors import CheckpointError, UsageError
from sdrt.runtime.system.files import scratch_folder, writing

# Networks that can be brought or replaced → the option that does.
OPTIONS: Final = {
    "unet": "--unet",
    "vae": "--vae",
    "text_encoder": "--text-encoder",
    "text_encoder_2": "--text-encoder-2",
}
WORDS: Final = {
    "unet": "U-Net",
    "vae": "VAE",
    "text_encoder": "text encoder",
    "text_encoder_2": "second text encoder",
}
_OF_FILES: Final = "is for single files: a folder says itself what it is"


@dataclass(frozen=True, slots=True)
class Parts:
    """What a checkpoint is put together from.

    Attributes:
        model: A folder in diffusers' format, a hub id, or a single file.
        revision: On the hub.
        others: Folder of a network (a key of `OPTIONS`) → the file or folder that it is taken from.
        overrides: What the user says of the model.
    """

    model: str
    revision: str | None = None
    others: Mapping[str, Path] = field(default_factory=dict)
    overrides: Overrides = field(default_factory=Overrides)


@dataclass(frozen=True, slots=True)
class Assembly:
    """What a checkpoint will be; nothing is written yet, and no weights are read.

    Attributes:
        source: What the user named as the model.
        family: Of the pipeline that draws with it.
        base: The folder that it is as it stands, or in part.
        parts: Folder of each network → where it is taken from.
        documents: Files that are written: path in the folder → JSON.
        tokenizers: Folders of tokenizers that are written with CLIP's vocabulary → their configuration.
        linked: Entries of ``base`` that the folder has as well.
        names: What the model is called, where it is not the folder that is; see `few_steps`.
        brought: Folders of the networks that are not the model's own.
        line: What a single file is, for people, or what is taken of a folder; usually empty there.
        hint: What to do where the configurations do not fit the weights.
    """

    source: str
    family: CheckpointFamily
    base: Path
    parts: Mapping[str, Part]
    documents: Mapping[str, Mapping[str, Any]]
    tokenizers: Mapping[str, Path]
    linked: tuple[str, ...]
    names: tuple[str, ...] | None = None
    brought: tuple[str, ...] = ()
    line: str = ""
    hint: str = ""

    @contextlib.contextmanager
    def opened(self, out: Path, edit: Mapping[str, Edit] | None = None) -> Iterator[Checkpoint]:
        """The checkpoint, checked, for as long as the block runs.

        Args:
            out: What is exported; the folder lies beside it.
            edit: Folder of a network → a function that is given each of its tensors, under the name that
                `tensors` has, as the file holds it, and gives what is written in its place: of the same shape
                and of any floating dtype. A LoRA is merged by it. Networks without one stay as they are.

        Raises:
            CheckpointError: As for `sdrt.export.checkpoint.reader.open_checkpoint`, also inside the block:
                what lies in the temporary folder is called as the user named it.
            OutputError: There is no room, or no permission, beside ``out``.
        """
        if not (self.documents or edit or self.line):
            with reading(self.source):
                checkpoint = read_checkpoint(self.base, self.source)
            check_fit(checkpoint)
            yield checkpoint
            return
        with scratch_folder(out) as folder, _named(self, folder):
            with writing(out):
                self._write(folder, edit or {})
            with reading(self.source):
                checkpoint = read_checkpoint(folder, self.source, names=self.names)
            check_fit(checkpoint)
            yield replace(checkpoint, read_as=self.line)

    def tensors(self, folder: str) -> dict[str, tuple[int, ...]]:
        """Name → shape of one network's tensors, as the opened checkpoint's files have them."""
        return self.parts[folder].shapes()

    def _write(self, folder: Path, edit: Mapping[str, Edit]) -> None:
        for name in self.linked:
            (folder / name).symlink_to((self.base / name).resolve())
        for name, document in self.documents.items():
            (folder / name).parent.mkdir(exist_ok=True)
            text = json.dumps(document, indent=2, sort_keys=True)
            (folder / name).write_text(text + "\n", encoding="utf-8")
        for name, configured in self.tokenizers.items():
            _write_tokenizer(folder / name, configured)
        for name, part in self.parts.items():
            part.write(folder / name, edit.get(name))


def assembly_of(parts: Parts) -> Assembly:
    """Look at what is given, and say what it will be; only headers and configurations are read.

    Raises:
        CheckpointError: A part is missing, damaged, or of a kind that is not supported.
        UsageError: Options that do not go together.
    """
    with reading(parts.model):
        path = Path(parts.model)
        if path.is_file():
            return _of_file(path, parts)
        return _of_folder(find_checkpoint(parts.model, parts.revision), parts)


def _of_file(path: Path, parts: Parts) -> Assembly:
    if path.suffix != ".safetensors":
        refuse_file(path)
    header = read_header(path)
    if not any(name.startswith(UNET) for name in header.tensors):
        refuse_file(path)
    read = read_single_file(header, parts.overrides)
    _check_options(parts, read.family)
    found: dict[str, Part] = {}
    missing = []
    for network in read.family.networks:
        folder = network.folder
        config = read.configs[folder]
        if folder in parts.others:
            found[folder] = _brought(network, parts.others[folder], config)
        elif names := names_in(header.tensors, folder, read.family.folders):
            check_storage(header, names.values())
            found[folder] = FilePart(network, header, names, config)
        else:
            missing.append(folder)
    if missing:
        raise _lacking(path, missing)
    few, scheduler = _few_steps(parts, read.scheduler)
    documents = {
        INDEX_FILE: _index(read.index, read.family, read.family.folders, scheduler),
        SCHEDULER_FILE: scheduler,
    }
    folders = read.family.tokenizers.values()
    own = tuple(name for name in folders if _has_vocabulary(read.base / name))
    return Assembly(
        source=parts.model,
        family=read.family,
        base=read.base,
        parts=found,
        documents=documents,
        tokenizers={name: read.base / name for name in folders if name not in own},
        linked=own,
        names=(*few, *read.names),
        brought=tuple(parts.others),
        line=", ".join([read.line, *_brought_words(parts)]),
        hint=""
        if not read.published
        else "its sizes are not the published ones: --config FOLDER gives its own",
    )


def _of_folder(base: Path, parts: Parts) -> Assembly:
    overrides = parts.overrides
    for option, given in (("--family", overrides.family), ("--config", overrides.config)):
        if given:
            raise UsageError(f"{option} {_OF_FILES}")
    if not (base / INDEX_FILE).exists():
        refuse_folder(base)
    index = read_json(base / INDEX_FILE, limit=MAX_CONFIG_BYTES)
    family = pipeline_family(base, index)
    _check_options(parts, family)
    found: dict[str, Part] = {
        network.folder: FolderPart(network, base / network.folder)
        for network in family.networks
        if (base / network.folder).is_dir()
    }
    for folder, place in parts.others.items():
        found[folder] = _brought(family.network(folder), place, _config_beside(base, family, folder))
    documents: dict[str, Mapping[str, Any]] = {}
    few, scheduler = _few_steps(parts, own := scheduler_in(base, index))
    if overrides.prediction_type or overrides.zero_snr or scheduler != own:
        documents[SCHEDULER_FILE] = with_overrides(scheduler, overrides)
    if parts.others or documents:
        documents[INDEX_FILE] = _index(index, family, parts.others, documents.get(SCHEDULER_FILE))
    written = {name.partition("/")[0] for name in documents} | found.keys()
    linked = sorted(entry.name for entry in base.iterdir() if entry.name not in written)
    words = [*_variant_words(found), *_override_words(overrides), *_brought_words(parts)]
    line = ", ".join([f"{base.resolve().name} is a {index['_class_name']}", *words]) if words else ""
    names = (*few, *names_of(base, parts.model, (index,))) if few else None
    return Assembly(
        source=parts.model,
        family=family,
        base=base,
        parts=found,
        documents=documents,
        tokenizers={},
        linked=tuple(linked),
        names=names,
        brought=tuple(parts.others),
        line=line,
    )


def _few_steps(parts: Parts, scheduler: Mapping[str, Any]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """What a U-Net that is brought is called, and the scheduler as it wants it.

    A U-Net of SDXL Lightning comes without one: its name says how many steps it draws in, and its authors
    what the scheduler of the checkpoint must be for it. What the user says of the prediction counts more.
    """
    place = parts.others.get("unet")
    if place is None:
        return (), dict(scheduler)
    name = place.resolve().name if place.is_dir() else place.stem
    few = few_steps([name], {})
    wanted = dict(few.scheduler) if few else {}
    if parts.overrides.prediction_type:
        wanted.pop("prediction_type", None)
    return (name,), {**scheduler, **wanted}


def _variant_words(parts: Mapping[str, Part]) -> Iterator[str]:
    """About networks whose weights are there as a variant alone."""
    for folder, part in parts.items():
        if isinstance(part, FolderPart) and part.variant:
            yield f"{folder} has the variant {part.variant} alone"


def _override_words(overrides: Overrides) -> Iterator[str]:
    if overrides.prediction_type:
        yield f"predicts {overrides.prediction_type} (--prediction-type)"
    if overrides.zero_snr:
        yield "zero terminal SNR (--zero-snr)"


def _brought_words(parts: Parts) -> Iterator[str]:
    for folder, place in parts.others.items():
        yield f"{WORDS[folder]} of {place.resolve().name}"


def _brought(network: Network, place: Path, config: Mapping[str, Any]) -> Part:
    """A network from a file or folder of its own, or from that of a whole checkpoint.

    Raises:
        CheckpointError: It is not there.
    """
    folder, option = network.folder, OPTIONS[network.folder]
    if place.is_dir():
        inner = place if (place / "config.json").is_file() else place / folder
        if not (inner / "config.json").is_file():
            raise CheckpointError(f"{option} is {place}: neither it nor {folder}/ in it has a config.json")
        return FolderPart(network, inner)
    if not place.exists():
        raise CheckpointError(f"{option} is {place}: no such file or folder")
    if place.suffix != ".safetensors":
        refuse_file(place)
    header = read_header(place)
    names = names_in(header.tensors, folder, alone=True)
    if not names:
        raise CheckpointError(
            f"{option} is {place}, which holds no {WORDS[folder]} (under the names of LDM, diffusers or "
            "transformers)"
        )
    check_storage(header, names.values())
    return FilePart(network, header, names, config)


def _config_beside(base: Path, family: CheckpointFamily, folder: str) -> dict[str, Any]:
    """What a network from a file alone is built by: the checkpoint's own configuration of it.

    Raises:
        CheckpointError: The checkpoint has none, and there is no usual one.
    """
    usual = FOLDER / ("sdxl" if family.record.name == "sdxl" else "sd15") / folder
    own = base / folder / "config.json"
    return read_json(own if own.is_file() or folder != "vae" else usual / own.name, limit=MAX_CONFIG_BYTES)


def _check_options(parts: Parts, family: CheckpointFamily) -> None:
    for folder in parts.others:
        if folder not in family.folders:
            raise UsageError(
                f"{OPTIONS[folder]} is not for {parts.model}: a {family.record.title} model has none"
            )


def _lacking(path: Path, missing: Sequence[str]) -> CheckpointError:
    words = " and ".join(f"no {WORDS.get(folder, folder)}" for folder in missing)
    if not OPTIONS.keys() >= set(missing):
        return CheckpointError(f"{path} has {words}: give such a model as a folder in the diffusers format")
    options = " ".join(f"{OPTIONS[folder]} FILE|FOLDER" for folder in missing)
    return CheckpointError(f"{path} has {words}: bring what is missing with {options}")


def _index(
    index: Mapping[str, Any],
    family: CheckpointFamily,
    folders: Iterable[str],
    scheduler: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """``model_index.json`` that names the classes of what was put in the place of its own parts."""
    result = dict(index)
    for network in family.networks:
        if network.folder in folders:
            result[network.folder] = [network.library, network.kind]
            for beside, kinds in network.beside.items():
                result.setdefault(beside, [TRANSFORMERS, kinds[0]])
    if scheduler is not None:
        result["scheduler"] = [DIFFUSERS, scheduler["_class_name"]]
    return result


def _has_vocabulary(folder: Path) -> bool:
    return (folder / "vocab.json").is_file() or (folder / "tokenizer.json").is_file()


def _write_tokenizer(folder: Path, configured: Path) -> None:
    """CLIP's vocabulary with the padding that a configuration names."""
    tokenizer = open_tokenizer(configured, vocabulary=vocabulary_from_clip())
    tokens = {index: token for token, index in tokenizer.vocabulary.ids.items()}
    write_tokenizer_folder(folder, pad=tokens[tokenizer.ids["pad"]])


@contextlib.contextmanager
def _named(assembly: Assembly, folder: Path) -> Iterator[None]:
    """Inside, an error about the temporary folder is one about what the user named: the model, or a part."""
    try:
        yield
    except CheckpointError as error:
        text = str(error)
        for network in assembly.brought:
            # Not the beginning of another's name, as text_encoder is of text_encoder_2.
            inner = rf"{re.escape(str(folder / network))}(?!\w)"
            text = str(assembly.parts[network].place).join(re.split(inner, text))
        of_part = text != str(error)
        text = text.replace(str(folder), assembly.source)
        if isinstance(error, MisfitError) and assembly.hint and not of_part:
            text = f"{text}; {assembly.hint}"
        raise CheckpointError(text) from error
