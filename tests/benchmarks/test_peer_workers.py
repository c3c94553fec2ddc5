"""The child's side of the worker protocol: with a made-up subject, and with diffusers and sdrt drawing."""

from __future__ import annotations

import importlib
import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.runs.worker_child import WORKERS, Child, child, drawing

from sdrt.benchmarks.harness.fidelity import psnr
from sdrt.runtime.bundle.bundle import EMBEDDED
from tolerances import EMBEDDED_PSNR_DB

CHECKPOINT = EMBEDDED.parent

FAKE = """
import os, sys, time
import numpy as np
from worker import Drawn, serve

class Fake:
    packages = ("numpy", "no-such-package")
    stages = ("unet",)
    notes = ["is made up"]

    def import_packages(self):
        time.sleep(0.05)

    def load(self, model, threads):
        print("a library prints on stdout")
        os.system("echo a child of it too; cat")  # reads stdin to its end
        if model.name == "broken":
            raise OSError("two\\nlines")
        if model.name == "exits":
            sys.exit("a library gives up")

    def draw(self, drawing):
        n, _, h, w = drawing.latents.shape
        value = drawing.seed if drawing.height == h else 0
        pixels = np.full((n, h, w, 3), value, np.uint8)
        return Drawn(pixels, [1.0, 1.5, 2.5], None, "nothing of it is shown")

    def stage(self, name, height, width, images):
        print("prepared for", height)
        calls = []
        def run():
            calls.append(1)
            time.sleep(0.05 if len(calls) == 1 else 0)
        return run

sys.exit(serve(Fake()))
"""


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Child]:
    """A worker of the made-up subject."""
    peer = tmp_path / "worker_fake.py"
    peer.write_text(f"import sys\nsys.path.insert(0, {str(WORKERS)!r})\n" + textwrap.dedent(FAKE))
    with child([peer], tmp_path / "log") as running:
        yield running


def test_a_worker_says_that_it_started_then_loads_draws_and_ends(fake: Child, tmp_path: Path) -> None:
    assert fake.started == {"ok": True, "event": "started", "protocol": 1}
    loaded = fake("load", model="m", threads=1)
    assert loaded["ok"]
    assert loaded["import_seconds"] >= 0.05 > loaded["load_seconds"] - 0.2 >= -0.2
    assert loaded["versions"] == {"numpy": np.__version__}
    assert (loaded["stages"], loaded["notes"]) == (["unet"], ["is made up"])
    files = {name: tmp_path / name for name in ("image", "pixels", "final_latents")}
    drawn = fake("draw", **drawing(tmp_path, images=2), **files)
    assert (drawn["ok"], drawn["images"], drawn["step_seconds"]) == (True, 2, [0.5, 1.0])
    assert (drawn["final_latents"], drawn["why"]) == (None, "nothing of it is shown")
    assert (np.load(files["pixels"].open("rb")) == np.full((2, 8, 8, 3), 7, np.uint8)).all()
    assert files["image"].read_bytes().startswith(b"\x89PNG")
    assert not files["final_latents"].exists()
    assert fake.end() == 0


def test_what_libraries_print_goes_to_the_log_and_what_they_read_is_empty(fake: Child) -> None:
    assert fake("load", model="m", threads=1)["ok"]
    assert fake.end() == 0
    assert "a library prints on stdout" in fake.log.read_text()
    assert "a child of it too" in fake.log.read_text()


def test_every_failure_is_an_answer_of_one_line_and_the_worker_lives(fake: Child, tmp_path: Path) -> None:
    request = drawing(tmp_path)
    failures = [
        (fake.send("no json"), "JSONDecodeError"),
        (fake.send("[1]"), "is no request: op is load, draw, stage"),
        (fake("fly"), "is no request"),
        (fake("draw", **request), "RuntimeError: draw was asked for, but no model is loaded"),
        (fake("load", model="m"), "ValueError: the request load needs the field threads"),
        (fake("load", model="broken", threads=1), "OSError: two lines"),
        (fake("load", model="exits", threads=1), "SystemExit: a library gives up"),
    ]
    assert fake("load", model="m", threads=1)["ok"]
    failures += [
        (fake("draw", **{**request, "sampler": "euler"}), "sampler is 'euler': workers know ddim"),
        (fake("draw", **{**request, "latents": str(tmp_path / "none.npy")}), "FileNotFoundError"),
        (
            fake("draw", **{**request, "height": 16}, pixels=tmp_path / "p"),
            "not uint8[1, 16, 8, 3] as asked for",
        ),
        (
            fake("stage", stage="vae_encoder", repeats=1, height=8, width=8, batch=1),
            "vae_encoder cannot be run alone here, only unet",
        ),
    ]
    for answer, words in failures:
        assert answer["ok"] is False
        assert words in answer["error"]
        assert "\n" not in answer["error"]
    assert fake.end() == 0


