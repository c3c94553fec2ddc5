"""The workers of peers as processes, each on a fake of its library: what reaches it, and how it fails."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.runs.worker_child import WORKERS, Child, child, drawing

from sdrt.benchmarks.document.document import Document, Model, Subject
from sdrt.benchmarks.document.recorder import Recorder
from sdrt.benchmarks.harness.cold import measure_cold
from sdrt.benchmarks.harness.progress import Progress
from sdrt.benchmarks.harness.run import Run, Settings, SubjectPlan
from sdrt.benchmarks.harness.warm import measure_warm

FAKES = Path(__file__).with_name("peer_fakes")
# Worker → the folder of its library's fake, and the calls of the library that load and draw.
PEERS = {
    "worker_optimum.py": ("optimum_onnx", "from_pretrained", "draw"),
    "worker_openvino.py": ("openvino_genai", "Text2ImagePipeline", "generate"),
    "worker_stable_diffusion_cpp.py": ("stable_diffusion_cpp", "StableDiffusion", "generate_image"),
}
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
}


# What a library is to be called with for two pears, beside their latents.
PEARS = {
    "prompt": "a pear",
    "negative_prompt": "blue",
    "num_images_per_prompt": 2,
    "num_inference_steps": 4,
    "guidance_scale": 3.5,
    "height": 64,
    "width": 64,
}


def environment(script: str, folder: Path, fails: str = "") -> dict[str, str]:
    """In which the fakes stand before what is installed."""
    places = [str(FAKES / PEERS[script][0]), *sys.path]
    return {
        "PYTHONPATH": os.pathsep.join(places),
        "FAKE_RECORD": str(folder / "record"),
        "FAKE_FAILS": fails,
    }


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with what workers read of a model themselves."""
    configs = {
        "scheduler/scheduler_config.json": SCHEDULE,
        "text_encoder/config.json": {"max_position_embeddings": 5},
        "unet/config.json": {"cross_attention_dim": 6},
    }
    for name, config in configs.items():
        file = tmp_path / "model" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(config))
    return tmp_path / "model"


