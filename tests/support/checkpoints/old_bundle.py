"""A bundle as format version 2 had it: one chunk, no embeddings of one's own, no layers to leave out."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx

WAS_NOT = ("custom_embeddings", "clip_skip")


def make_old(bundle: Path, folder: Path) -> Path:
    """Copy a bundle of the family sd and take out what format version 3 brought."""
    shutil.copytree(bundle, folder)
    file = folder / "manifest.json"
    document = json.loads(file.read_text(encoding="utf-8"))
    encoder, unet = (document["components"][name] for name in ("text_encoder", "unet"))
    tokens = document["tokenizer"]["max_length"]
    _without_inputs(folder / encoder["model"], tokens, encoder["inputs"])
    for entry in encoder["files"]:
        data = (folder / entry["path"]).read_bytes()
        entry.update(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    encoder["inputs"] = [entry for entry in encoder["inputs"] if entry["name"] not in WAS_NOT]
    for entry in unet["inputs"]:
        entry["shape"] = [tokens if axis == "context" else axis for axis in entry["shape"]]
    for limit in ("max_chunks", "max_clip_skip"):
        del document["limits"][limit]
    document.pop("preview", None)
    document["format_version"] = 2
    file.write_text(json.dumps(document), encoding="utf-8")
    return folder


def _without_inputs(model: Path, tokens: int, inputs: list[dict[str, Any]]) -> None:
    """Let a text encoder's later inputs be constants."""
    graph = onnx.load(model, load_external_data=False)
    for entry in inputs:
        if entry["name"] in WAS_NOT:
            shape = [1 if axis == "batch" else axis for axis in entry["shape"]]
            constant = onnx.numpy_helper.from_array(np.zeros(shape, entry["dtype"]), entry["name"])
            graph.graph.initializer.append(constant)
    kept = [value for value in graph.graph.input if value.name not in WAS_NOT]
    del graph.graph.input[:]
    graph.graph.input.extend(kept)
    onnx.save(graph, model)
