"""Checkpoints from parts: single files, networks of their own, variants, and what is edited on the way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints.ldm_names import (
    CLIP,
    OPEN_CLIP,
    REFINER,
    SD1,
    SD2,
    SDXL,
    VAE,
    single_file_tensors,
    write_single_file,
)
from support.checkpoints.published import write_published_checkpoint
from support.made_once import made_once

from sdrt.export.checkpoint import part as parts
from sdrt.export.checkpoint.assembly import Assembly, Parts, assembly_of
from sdrt.export.checkpoint.checkpoint import Checkpoint
from sdrt.export.checkpoint.overrides import Overrides
from sdrt.export.checkpoint.reader import open_checkpoint
from sdrt.export.checkpoint.weights import check_architectures, load_module
from sdrt.runtime.errors import CheckpointError, UsageError

State = dict[str, torch.Tensor]
READ = ("family", "pipeline", "configs", "schedule", "sampler", "sampler_options", "tokenizers")


def assembled(model: Path, config: Path | None = None, **others: Path) -> Assembly:
    return assembly_of(Parts(str(model), others=others, overrides=Overrides(config=config)))


@contextmanager
def opened(model: Path, out: Path, config: Path | None = None, **others: Path) -> Iterator[Checkpoint]:
    with assembled(model, config, **others).opened(out) as checkpoint:
        yield checkpoint


def state_of(folder: Path) -> State:
    """What the files of one network hold; a text encoder's names as older transformers save them."""
    state: State = {}
    for file in folder.glob("*.safetensors"):
        state |= load_file(file)
    if folder.name.startswith("text_encoder"):
        state = {key if key.startswith("text_") else f"text_model.{key}": it for key, it in state.items()}
    return state


def assert_equal(given: State, wanted: State) -> None:
    assert given.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert given[key].dtype == tensor.dtype, key
        assert torch.equal(given[key], tensor), key


@pytest.fixture(scope="session")
def sd2_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion 2.1's files, shrunk; read only."""

    def make(folder: Path) -> None:
        write_published_checkpoint(folder, "sd-2.1-768")

    return made_once(
        "sd2-checkpoint", tmp_path_factory.mktemp("sd2") / "tiny", make, write_published_checkpoint
    )


