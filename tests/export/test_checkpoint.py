"""Checkpoints: what is refused, with which words, and how a scheduler's configuration is read."""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import tolerances
from sdrt.export import cli
from sdrt.export.checkpoint import SUBFOLDERS, open_checkpoint
from sdrt.export.checkpoint_scheduler import schedule_from_config
from sdrt.export.weights import check_architectures, load_module, release_weights
from sdrt.runtime.errors import CheckpointError, UsageError
from sdrt.runtime.solvers import make_table

Break = Callable[[Path], None]
Tensors = dict[str, torch.Tensor]

WEIGHTS = {
    "text_encoder": "text_encoder/model.safetensors",
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
}


def open_and_load(folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder))
    for name in SUBFOLDERS:
        load_module(checkpoint, name)


def message_of(folder: Path | str) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_and_load(Path(folder))
    message = str(caught.value)
    assert "\n" not in message
    return message


def remove(path: str) -> Break:
    def apply(folder: Path) -> None:
        target = folder / path
        if target.is_file():
            target.unlink()
        else:
            for file in target.iterdir():
                file.unlink()
            target.rmdir()

    return apply


def write(path: str, data: bytes) -> Break:
    def apply(folder: Path) -> None:
        (folder / path).write_bytes(data)

    return apply


def cut(path: str, share: float) -> Break:
    def apply(folder: Path) -> None:
        data = (folder / path).read_bytes()
        (folder / path).write_bytes(data[: int(len(data) * share)])

    return apply


def configure(path: str, **changes: Any) -> Break:
    """Set keys of a JSON file; None removes one."""

    def apply(folder: Path) -> None:
        document = json.loads((folder / path).read_text()) | changes
        kept = {key: value for key, value in document.items() if value is not None}
        (folder / path).write_text(json.dumps(kept))

    return apply


def null(path: str, key: str) -> Break:
    def apply(folder: Path) -> None:
        document = json.loads((folder / path).read_text())
        (folder / path).write_text(json.dumps(document | {key: None}))

    return apply


def change_tensors(component: str, change: Callable[[Tensors], None]) -> Break:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS[component])
        change(tensors)
        save_file(tensors, folder / WEIGHTS[component], metadata={"format": "pt"})

    return apply


def shorten_a_matrix(tensors: Tensors) -> None:
    name = next(name for name in sorted(tensors) if tensors[name].ndim == 2)
    tensors[name] = tensors[name][:-1].contiguous()


def drop_one(tensors: Tensors) -> None:
    del tensors[sorted(tensors)[3]]


def add_one(tensors: Tensors) -> None:
    tensors["text_model.encoder.layers.7.extra.weight"] = torch.zeros(2)


