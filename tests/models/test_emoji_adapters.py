"""The adapters of the embedded model: the shipped files, their figures, and the arithmetic of the recipe."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from safetensors import safe_open

from sdrt.runtime import Bundle
from sdrt.runtime.bundle.bundle import EMBEDDED
from sdrt.runtime.bundle.families.registry import FAMILIES
from sdrt.runtime.bundle.weight_map import read_weight_map
from sdrt.runtime.lora.file import read_lora

RECIPE = EMBEDDED.parent
ADAPTERS = RECIPE / "lora"
FORMS = {"delft": "diffusers", "outline": "diffusers", "lcm": "diffusers", "wizard": "kohya"}
MAX_BYTES = 300_000
RANK = 4


def test_every_shipped_file_is_one_of_these() -> None:
    assert {path.stem for path in ADAPTERS.glob("*.safetensors")} == FORMS.keys()


@pytest.mark.parametrize("name", FORMS)
def test_a_shipped_file_is_small_of_rank_4_and_fits_the_embedded_model(name: str) -> None:
    path = ADAPTERS / f"{name}.safetensors"
    assert path.stat().st_size <= MAX_BYTES
    bundle = Bundle.open()
    lora = read_lora(path, read_weight_map(bundle), FAMILIES[bundle.manifest.family])
    assert lora.format == FORMS[name]
    assert all(key.folder == "unet" for key in lora.changes)
    if name == "delft":
        assert all(".attn" in key.tensor for key in lora.changes)
    else:
        assert any(".conv" in key.tensor for key in lora.changes)
    with safe_open(path, framework="numpy") as file:
        about = file.metadata()
        downs = [key for key in file.keys() if ".lora_A." in key or ".lora_down." in key]  # noqa: SIM118
        assert {file.get_slice(key).get_shape()[0] for key in downs} == {RANK}
    assert len(downs) == len(lora.changes)
    assert about["ss_network_dim"] == str(RANK)
    assert about["modelspec.license"] == "Apache-2.0"
    assert "models/emoji" in about["ss_base_model_version"]


def test_the_card_gives_the_figures_that_were_measured() -> None:
    figures = json.loads((ADAPTERS / "figures.json").read_text(encoding="utf-8"))
    card = (ADAPTERS / "README.md").read_text(encoding="utf-8")
    rows = {
        cells[0]: cells[1:]
        for line in card.splitlines()
        if line.startswith("| ") and (cells := [cell.strip() for cell in line.strip("|").split("|")])
    }
    for style in ("delft", "outline"):
        for weight in ("0", "0.5", "1"):
            measured = figures[style][f"weight_{weight}"]
            shares = [
                measured[f"{what}_{which}"]
                for what in ("style", "object_top1")
                for which in ("shown", "kept_out")
            ]
            assert rows[f"`{style}` at {weight}"] == [f"{100 * share:.0f} %" for share in shares]
        accuracy = figures[style]["classifier"]["held_out_accuracy"]
        assert re.search(rf"{style}[^.]*: {100 * accuracy:.0f} %", card)
    for weight in ("0", "0.5", "1"):
        measured = figures["wizard"][f"weight_{weight}"]
        shares = [measured["concept_top1"], measured["other_captions_top1"]]
        assert rows[f"`wizard` at {weight}"] == [f"{100 * share:.0f} %" for share in shares]
    for label, words in {
        "20_steps_guidance_5": "20 steps of `ddim`, guidance 5",
        "4_steps_guidance_5": "4 steps of `lcm`, guidance 5",
        "4_steps_guidance_1": "4 steps of `lcm`, guidance 1",
        "4_steps_guidance_1_with_adapter": "4 steps of `lcm`, guidance 1, `lcm.safetensors`",
    }.items():
        measured = figures["lcm"][label]
        shares = [measured[key] for key in ("captions_top1", "unseen_wordings_top1", "in_group")]
        assert rows[words][:3] == [f"{100 * share:.0f} %" for share in shares]


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The few-step recipe; its scripts are found as they are when they are started in their folder."""
    for library in ("torch", "diffusers", "transformers", "peft"):
        pytest.importorskip(library)
    monkeypatch.syspath_prepend(str(RECIPE))
    names = {path.stem for path in RECIPE.glob("*.py")} | {"lora"}
    for name in [name for name in sys.modules if name.partition(".")[0] in names]:
        monkeypatch.delitem(sys.modules, name)
    return importlib.import_module("lora.train_few_steps")


def test_the_teacher_and_the_student_are_those_of_diffusers(recipe: ModuleType) -> None:
    """One guided DDIM step, and the picture that LCM's sampler would guess."""
    import torch
    from diffusers import DDIMScheduler, LCMScheduler

    settings = importlib.import_module("architecture").SCHEDULER
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "set_alpha_to_one")
    options = {name: settings[name] for name in names}
    ddim, lcm = DDIMScheduler(**options, clip_sample=False), LCMScheduler(**options, clip_sample=False)
    ddim.set_timesteps(recipe.TEACHER_STEPS)
    lcm.set_timesteps(4, original_inference_steps=recipe.TEACHER_STEPS)
    generator = torch.Generator().manual_seed(1)
    noisy, noise = torch.randn(2, 1, 4, 8, 8, generator=generator)
    kept, timestep = importlib.import_module("train_denoiser").alphas_cumprod(), int(lcm.timesteps[1])

    now, earlier = torch.tensor([timestep]), torch.tensor([timestep - 20])
    stepped = recipe.add_noise(recipe.clean(noisy, noise, kept[now]), noise, kept[earlier])
    torch.testing.assert_close(stepped, ddim.step(noise, timestep, noisy).prev_sample)

    lcm.step(noise, int(lcm.timesteps[0]), noisy)
    skip, out = recipe.boundary(now)
    guessed = skip * noisy + out * recipe.clean(noisy, noise, kept[now])
    torch.testing.assert_close(guessed, lcm.step(noise, timestep, noisy).denoised)


def test_an_adapter_learns_and_the_model_does_not(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after its first step and started again, too."""
    import torch

    adapters, training = importlib.import_module("lora.adapters"), importlib.import_module("training")
    captions = recipe.GroupedCaptions(
        importlib.import_module("data").read_captions()[:4],
        importlib.import_module("make_tokenizer").Tokenizer(),
    )
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    options = training.Options(state=tmp_path / "state.pt", steps=2, warm_up=0.5)

    def trained() -> tuple[Any, dict[str, Any]]:
        denoiser = adapters.load_denoiser()
        adapter = adapters.Adapter(rank=2, alpha=2, layers=("to_q", "conv1"))
        loss = recipe.Distillation(denoiser, latents, captions)
        return denoiser.unet, adapters.train_adapter(denoiser, adapter, loss, options)

    generator_for = training.generator_for

    def interrupt_first_step(seed: int, step: int) -> Any:
        if step == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return generator_for(seed, step)

    monkeypatch.setattr(training, "generator_for", interrupt_first_step)
    with pytest.raises(SystemExit, match="stopped at step 1 of 2"):
        trained()
    unet, layers = trained()
    assert all(value.abs().sum() > 0 for name, value in layers.items() if "lora_B" in name)
    after = {name.replace(".base_layer", ""): value for name, value in unet.state_dict().items()}
    before = adapters.load_denoiser().unet.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