LAST = {  # the layer that Stable Diffusion 2 leaves out, and its projection
    f"{OPEN_CLIP}transformer.resblocks.2.ln_1.weight": torch.ones(32),
    f"{OPEN_CLIP}text_projection": torch.ones(32, 16),
}
EMA = {f"model_ema.diffusion_modelinput_blocks{index}": torch.zeros(2) for index in range(200)}
# The fixture of a checkpoint, where its networks lie in a file, open_clip's, tensors beside.
KINDS: dict[str, tuple[str, dict[str, str], tuple[str, ...], State]] = {
    "1.x": ("tiny_checkpoint", SD1, (), {}),
    "1.x with EMA copies": ("tiny_checkpoint", SD1, (), EMA),
    "1.x with positions": (
        "tiny_checkpoint", SD1, (), {f"{CLIP}text_model.embeddings.position_ids": torch.arange(77)[None]}
    ),
    "1.x of old names": ("tiny_checkpoint", {**SD1, "vae": "vae."}, (), {}),
    "inpainting": ("inpainting_checkpoint", SD1, (), {}),
    "LCM": ("lcm_checkpoint", SD1, (), {}),
    "pix2pix": ("pix2pix_checkpoint", SD1, (), {}),
    "2.x": ("sd2_checkpoint", SD2, ("text_encoder",), LAST),
    "SDXL": ("sdxl_checkpoint", SDXL, ("text_encoder_2",), {}),
    "refiner": ("refiner_checkpoint", REFINER, ("text_encoder_2",), {}),
    "SDXL, both of open_clip": (
        "sdxl_checkpoint",
        {**SDXL, "text_encoder": "conditioner.embedders.0.model."},
        ("text_encoder", "text_encoder_2"),
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_file_is_the_folder_that_it_was_made_from(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    fixture, prefixes, open_clip, beside = KINDS[kind]
    folder: Path = request.getfixturevalue(fixture)
    file = write_single_file(tmp_path / "model.safetensors", folder, prefixes, open_clip, beside)
    wanted = open_checkpoint(str(folder))
    with opened(file, tmp_path / "out", config=folder) as checkpoint:
        for name in READ:
            assert getattr(checkpoint, name) == getattr(wanted, name), name
        for network in wanted.kind.folders:
            assert_equal(state_of(checkpoint.path / network), state_of(folder / network))
        check_architectures(checkpoint)
    assert {entry.name for entry in tmp_path.iterdir()} == {file.name}


def cast(dtype: torch.dtype) -> Callable[[State], State]:
    return lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()}


def without_text_model(tensors: State) -> State:
    """As the oldest files of Stable Diffusion 1.x have them."""
    return {name.replace(f"{CLIP}text_model.", CLIP): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("change", "stored"),
    [
        (cast(torch.float32), torch.float32),
        (cast(torch.bfloat16), torch.bfloat16),
        (cast(torch.float8_e4m3fn), torch.float16),
        (cast(torch.float8_e5m2), torch.float16),
        (without_text_model, torch.float16),
    ],
)
def test_numbers_stay_as_they_are_stored(
    change: Callable[[State], State], stored: torch.dtype, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    file = tmp_path / "model.safetensors"
    tensors = change(single_file_tensors(tiny_checkpoint, SD1))
    save_file(tensors, file)
    with opened(file, tmp_path / "out", config=tiny_checkpoint) as checkpoint:
        unet = state_of(checkpoint.path / "unet")
        assert {tensor.dtype for tensor in unet.values()} == {stored}
        first = tensors["model.diffusion_model.input_blocks.0.0.weight"]
        assert torch.equal(unet["conv_in.weight"].float(), first.float())
        load_module(checkpoint, "text_encoder")


def test_a_file_without_some_networks_says_which_and_gets_them(sdxl_checkpoint: Path, tmp_path: Path) -> None:
    parts = {name: SDXL[name] for name in ("unet", "text_encoder")}
    file = write_single_file(tmp_path / "model.safetensors", sdxl_checkpoint, parts)
    words = "has no second text encoder and no VAE: bring what is missing with --text-encoder-2 .* --vae FILE"
    with pytest.raises(CheckpointError, match=words):
        assembled(file, sdxl_checkpoint)
    second = write_single_file(
        tmp_path / "g.safetensors", sdxl_checkpoint, {"text_encoder_2": ""}, ("text_encoder_2",)
    )
    given = {"vae": sdxl_checkpoint, "text_encoder_2": second}
    with opened(file, tmp_path / "out", config=sdxl_checkpoint, **given) as checkpoint:
        for name in ("vae", "text_encoder_2"):
            assert_equal(state_of(checkpoint.path / name), state_of(sdxl_checkpoint / name))


@pytest.fixture
def other_vae(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A folder with a VAE of other weights and another scaling factor."""
    folder = Path(shutil.copytree(tiny_checkpoint / "vae", tmp_path / "better"))
    (file,) = folder.glob("*.safetensors")
    save_file({key: tensor * 2 for key, tensor in load_file(file).items()}, file)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.25}))
    return folder


@pytest.mark.parametrize("form", ["folder", "pipeline", "diffusers", "ldm", "ldm alone", "whole"])
@pytest.mark.parametrize("model", ["folder", "file"])
def test_a_vae_is_replaced(
    form: str, model: str, other_vae: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    pipeline = Path(shutil.copytree(tiny_checkpoint, tmp_path / "pipeline"))
    shutil.rmtree(pipeline / "vae")
    shutil.copytree(other_vae, pipeline / "vae")
    (weights,) = other_vae.glob("*.safetensors")
    place = tmp_path / "vae.safetensors"
    if form == "whole":
        write_single_file(place, pipeline)
    elif form.startswith("ldm"):
        write_single_file(place, pipeline, {"vae": "" if "alone" in form else VAE})
    given = {"folder": other_vae, "pipeline": pipeline, "diffusers": weights}.get(form, place)
    base, config = tiny_checkpoint, None
    if model == "file":
        base, config = write_single_file(tmp_path / "model.safetensors", tiny_checkpoint), tiny_checkpoint
    with opened(base, tmp_path / "out", config=config, vae=given) as checkpoint:
        assert_equal(state_of(checkpoint.path / "vae"), state_of(other_vae))
        assert_equal(state_of(checkpoint.path / "unet"), state_of(tiny_checkpoint / "unet"))
        # Of a file alone nothing says the factor: the model's own stands.
        expected = 0.25 if given.is_dir() else 0.5
        assert checkpoint.read_as.endswith(f"VAE of {given.name}")
        assert checkpoint.decoded.factor == expected


def test_a_text_encoder_is_brought_by_a_file(tiny_checkpoint: Path, tmp_path: Path) -> None:
    file = write_single_file(tmp_path / "clip_l.safetensors", tiny_checkpoint, {"text_encoder": ""})
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "folder"))
    (folder / "text_encoder" / "model.safetensors").unlink()
    with opened(folder, tmp_path / "out", text_encoder=file) as checkpoint:
        assert_equal(state_of(checkpoint.path / "text_encoder"), state_of(tiny_checkpoint / "text_encoder"))


def test_what_does_not_go_together_is_refused(
    tiny_checkpoint: Path, variations_checkpoint: Path, tmp_path: Path
) -> None:
    file = write_single_file(tmp_path / "model.safetensors", tiny_checkpoint)
    unet = write_single_file(tmp_path / "u.safetensors", tiny_checkpoint, {"unet": ""})
    for others, words in (
        ({"text_encoder_2": file}, r"--text-encoder-2 is not for .* has none"),
        ({"vae": tmp_path / "x"}, r"--vae is .*x: no such file or folder"),
        ({"vae": tmp_path}, r"neither it nor vae/ in it has a config.json"),
        ({"vae": unet}, "holds no VAE"),
        ({"vae": Path(os.devnull)}, "is a device: a regular file is wanted"),
    ):
        with pytest.raises((CheckpointError, UsageError), match=words):
            assembled(tiny_checkpoint, **others)
    for overrides, words in (
        (Overrides(family="sd15"), "--family is for single files"),
        (Overrides(config=tiny_checkpoint), "--config is for single files"),
    ):
        with pytest.raises(UsageError, match=words):
            assembly_of(Parts(str(tiny_checkpoint), overrides=overrides))
    with pytest.raises(UsageError, match=r"--config is .*: a diffusers folder is wanted"):
        assembled(file, tmp_path)
    with pytest.raises(CheckpointError, match="has no image_encoder: give such a model as a folder"):
        assembled(file, variations_checkpoint)


def test_weights_of_other_sizes_say_how_to_give_a_configuration(
    tiny_checkpoint: Path, lcm_checkpoint: Path, tmp_path: Path
) -> None:
    file = write_single_file(tmp_path / "model.safetensors", tiny_checkpoint)
    assembly = replace(assembled(file, lcm_checkpoint), hint="--config FOLDER gives its own")
    words = rf"^{file}/unet: the tensor \S+ is missing .*; --config FOLDER gives its own"
    with (
        pytest.raises(CheckpointError, match=words),
        assembly.opened(tmp_path / "out") as checkpoint,
    ):
        check_architectures(checkpoint)
    with pytest.raises(CheckpointError, match=r"takes 4 channels and reads 16 features .*--config FOLDER"):
        assembled(file)


@pytest.mark.parametrize("form", ["file", "folder"])
def test_an_error_names_the_part_that_was_brought(form: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Not MODEL, whose own networks are whole; nor is another configuration of that the remedy."""
    file = write_single_file(tmp_path / "model.safetensors", tiny_checkpoint)
    given = Path(shutil.copytree(tiny_checkpoint / "vae", tmp_path / "better"))
    (weights,) = given.glob("*.safetensors")
    state = load_file(weights)
    save_file({**state, "decoder.conv_in.weight": torch.zeros(16, 16, 3, 3)}, weights)
    given = weights if form == "file" else given
    assembly = replace(assembled(file, tiny_checkpoint, vae=given), hint="--config FOLDER gives its own")
    words = rf"^{given}: decoder\.conv_in\.weight has the shape \[16, 16, 3, 3\], by config.json .* in all\)$"
    with pytest.raises(CheckpointError, match=words), assembly.opened(tmp_path / "out") as checkpoint:
        check_architectures(checkpoint)


def test_the_prediction_of_a_folder_can_be_overruled(tiny_checkpoint: Path, tmp_path: Path) -> None:
    overrides = Overrides(prediction_type="v_prediction", zero_snr=True)
    assembly = assembly_of(Parts(str(tiny_checkpoint), overrides=overrides))
    words = "is a StableDiffusionPipeline, predicts v_prediction (--prediction-type), zero terminal SNR (--z"
    assert words in assembly.line
    with assembly.opened(tmp_path / "out") as checkpoint:
        schedule = checkpoint.schedule
        assert (schedule.prediction_type, schedule.rescale_betas_zero_snr) == ("v_prediction", True)
        assert (schedule.timestep_spacing, checkpoint.sampler) == ("trailing", "ddim")


@pytest.mark.parametrize("model", ["folder", "file"])
def test_networks_are_edited_tensor_by_tensor(model: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    base, config = tiny_checkpoint, None
    if model == "file":
        base, config = write_single_file(tmp_path / "model.safetensors", tiny_checkpoint), tiny_checkpoint
    assembly, seen = assembled(base, config), []

    def merged(name: str, tensor: torch.Tensor) -> torch.Tensor:
        seen.append(name)
        return tensor.float() + 0.1 if name == "conv_in.weight" else tensor

    with assembly.opened(tmp_path / "out", {"unet": merged}) as checkpoint:
        given, wanted = state_of(checkpoint.path / "unet"), state_of(tiny_checkpoint / "unet")
        assert sorted(seen) == sorted(assembly.tensors("unet")) == sorted(given)
        wanted["conv_in.weight"] = wanted["conv_in.weight"].float() + 0.1
        assert_equal(given, wanted)
        assert_equal(state_of(checkpoint.path / "vae"), state_of(tiny_checkpoint / "vae"))
        assert torch.equal(
            load_module(checkpoint, "unet").state_dict()["conv_in.weight"], wanted["conv_in.weight"]
        )
    with (
        pytest.raises(CheckpointError, match=r"became \[2\], it is"),
        assembly.opened(tmp_path / "out", {"unet": lambda _name, _tensor: torch.zeros(2)}),
    ):
        pass
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".sdrt")]


def test_large_networks_are_written_in_shards(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "SHARD_BYTES", 1 << 15)
    file = write_single_file(tmp_path / "model.safetensors", tiny_checkpoint)
    with opened(file, tmp_path / "out", config=tiny_checkpoint) as checkpoint:
        assert len(list((checkpoint.path / "unet").glob("*-of-*.safetensors"))) > 2
        loaded = load_module(checkpoint, "unet").state_dict()
    wanted = load_module(open_checkpoint(str(tiny_checkpoint)), "unet").state_dict()
    assert_equal(loaded, wanted)


FULL = """
import resource, sys
from pathlib import Path
from sdrt.export.checkpoint.assembly import Overrides, Parts, assembly_of
file, config, out = map(Path, sys.argv[1:])
assembly = assembly_of(Parts(str(file), overrides=Overrides(config=config)))
resource.setrlimit(resource.RLIMIT_FSIZE, (32_768, resource.RLIM_INFINITY))
assembly.opened(out).__enter__()
"""


def test_a_full_disk_is_said_of_the_place(tiny_checkpoint: Path, tmp_path: Path) -> None:
    file, out = write_single_file(tmp_path / "model.safetensors", tiny_checkpoint), tmp_path / "out"
    command = [sys.executable, "-c", FULL, str(file), str(tiny_checkpoint), str(out)]
    errors = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stderr
    assert errors.splitlines()[-1] == f"sdrt.runtime.errors.OutputError: cannot write {out}: File too large"
    assert [entry.name for entry in tmp_path.iterdir()] == [file.name]


def test_what_a_killed_run_left_is_removed(tiny_checkpoint: Path, tmp_path: Path) -> None:
    left = tmp_path / ".sdrt-out.part-0123456789abcdef"
    (left / "unet").mkdir(parents=True)
    file = write_single_file(tmp_path / "model.safetensors", tiny_checkpoint)
    with opened(file, tmp_path / "out", config=tiny_checkpoint) as checkpoint:
        assert not left.exists()
        assert checkpoint.path.parent == tmp_path
    assert [entry.name for entry in tmp_path.iterdir()] == [file.name]


NAME = "diffusion_pytorch_model"


@pytest.mark.parametrize("sharded", [False, True])
def test_a_folder_with_variants_alone_is_read(sharded: bool, checkpoint_copy: Path, tmp_path: Path) -> None:
    """As `save_pretrained(..., variant="fp16")` leaves it."""
    from diffusers import UNet2DConditionModel

    wanted = load_module(open_checkpoint(str(checkpoint_copy)), "unet").state_dict()
    unet = UNet2DConditionModel.from_pretrained(checkpoint_copy / "unet", torch_dtype=torch.float16)
    (checkpoint_copy / "unet" / f"{NAME}.safetensors").unlink()
    size = "60KB" if sharded else "10GB"
    unet.save_pretrained(checkpoint_copy / "unet", variant="fp16", max_shard_size=size)
    text = checkpoint_copy / "text_encoder"
    (text / "model.safetensors").rename(text / "model.fp16.safetensors")
    assembly = assembled(checkpoint_copy)
    assert "text_encoder has the variant fp16 alone, unet has the variant fp16 alone" in assembly.line
    assert len(assembly.tensors("unet")) == len(wanted)
    with assembly.opened(tmp_path / "out") as checkpoint:
        assert_equal(load_module(checkpoint, "unet").state_dict(), wanted)
        load_module(checkpoint, "text_encoder")
    with assembly.opened(tmp_path / "out", {"unet": lambda _name, tensor: tensor * 2}) as checkpoint:
        doubled = load_module(checkpoint, "unet").state_dict()["conv_in.weight"]
        assert torch.equal(doubled, wanted["conv_in.weight"] * 2)


def as_hub_cache(checkpoint: Path, folder: Path) -> Path:
    """The cache of the hub: files by their hashes in ``blobs/``, and links to them in a snapshot."""
    snapshot = folder / "models--owner--name" / "snapshots" / "0123"
    blobs, refs = snapshot.parents[1] / "blobs", snapshot.parents[1] / "refs"
    for place in (blobs, refs):
        place.mkdir(parents=True)
    (refs / "main").write_text("0123")
    for number, file in enumerate(sorted(entry for entry in checkpoint.rglob("*") if entry.is_file())):
        blob = Path(shutil.copy(file, blobs / f"{number:040}"))
        link = snapshot / file.relative_to(checkpoint)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot.parents[1]


@pytest.mark.parametrize("parts", [False, True])
def test_a_cache_of_the_hub_with_links_is_read(
    parts: bool, tiny_checkpoint: Path, other_vae: Path, tmp_path: Path
) -> None:
    cache = as_hub_cache(tiny_checkpoint, tmp_path / "hub")
    vae = other_vae if parts else tiny_checkpoint / "vae"
    with opened(cache, tmp_path / "out", **({"vae": vae} if parts else {})) as checkpoint:
        for name in checkpoint.kind.folders:
            given = vae if name == "vae" else tiny_checkpoint / name
            assert_equal(state_of(checkpoint.path / name), state_of(given))
        check_architectures(checkpoint)
        load_module(checkpoint, "unet")


def test_words_of_a_saved_textual_inversion_go_along(checkpoint_copy: Path) -> None:
    """As `load_textual_inversion` and `save_pretrained` leave them: an id and a row of embeddings more."""
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(checkpoint_copy / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(checkpoint_copy / "text_encoder")
    tokenizer.add_tokens(["<cat-toy>"])
    encoder.resize_token_embeddings(len(tokenizer))
    for part, folder in ((tokenizer, "tokenizer"), (encoder, "text_encoder")):
        shutil.rmtree(checkpoint_copy / folder)
        part.save_pretrained(checkpoint_copy / folder)
    checkpoint = open_checkpoint(str(checkpoint_copy))
    assert checkpoint.tokenizer.vocabulary.added == ("<cat-toy>",)
    assert checkpoint.configs["text_encoder"]["vocab_size"] == len(tokenizer)
    check_architectures(checkpoint)


def test_a_folder_as_it_is_needs_no_copy(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with opened(tiny_checkpoint, tmp_path / "out") as checkpoint:
        assert checkpoint.path == tiny_checkpoint
        assert checkpoint.read_as == ""
