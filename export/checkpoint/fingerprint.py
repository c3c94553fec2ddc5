"""What a bundle's provenance knows a checkpoint by."""

from __future__ import annotations

import hashlib
from pathlib import Path

from sdrt.export.checkpoint.checkpoint import Checkpoint
from sdrt.export.checkpoint.files import IMAGE_PROCESSOR, described_files
from sdrt.export.checkpoint.random_weights import SCHEME
from sdrt.runtime.system.untrusted import open_regular


def fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 over the names and contents of the files that an export reads, in hex.

    Random weights are known by their seed and the scheme that makes them.
    """
    digest = hashlib.sha256()
    if checkpoint.random_seed is not None:
        digest.update(f"random weights, scheme {SCHEME}, seed {checkpoint.random_seed}\0".encode())
    images = () if checkpoint.image_processor is None else (Path(IMAGE_PROCESSOR).parent.name,)
    noising = (checkpoint.kind.noising,) if checkpoint.kind.noising else ()
    others = (*checkpoint.kind.tokenizers.values(), *images, *noising, "scheduler")
    for folder in (*checkpoint.configs, *others):
        for file in described_files(checkpoint.path / folder, weights=checkpoint.random_seed is None):
            digest.update(f"{folder}/{file.name}\0".encode())
            with open_regular(file) as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