class Peer:
    """A worker on its fake library, and what the library was called with."""

    def __init__(self, running: Child, folder: Path, model: Path) -> None:
        self.ask, self._folder, self._model = running, folder, model

    def load(self) -> dict[str, Any]:
        return self.ask("load", model=self._model, threads=3)

    def draw(self, images: int = 1, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The answer, and the arrays that were written."""
        request = drawing(self._folder, images, 64, **{"steps": 4, **changes})
        latents = np.random.default_rng(3).standard_normal((images, 4, 8, 8), dtype=np.float32)
        np.save(self._folder / "latents.npy", latents)
        files = {name: self._folder / name for name in ("pixels", "final_latents")}
        answer = self.ask("draw", **request, **files)
        return answer, {name: np.load(file.open("rb")) for name, file in files.items() if file.exists()}

    @property
    def latents(self) -> NDArray[np.float32]:
        """Those that were asked for."""
        latents: NDArray[np.float32] = np.load(self._folder / "latents.npy")
        return latents

    def stage(self, name: str, images: int = 1) -> dict[str, Any]:
        return self.ask("stage", stage=name, repeats=2, height=64, width=64, batch=images)

    def calls(self, name: str) -> list[dict[str, Any]]:
        """The arguments of the library's calls of one name, in their order."""
        lines = (self._folder / "record").read_text(encoding="utf-8").splitlines()
        found = [json.loads(line) for line in lines]
        return [entry for entry in found if entry.pop("call") == name]


def running(script: str, folder: Path, model: Path, *words: str, fails: str = "") -> Iterator[Peer]:
    extra = environment(script, folder, fails)
    with child([WORKERS / script, *words], folder / "log", extra) as worker:
        yield Peer(worker, folder, model)


@pytest.fixture
def cpp(tmp_path: Path, model: Path) -> Iterator[Peer]:
    yield from running("worker_stable_diffusion_cpp.py", tmp_path, model)


@pytest.fixture
def openvino(tmp_path: Path, model: Path) -> Iterator[Peer]:
    yield from running("worker_openvino.py", tmp_path, model)


@pytest.fixture
def optimum(tmp_path: Path, model: Path) -> Iterator[Peer]:
    yield from running("worker_optimum.py", tmp_path, model)


def check_pictures(pixels: NDArray[Any], images: int) -> None:
    """As the fakes draw them: every picture is of its number."""
    assert pixels.shape == (images, 64, 64, 3)
    assert pixels.dtype == np.uint8
    assert [np.unique(picture).tolist() for picture in pixels] == [[number] for number in range(images)]


# --- stable-diffusion.cpp


def test_stable_diffusion_cpp_computes_in_fp32_with_the_threads_that_were_asked_for(
    cpp: Peer, model: Path
) -> None:
    assert cpp.load()["ok"]
    assert cpp.calls("StableDiffusion") == [
        {
            "model_path": str(model),
            "n_threads": 3,
            "wtype": "f32",
            "rng_type": "cuda",
            "sampler_rng_type": "cuda",
        }
    ]


def test_stable_diffusion_cpp_draws_from_the_seed_over_the_noise_levels_of_ddim(cpp: Peer) -> None:
    assert cpp.load()["stages"] == []
    answer, files = cpp.draw(2, prompt="a pear", negative_prompt="blue", guidance_scale=3.5, seed=11)
    (call,) = cpp.calls("generate_image")
    sigmas = [float(sigma) for sigma in call.pop("sigmas").split(",")]
    assert call == {
        "prompt": "a pear",
        "negative_prompt": "blue",
        "width": 64,
        "height": 64,
        "sample_method": "euler",
        "sample_steps": 4,
        "cfg_scale": 3.5,
        "seed": 11,
        "batch_count": 2,
    }
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas = np.cumprod(1 - betas)[[751, 501, 251, 1, 0]]  # 4 steps with leading timesteps, and the end
    np.testing.assert_allclose(sigmas, np.sqrt(1 / alphas - 1), rtol=1e-9)  # double precision on both sides
    check_pictures(files["pixels"], 2)
    assert len(answer["step_seconds"]) == 3  # of the first picture; the decoder's reports are none
    assert (answer["final_latents"], answer["why"]) == (None, "stable-diffusion.cpp does not show them")
    assert "vae_decoder cannot be run alone here" in cpp.stage("vae_decoder")["error"]


def test_stable_diffusion_cpp_that_gives_a_null_pointer_is_told(tmp_path: Path, model: Path) -> None:
    for peer in running("worker_stable_diffusion_cpp.py", tmp_path, model, fails="null"):
        assert "knows the published architectures alone" in peer.load()["error"]


# --- OpenVINO GenAI


@pytest.mark.parametrize("cached", [True, False])
def test_openvino_is_compiled_for_what_it_draws_in_fp32(tmp_path: Path, model: Path, cached: bool) -> None:
    words = () if cached else ("--no-cache",)
    for peer in running("worker_openvino.py", tmp_path, model, *words):
        loaded = peer.load()
        assert any("CACHE_DIR" in note for note in loaded["notes"]) is cached
        assert peer.calls("set_scheduler") == [{"scheduler": "scheduler_config.json DDIM"}]
        assert not peer.calls("compile")  # the size is not known yet
        for images in (1, 1, 2):
            assert peer.draw(images)[0]["ok"]
        assert [call["shape"] for call in peer.calls("reshape")] == [[1, 64, 64, 7.5], [2, 64, 64, 7.5]]
        hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 3}
        hints |= {"CACHE_DIR": str(model / "compiled")} if cached else {}
        assert peer.calls("compile") == [{"device": "CPU", "properties": hints}] * 2
        assert len(peer.calls("Text2ImagePipeline")) == len(peer.calls("set_scheduler")) == 2


def test_openvino_starts_from_the_given_latents(openvino: Peer) -> None:
    openvino.load()
    answer, files = openvino.draw(2, prompt="a pear", negative_prompt="blue", guidance_scale=3.5)
    (call,) = openvino.calls("generate")
    assert call == {**PEARS, "latents": openvino.latents.tolist()}
    check_pictures(files["pixels"], 2)
    # The fake adds the number of the step: those of the last one are kept.
    np.testing.assert_array_equal(files["final_latents"], openvino.latents + 4)
    assert len(answer["step_seconds"]) == 3


def test_openvinos_stages_run_on_what_a_drawing_runs_on(openvino: Peer) -> None:
    stages = openvino.load()["stages"]
    for name in stages:
        assert len(openvino.stage(name, 2)["seconds"]) == 2
    hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 3}
    for network, shape, compiled in (
        ("CLIPTextModel", [2], 1),
        ("UNet2DConditionModel", [4, 64, 64, 5], 1),
        ("AutoencoderKL", [2, 64, 64], 2),
    ):
        assert openvino.calls(f"{network}.reshape") == [{"shape": shape}] * compiled
        for call in openvino.calls(f"{network}.compile"):
            assert call["properties"].items() >= hints.items()
    runs = 3  # one before the clock starts, and two
    assert openvino.calls("CLIPTextModel.infer") == [{"texts": ["a red apple", ""], "guided": True}] * runs
    assert openvino.calls("UNet2DConditionModel.set_hidden_states") == [
        {"name": "encoder_hidden_states", "shape": [4, 5, 6]}
    ]
    assert openvino.calls("UNet2DConditionModel.infer") == [{"shape": [4, 4, 8, 8], "timestep": 500}] * runs
    assert openvino.calls("AutoencoderKL.decode") == [{"shape": [2, 4, 8, 8]}] * runs
    assert openvino.calls("AutoencoderKL.encode") == [{"shape": [2, 3, 64, 64], "noise": 0.0}] * runs


