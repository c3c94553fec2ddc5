"""Which files of a bundle may be loaded: this user exported them, or they were checked and tried before.

What is new is checked, and loaded in a process of its own first (`sdrt.runtime.admission.first_load`). A
record is of a component's files, all of them with their SHA-256, and of a backend; exported ones are good for
each. One that cannot be read or written, or that this user did not write, is no error: then the component is
tried again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from sdrt.kernels.cache import read_kept, short_name, write_kept
from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.bundle.manifest import FileEntry

KIND: Final = "accepted"  # of a cache's folder
EXPORTED: Final = "exported"  # in a backend's place: good for all of them
TOKENIZER: Final = "tokenizer"  # likewise
_MAX_BYTES: Final = 1 << 20
_KNOWN: set[str] = set()  # of this process, where nothing can be written


def admit(bundle: Bundle, components: Sequence[str], backend: str, *, verify: bool) -> None:
    """Refuse components that cannot be loaded safely on a backend of the CPU; remember those that can.

    Args:
        bundle: Opened.
        components: Their names.
        backend: Its name.
        verify: Whether all files were compared with the manifest.

    Raises:
        BundleError: A graph is none, or ends a process that loads it, or takes too long or too much memory.
        BackendError: The backend refuses it.
    """
    if bundle.embedded:
        return
    strangers = {}
    for name in components:
        part = bundle.component(name)
        model = part.model_entry
        found = model if verify else _as_found(bundle, model)
        files = [found if entry is model else entry for entry in part.files]
        if not accepted(files, backend):
            strangers[name] = files
    if strangers:
        from sdrt.runtime.admission.first_load import check_component, load_apart

        for name in strangers:
            check_component(bundle, bundle.component(name))
        load_apart(bundle, list(strangers), backend, verify=verify)
        for files in strangers.values():
            accept(files, backend)


def admit_tokenizers(bundle: Bundle) -> None:
    """Refuse tokenizers that are none, or that could take for ever; remember those that are.

    Raises:
        BundleError: It is so.
    """
    if bundle.embedded:
        return
    for facts in bundle.manifest.tokenizers:
        entry = _as_found(bundle, facts.file)
        if not accepted([entry], TOKENIZER):
            from sdrt.runtime.admission.tokenizer_check import check_tokenizer_file

            check_tokenizer_file(bundle.file(facts.file))
            accept([entry], TOKENIZER)


def admit_rewritten(bundle: Bundle, name: str, backend: str, model: FileEntry | None, content: bytes) -> None:
    """Refuse a graph for a GPU that cannot be loaded safely, as far as that can be seen; it is not tried.

    Args:
        bundle: Opened.
        name: The component's, whose weights the graph takes.
        backend: Its name.
        model: Of an engine that holds the graph; None for the component's own.
        content: Its bytes.

    Raises:
        BundleError: It is no graph that may be loaded.
    """
    if bundle.embedded and model is None:
        return
    import hashlib

    part = bundle.component(name)
    found = replace(model or part.model_entry, sha256=hashlib.sha256(content).hexdigest())
    files = [*part.files, found]
    if not accepted(files, backend):
        where = part.model if model is None else f"the {name} rewritten for {backend}"
        from sdrt.runtime.admission.first_load import check_graph

        check_graph(content, f"{where} of {bundle.path}", part)
        accept(files, backend)


def accepted(files: Sequence[FileEntry], backend: str) -> bool:
    """Whether files may be loaded on a backend as they are.

    Args:
        files: All that the engine library will read, with the SHA-256 that they were found to have.
        backend: Its name.
    """
    return any(_is_recorded(_key(files, name)) for name in (EXPORTED, backend))


def accept(files: Sequence[FileEntry], backend: str = EXPORTED) -> None:
    """Remember that files may be loaded; the arguments are those of `accepted`."""
    key = _key(files, backend)
    _KNOWN.add(key)
    write_kept(KIND, _name(key), key.encode())


def _is_recorded(key: str) -> bool:
    if key not in _KNOWN and read_kept(KIND, _name(key), _MAX_BYTES) == key.encode():
        _KNOWN.add(key)
    return key in _KNOWN


def _key(files: Sequence[FileEntry], backend: str) -> str:
    entries = sorted([entry.path, entry.size, entry.sha256] for entry in files)
    return json.dumps({"backend": backend, "files": entries})


def _name(key: str) -> str:
    return f"{short_name(key.encode())}.json"


def _as_found(bundle: Bundle, entry: FileEntry) -> FileEntry:
    """The entry with the SHA-256 that its file has, which need not be the one in the manifest."""
    if bundle.is_verified([entry]):
        return entry
    return replace(entry, sha256=bundle.sha256(entry))
