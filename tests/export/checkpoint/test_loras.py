"""``sd-export --lora``: the bundle of the checkpoint that PyTorch merged, and of a merge at run time."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.references.lora_files import (
    as_diffusers,
    as_kohya,
    checkpoint_map,
    fused_by_diffusers,
    layers,
    pairs,
    write,
)
from support.runs.pipeline_spies import assert_differ, assert_equal

from sdrt.export.cli.main import main
from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.bundle.weight_map import read_weight_map
from sdrt.runtime.lora.file import read_lora
from sdrt.runtime.lora.merge import merged_weights
from sdrt.runtime.lora.stored_weights import stored_weights
from sdrt.runtime.pipeline import Pipeline

CPU = "onnxruntime-cpu"
SIZES = ["--height", "16..32", "--width", "16..32", "--batch", "1..2", "--fp16-weights", "--quiet"]


@pytest.fixture(scope="module")
def files(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One for both networks and one for a few layers of the U-Net; products are exact in float32."""
    weights, folder = checkpoint_map(tiny_checkpoint), tmp_path_factory.mktemp("loras")
    wanted = {name: layers(weights, name) for name in ("unet", "text_encoder")}
    convolutions = {"unet": layers(weights, "unet", convolutions=True)[::3]}
    return [
        write(folder / "style.safetensors", as_kohya(pairs(weights, wanted))),
        write(folder / "more.safetensors", as_diffusers(pairs(weights, convolutions, 1))),
    ]


def by_diffusers(checkpoint: Path, folder: Path, files: list[tuple[Path, float]]) -> Path:
    """A checkpoint with LoRAs merged by diffusers and PEFT, in the order in which sdrt adds them."""
    order = sorted(files, key=lambda entry: hashlib.sha256(entry[0].read_bytes()).hexdigest())
    shutil.copytree(checkpoint, folder)
    for name, tensors in fused_by_diffusers(checkpoint, order).items():
        (file,) = (folder / name).glob("*.safetensors")
        write(file, tensors, format="pt")
    return folder


def test_a_bundle_with_loras(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path, files: list[Path]
) -> None:
    given = list(zip(files, (0.8, -0.5), strict=True))
    options = [word for file, weight in given for word in ("--lora", f"{file}={weight}")]
    assert main([str(tiny_checkpoint), str(tmp_path / "ours"), *SIZES, *options]) == 0
    merged = by_diffusers(tiny_checkpoint, tmp_path / "merged", given)
    assert main([str(merged), str(tmp_path / "theirs"), *SIZES]) == 0
    ours, theirs, plain = (
        Bundle.open(path) for path in (tmp_path / "ours", tmp_path / "theirs", tiny_bundle)
    )
    # All that is drawn from is the same, byte for byte; and it is not that of the checkpoint without LoRAs.
    assert ours.manifest.components == theirs.manifest.components != plain.manifest.components
    assert ours.manifest.provenance["loras"] == [
        {"name": file.stem, "weight": weight, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file, weight in given
    ]
    # What is merged into the plain bundle when it draws is the same, too.
    record, tensors = plain.manifest.record, read_weight_map(plain)
    loras = [(read_lora(file, tensors, record), weight) for file, weight in given]
    for component, weights in merged_weights(plain, loras).items():
        for name, numbers in weights.items():
            found, _ = stored_weights(ours).numbers(ours, component, name.removesuffix(".fp16"))
            assert np.array_equal(found, numbers)
    # And so are the pictures.
    named = {str(file): weight for file, weight in given}
    with Pipeline.load(ours, backend=CPU) as exported, Pipeline.load(plain, backend=CPU) as loaded:
        wanted = exported("a cat", seed=1, num_inference_steps=3)
        for _ in range(2):
            assert_equal(loaded("a cat", seed=1, num_inference_steps=3, loras=named), wanted)
            assert_differ(loaded("a cat", seed=1, num_inference_steps=3).latents, wanted.latents)


def test_what_does_not_fit(
    tiny_checkpoint: Path, tmp_path: Path, files: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = write(tmp_path / "wrong.safetensors", {"lora_unet_x.diff": np.ones(4, np.float32)})
    for options, message in (
        (["--lora", str(wrong)], "'lora_unet_x.diff' has no place in this model"),
        (["--lora", f"{files[0]}=1e9"], "-100 to 100 are allowed"),
        (["--lora", f"{files[0]}=x"], "'x' is no number"),
        (["--lora", str(files[0]), "--lora", str(files[0])], "is given twice"),
        (["--lora-partial"], "--lora-partial is for --lora FILE"),
    ):
        try:
            status = main([str(tiny_checkpoint), str(tmp_path / "out"), *SIZES, *options])
        except SystemExit as end:  # argparse's own
            status = int(end.code or 0)
        assert status == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