def test_a_stage_runs_once_before_the_clock_starts(fake: Child) -> None:
    fake("load", model="m", threads=1)
    answer = fake("stage", stage="unet", repeats=3, height=8, width=8, batch=1)
    assert len(answer["seconds"]) == 3
    assert max(answer["seconds"]) < 0.05


def test_a_stage_is_prepared_once_for_a_size(fake: Child) -> None:
    """Some subjects compile a network for it, which takes longer than all repetitions."""
    fake("load", model="m", threads=1)
    for height in (8, 8, 16, 8):
        assert fake("stage", stage="unet", repeats=1, height=height, width=8, batch=1)["ok"]
    assert fake.end() == 0
    prepared = [line for line in fake.log.read_text().splitlines() if line.startswith("prepared for")]
    assert prepared == ["prepared for 8", "prepared for 16", "prepared for 8"]


@pytest.mark.parametrize("to_one", [False, True])
def test_noise_levels_for_stable_diffusion_cpp_are_those_that_ddim_visits(
    monkeypatch: pytest.MonkeyPatch, to_one: bool
) -> None:
    from diffusers import DDIMScheduler

    monkeypatch.syspath_prepend(str(WORKERS))
    worker = importlib.import_module("worker_stable_diffusion_cpp")
    config = json.loads((CHECKPOINT / "scheduler" / "scheduler_config.json").read_text())
    config["set_alpha_to_one"] = to_one
    scheduler = DDIMScheduler.from_config(config)
    scheduler.set_timesteps(7)
    alphas = [*scheduler.alphas_cumprod[scheduler.timesteps].tolist(), float(scheduler.final_alpha_cumprod)]
    wanted = [(1 / alpha - 1) ** 0.5 for alpha in alphas]
    # diffusers has the products in float32: a thousand roundings.
    np.testing.assert_allclose(worker.ddim_sigmas(config, 7), wanted, rtol=1e-4)


def draws(script: str, words: list[str], model: Path, folder: Path, latents: Path) -> dict[str, Any]:
    """A worker's answers, and what it drew of two pictures from the given latents."""
    with child([WORKERS / script, *words], folder / f"{script}.log") as worker:
        loaded = worker("load", model=model, threads=1)
        assert loaded["ok"], loaded
        files = {name: folder / f"{script}-{name}.npy" for name in ("pixels", "final_latents")}
        size = {"height": 64, "width": 64}
        request = {"prompt": "a red apple", "negative_prompt": "", "latents": latents, "seed": 0, "steps": 4}
        drawn = worker("draw", **request, **size, guidance_scale=7.5, sampler="ddim", **files)
        assert drawn["ok"], drawn
        stages = {name: worker("stage", stage=name, repeats=1, **size, batch=2) for name in loaded["stages"]}
        assert worker.end() == 0
    return {
        "loaded": loaded,
        "drawn": drawn,
        "stages": stages,
        **{name: np.load(file) for name, file in files.items()},
    }


def test_diffusers_and_sdrt_draw_the_same_pictures_from_the_same_latents(tmp_path: Path) -> None:
    latents = tmp_path / "latents.npy"
    np.save(latents, np.random.default_rng(1).standard_normal((2, 4, 16, 16), dtype=np.float32))
    ours = draws("worker_sdrt.py", ["--backend", "onnxruntime-cpu"], CHECKPOINT / "bundle", tmp_path, latents)
    theirs = draws("worker_diffusers.py", [], CHECKPOINT, tmp_path, latents)
    assert ours["pixels"].shape == (2, 64, 64, 3)
    assert psnr(ours["pixels"], theirs["pixels"]) >= EMBEDDED_PSNR_DB
    assert psnr(ours["pixels"][0], ours["pixels"][1]) < 30  # two pictures, not one twice
    np.testing.assert_allclose(ours["final_latents"], theirs["final_latents"], atol=1e-3)
    for side, packages in ((ours, {"sdrt", "onnxruntime"}), (theirs, {"diffusers", "torch"})):
        assert packages <= set(side["loaded"]["versions"])
        assert len(side["drawn"]["step_seconds"]) == 3
        assert sum(side["drawn"]["step_seconds"]) < side["drawn"]["seconds"]
        assert set(side["stages"]) == {"text_encoder", "unet", "vae_decoder", "vae_encoder"}
        for answer in side["stages"].values():
            assert answer["ok"], answer
            assert answer["seconds"][0] > 0