def spoil(value: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[sorted(tensors)[3]].view(-1)[0] = value

    return change


UNET_CONFIG, TEXT_CONFIG, VAE_CONFIG = (f"{name}/config.json" for name in ("unet", "text_encoder", "vae"))
SCHEDULER = "scheduler/scheduler_config.json"

BAD: dict[str, tuple[Break, tuple[str, ...]]] = {
    "no model_index": (remove("model_index.json"), ("model_index.json is missing",)),
    "index cut": (cut("model_index.json", 0.5), ("model_index.json cannot be read",)),
    "index a list": (write("model_index.json", b"[1]"), ("model_index.json", "JSON object")),
    "index not text": (write("model_index.json", b"\xff\xfe\x00"), ("model_index.json cannot be read",)),
    "no unet": (remove("unet"), ("no folder unet/",)),
    "no vae": (remove("vae"), ("no folder vae/",)),
    "no text encoder": (remove("text_encoder"), ("no folder text_encoder/",)),
    "no tokenizer": (remove("tokenizer"), ("no folder tokenizer/",)),
    "no scheduler": (remove("scheduler"), ("scheduler_config.json is missing",)),
    "no unet config": (remove(UNET_CONFIG), ("unet/config.json is missing",)),
    "no vae config": (remove(VAE_CONFIG), ("vae/config.json is missing",)),
    "no text config": (remove(TEXT_CONFIG), ("text_encoder/config.json is missing",)),
    "config cut": (cut(UNET_CONFIG, 0.9), ("unet/config.json cannot be read",)),
    "config without a key": (configure(TEXT_CONFIG, hidden_size=None), ("hidden_size is missing",)),
    "config of wrong type": (
        configure(UNET_CONFIG, sample_size="big"),
        ("sample_size is 'big'", "whole number"),
    ),
    "config with a zero": (
        configure(VAE_CONFIG, block_out_channels=[8, 0]),
        ("block_out_channels is [8, 0]",),
    ),
    "no unet weights": (remove(WEIGHTS["unet"]), ("unet has no diffusion_pytorch_model.safetensors",)),
    "no text weights": (remove(WEIGHTS["text_encoder"]), ("text_encoder has no model.safetensors",)),
    "no vae weights": (remove(WEIGHTS["vae"]), ("vae has no diffusion_pytorch_model.safetensors",)),
    "text weights cut": (cut(WEIGHTS["text_encoder"], 0.5), ("model.safetensors is truncated",)),
    "unet weights cut": (cut(WEIGHTS["unet"], 0.99), ("diffusion_pytorch_model.safetensors is truncated",)),
    "vae weights empty": (cut(WEIGHTS["vae"], 0), ("diffusion_pytorch_model.safetensors is truncated",)),
    "weights not safetensors": (write(WEIGHTS["unet"], b"PK\x03\x04" * 99), ("truncated or damaged",)),
    "9 channels": (configure(UNET_CONFIG, in_channels=9), ("takes 9", "only plain text-to-image")),
    "widths": (configure(UNET_CONFIG, cross_attention_dim=24), ("gives 16 features", "takes 24")),
    "SDXL": (configure("model_index.json", text_encoder_2=["a", "b"]), ("no folder text_encoder_2/",)),
    "transformer": (configure("model_index.json", transformer=["a", "b"]), ("transformer", "not supported")),
    "layers that the configuration forgets": (
        configure(TEXT_CONFIG, num_hidden_layers=1),
        ("text_encoder: the tensor ", "layers.1.", "has no place in the network"),
    ),
    "scaling factor null": (null(VAE_CONFIG, "scaling_factor"), ("scaling_factor is None", "above 0")),
    "scaling factor 0": (configure(VAE_CONFIG, scaling_factor=0), ("scaling_factor is 0", "above 0")),
    "scaling factor NaN": (configure(VAE_CONFIG, scaling_factor=float("nan")), ("scaling_factor is nan",)),
    "shift factor": (
        configure(VAE_CONFIG, shift_factor="x"),
        ("shift_factor is 'x'", "finite number or null"),
    ),
    "vocabulary": (configure(TEXT_CONFIG, vocab_size=600), ("ids up to 713", "embeds 600")),
    "zero SNR": (configure(SCHEDULER, rescale_betas_zero_snr=True), ("scheduler", "rescale_betas_zero_snr")),
    "thresholding": (configure(SCHEDULER, thresholding=True), ("scheduler", "thresholding is set")),
    "prediction": (configure(SCHEDULER, prediction_type="flow"), ("'flow'", "epsilon, v_prediction")),
    "beta schedule": (configure(SCHEDULER, beta_schedule="wavy"), ("'wavy'", "scaled_linear")),
    "beta": (configure(SCHEDULER, beta_end="0.012"), ("beta_end is '0.012'",)),
    **{
        f"{component} {what}": (change_tensors(component, change), (f"/{component}: ", *words))
        for component in SUBFOLDERS
        for what, change, words in (
            ("wrong shape", shorten_a_matrix, ("has the shape [", "by config.json it is [")),
            ("tensor too many", add_one, ("the tensor ", "has no place in the network")),
            ("tensor missing", drop_one, ("the tensor ", " is missing")),
            ("NaN", spoil(float("nan")), ("the tensor ", "holds NaN or infinity")),
            ("infinity", spoil(float("inf")), ("the tensor ", "holds NaN or infinity")),
        )
    },
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_checkpoint_is_refused_in_one_line_that_says_what_is_wrong(
    checkpoint_copy: Path, what: str
) -> None:
    damage, words = BAD[what]
    damage(checkpoint_copy)
    message = message_of(checkpoint_copy)
    assert str(checkpoint_copy) in message or "U-Net" in message or "tokenizer" in message
    for word in words:
        assert word in message


# What only a network's constructor finds, with what the library's own text does not say.
SENSELESS: dict[str, tuple[Break, tuple[str, ...]]] = {
    "zero heads": (configure(UNET_CONFIG, attention_head_dim=0), ("unet", "ZeroDivisionError")),
    "zero groups": (configure(UNET_CONFIG, norm_num_groups=0), ("unet", "ZeroDivisionError")),
    "zero groups of the VAE": (configure(VAE_CONFIG, norm_num_groups=0), ("vae", "ZeroDivisionError")),
    "activation": (configure(TEXT_CONFIG, hidden_act="foo"), ("text_encoder", "KeyError", "foo")),
    "activation null": (null(TEXT_CONFIG, "hidden_act"), ("text_encoder", "hidden_act")),
    "layers": (configure(TEXT_CONFIG, num_hidden_layers="x"), ("text_encoder", "num_hidden_layers")),
    "blocks": (configure(UNET_CONFIG, down_block_types=["A", "B"]), ("unet", "A does not exist")),
}


@pytest.mark.parametrize("what", SENSELESS)
@pytest.mark.parametrize("early", [True, False])
def test_a_configuration_that_is_no_network_is_refused(checkpoint_copy: Path, what: str, early: bool) -> None:
    damage, words = SENSELESS[what]
    damage(checkpoint_copy)
    if early:
        with pytest.raises(CheckpointError) as caught:
            check_architectures(open_checkpoint(str(checkpoint_copy)))
        message = str(caught.value)
        assert "describes no network" in message
    else:
        message = message_of(checkpoint_copy)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_tensors_that_real_text_encoders_have_beside_the_network_are_no_fault(checkpoint_copy: Path) -> None:
    """Stable Diffusion's own file has the positions; a whole CLIP model saved there has the others."""

    def change(tensors: Tensors) -> None:
        prefix = "text_model." if any(key.startswith("text_model.") for key in tensors) else ""
        tensors[f"{prefix}embeddings.position_ids"] = torch.arange(77)[None]
        tensors["text_projection.weight"] = torch.eye(16)
        tensors["logit_scale"] = torch.tensor(1.0)
        tensors["vision_model.post_layernorm.weight"] = torch.ones(16)
        tensors["visual_projection.weight"] = torch.eye(16)

    change_tensors("text_encoder", change)(checkpoint_copy)
    open_and_load(checkpoint_copy)


def test_a_vae_with_the_older_names_of_its_attention_is_accepted(checkpoint_copy: Path) -> None:
    """Stable Diffusion 1.5's VAE names to_q, to_k, to_v and to_out.0 query, key, value and proj_attn."""
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def change(tensors: Tensors) -> None:
        for key in [key for key in tensors if ".attentions." in key]:
            for new, old in older.items():
                if f".{new}." in key:
                    tensors[key.replace(f".{new}.", f".{old}.")] = tensors.pop(key)

    before = load_module(open_checkpoint(str(checkpoint_copy)), "vae").state_dict()
    change_tensors("vae", change)(checkpoint_copy)
    assert any(".query." in key for key in load_file(checkpoint_copy / WEIGHTS["vae"]))
    after = load_module(open_checkpoint(str(checkpoint_copy)), "vae").state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    ("scheduler", "sampler"),
    [
        ("DDIMScheduler", "ddim"),
        ("EulerDiscreteScheduler", "euler"),
        ("DPMSolverMultistepScheduler", "dpmpp_2m"),
        ("PNDMScheduler", "dpmpp_2m"),
        (None, "dpmpp_2m"),
    ],
)
def test_the_checkpoints_scheduler_chooses_the_default_sampler(
    checkpoint_copy: Path, scheduler: str | None, sampler: str
) -> None:
    configure(SCHEDULER, _class_name=scheduler)(checkpoint_copy)
    assert open_checkpoint(str(checkpoint_copy)).sampler == sampler


@pytest.mark.parametrize("model", ["x" * 300, "a/" * 3000, "loop"])
def test_a_name_that_the_system_cannot_look_up_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(model)
    assert len(str(caught.value)) < 400


def test_a_folder_whose_files_cannot_be_read_is_one_line(
    checkpoint_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As without permission; root, whom the tests may run as, has it always."""

    def refuse(_folder: Path) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_dir", refuse)
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
        open_checkpoint(str(checkpoint_copy))


@pytest.mark.parametrize("model", ["", " "])
def test_an_empty_name_is_called_empty(model: str) -> None:
    with pytest.raises(CheckpointError, match="MODEL is empty: give a folder"):
        open_checkpoint(model)


def test_the_untouched_checkpoint_is_accepted(tiny_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    assert checkpoint.factor == 2
    assert checkpoint.size_multiple == 4
    assert checkpoint.sizes() == {
        "tokens": 77,
        "skips": 1,
        "text_width": 16,
        "cross_width": 16,
        "unet_channels": 4,
        "latent_channels": 4,
    }
    for name in SUBFOLDERS:
        module = load_module(checkpoint, name)
        assert not module.training
        assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["nowhere at all", "/no/such/folder", "a/b/c", "https://example.org/x"])
def test_neither_a_folder_nor_a_hub_id(name: str) -> None:
    with pytest.raises(CheckpointError, match="neither a folder nor a hub id of the form owner/name"):
        open_checkpoint(name)


def test_a_hub_id_without_a_network_is_one_line_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started = time.perf_counter()
    assert cli.main(["nobody/no-such-model", str(tmp_path / "out")]) == 4
    assert time.perf_counter() - started < 10  # no retries; most of it is an import
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert "'nobody/no-such-model'" in printed.err
    assert "on a machine with a network" in printed.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["model.ckpt", "model.bin", "model.pt", "model.pth"])
def test_a_pickle_is_refused_with_the_way_to_convert_it(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04N.")
    with pytest.raises(CheckpointError, match=rf"{name} is a pickle.*save_pretrained"):
        open_checkpoint(str(tmp_path / name))


def test_a_single_safetensors_file_is_refused_with_the_way_to_convert_it(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model.safetensors is a single file.*save_pretrained"):
        open_checkpoint(str(tmp_path / "model.safetensors"))


class Poison:
    """Unpickling one makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


PICKLES = (
    "text_encoder/pytorch_model.bin",
    "unet/diffusion_pytorch_model.bin",
    "vae/diffusion_pytorch_model.bin",
)


@pytest.mark.parametrize("beside_safetensors", [True, False])
def test_no_pickle_is_ever_opened(checkpoint_copy: Path, tmp_path: Path, beside_safetensors: bool) -> None:
    marker = tmp_path / "poisoned"
    poison = pickle.dumps(Poison(marker))
    for name in PICKLES:
        (checkpoint_copy / name).write_bytes(poison)
    if beside_safetensors:
        open_and_load(checkpoint_copy)
    else:
        (checkpoint_copy / WEIGHTS["unet"]).unlink()
        message = message_of(checkpoint_copy)
        assert "unet has only a pickle (diffusion_pytorch_model.bin)" in message
        assert "safe_serialization=True" in message
    assert not marker.exists()
    pickle.loads(poison)
    assert marker.exists(), "the poison does not work, so this test shows nothing"


# Scheduler files as they are met: nothing but the class, what each class saves, and Stable Diffusion's own.
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SAVED_BY = ("DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler")


def saved_config(class_name: str, **options: Any) -> dict[str, Any]:
    scheduler = getattr(diffusers, class_name)(**options)
    config: dict[str, Any] = json.loads(scheduler.to_json_string())
    return config


CONFIGS: list[dict[str, Any]] = [
    {},
    {"_class_name": "DDIMScheduler"},
    {"_class_name": "PNDMScheduler"},
    *(saved_config(name) for name in SAVED_BY),
    *(saved_config(name, **STABLE_DIFFUSION) for name in SAVED_BY),
    saved_config("DDIMScheduler", prediction_type="v_prediction", timestep_spacing="trailing"),
    saved_config("DDIMScheduler", set_alpha_to_one=False, steps_offset=1, beta_schedule="squaredcos_cap_v2"),
    saved_config(
        "PNDMScheduler", trained_betas=np.linspace(0.001, 0.02, 100).tolist(), num_train_timesteps=100
    ),
]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of the corrections that the pipeline makes
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.get("_class_name", "empty"))
def test_a_scheduler_is_read_as_diffusers_pipeline_with_ddim_reads_it(
    config: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    nothing = dict.fromkeys(
        ("vae", "text_encoder", "tokenizer", "unet", "safety_checker", "feature_extractor")
    )
    pipeline = diffusers.StableDiffusionPipeline(
        scheduler=diffusers.DDIMScheduler.from_pretrained(tmp_path), requires_safety_checker=False, **nothing
    )
    reference = pipeline.scheduler
    schedule = schedule_from_config(config)
    np.testing.assert_allclose(
        schedule.alphas_cumprod, reference.alphas_cumprod.numpy(), rtol=tolerances.ALPHAS_CUMPROD_NO_FMA
    )
    assert schedule.set_alpha_to_one == (float(reference.final_alpha_cumprod) == 1.0)
    assert schedule.prediction_type == reference.config.prediction_type
    for steps in (1, 4, 20, 50):
        reference.set_timesteps(steps)
        ours = make_table("ddim", schedule, steps).timesteps
        np.testing.assert_array_equal(ours, reference.timesteps.numpy())


def test_an_option_that_would_change_the_picture_is_refused() -> None:
    with pytest.raises(UsageError, match="rescale_betas_zero_snr is set: not supported"):
        schedule_from_config({"rescale_betas_zero_snr": True})


def test_released_weights_hold_no_memory(tiny_checkpoint: Path) -> None:
    module = load_module(open_checkpoint(str(tiny_checkpoint)), "vae")
    held = list(module.parameters())  # as a tracer's cache holds them
    assert sum(tensor.numel() for tensor in held) > 0
    release_weights(module)
    assert sum(tensor.untyped_storage().nbytes() for tensor in held) == 0