# --- optimum-onnx


def test_optimum_runs_on_the_cpu_with_the_threads_that_were_asked_for(optimum: Peer, model: Path) -> None:
    assert optimum.load()["ok"]
    assert optimum.calls("from_pretrained") == [
        {"model": str(model), "threads": 3, "provider": "CPUExecutionProvider", "local_files_only": True}
    ]
    assert optimum.calls("set_num_threads") == [{"threads": 3}]
    assert optimum.calls("DDIMScheduler") == [
        {"config": {"beta_start": 0.1}, "changes": {"clip_sample": False}}
    ]
    assert optimum.calls("set_progress_bar_config") == [{"disable": True}]


def test_optimum_draws_with_ddim_from_the_given_latents(optimum: Peer) -> None:
    optimum.load()
    answer, files = optimum.draw(2, prompt="a pear", negative_prompt="blue", guidance_scale=3.5)
    (call,) = optimum.calls("draw")
    assert call == {**PEARS, "latents": optimum.latents.tolist(), "scheduler": "DDIMScheduler"}
    check_pictures(files["pixels"], 2)
    np.testing.assert_array_equal(files["final_latents"], optimum.latents + 4)
    assert len(answer["step_seconds"]) == 3


def test_optimums_stages_run_on_what_a_drawing_runs_on(optimum: Peer) -> None:
    for name in optimum.load()["stages"]:
        assert len(optimum.stage(name, 2)["seconds"]) == 2
    runs, whole = 3, {"context": None, "return_dict": False}
    texts = {"prompt": "a red apple", "negative_prompt": "", "do_classifier_free_guidance": True}
    text_encoder = {**texts, "device": "cpu", "num_images_per_prompt": 2}
    assert optimum.calls("encode_prompt") == [text_encoder] * runs
    unet = {"shapes": [[4, 4, 8, 8], []], "context": [4, 5, 6], "return_dict": False}
    assert optimum.calls("unet") == [unet] * runs
    assert optimum.calls("decode") == [{"shapes": [[2, 4, 8, 8]], **whole}] * runs
    assert optimum.calls("encode") == [{"shapes": [[2, 3, 64, 64]], **whole}] * runs


# --- failures


def measured(script: str, folder: Path, model: Path, fails: str) -> Document:
    """What ``sd-bench`` records of a worker whose library fails."""
    subject = Subject("peer", "Peer", "peer")
    recorder = Recorder(("sd-bench",))
    recorder.set_subject(subject)
    settings = Settings(2, ((64, 64),), (1,), (2,), 1, 1, 1, 1, blocks=("cold", "warm"))
    recorder.set_model(Model("model", "m", 1 << 20, "ddim", 2, 7.5, "x", 1, settings.sizes))
    words = (sys.executable, str(WORKERS / script))
    plan = SubjectPlan(subject, words, model, environment(script, folder, fails))
    run = Run("model", 1 << 20, 4, 8, (plan,), settings, recorder, Progress(quiet=True), folder)
    measure_cold(run)
    measure_warm(run)
    return recorder.document(complete=True)


@pytest.mark.parametrize("script", PEERS)
@pytest.mark.parametrize("at", ["load", "draw", "shape"])
def test_a_library_that_fails_is_a_row_of_the_report(
    script: str, at: str, tmp_path: Path, model: Path
) -> None:
    _, load, draw = PEERS[script]
    found = measured(script, tmp_path, model, {"load": load, "draw": draw}.get(at, at))
    assert [(entry.subject, entry.stage) for entry in found.failures] == [("peer", "cold start")]
    errors = {
        "load": f"RuntimeError: the library fails in {load}",
        "draw": f"RuntimeError: the library fails in {draw}",
        "shape": "ValueError: the pictures are uint8[1, 63, 64, 3], not uint8[1, 64, 64, 3] as asked for",
    }
    assert found.failures[0].error == errors[at]
    assert not found.measurements


@pytest.mark.parametrize("script", PEERS)
def test_a_library_that_works_has_its_figures(script: str, tmp_path: Path, model: Path) -> None:
    found = measured(script, tmp_path, model, "")
    assert not found.failures
    assert {entry.quantity for entry in found.measurements} >= {"cold_total", "image", "step", "memory"}
