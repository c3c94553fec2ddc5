"""From a checkpoint's scheduler file to latents, beside diffusers' pipeline as it loads the folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from support.checkpoints.scheduler_cases import EQUAL, PUBLISHED, Config

import tolerances
from sdrt.export.checkpoint.reader import open_checkpoint
from sdrt.export.cli import main as cli
from sdrt.runtime.bundle.manifest_json import from_json, to_json
from sdrt.runtime.pipeline import Pipeline

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of the corrections that the pipelines make
PROMPT, STEPS = "a pear", 6
LATENTS = np.random.default_rng(5).standard_normal((1, 4, 8, 8)).astype(np.float32)
PARTS = {
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
}


def with_scheduler(folder: Path, config: Config) -> Path:
    """The checkpoint with another scheduler, so that diffusers can load it whole."""
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    named = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}
    index = {**named, **PARTS, "scheduler": ["diffusers", config["_class_name"]]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def with_manifest_of(bundle: Path, folder: Path) -> Path:
    """The bundle with what an export of the folder would say of its scheduler; no graph depends on it."""
    checkpoint, file = open_checkpoint(str(folder)), bundle / "manifest.json"
    manifest = from_json(file.read_text(encoding="utf-8"))
    defaults = replace(
        manifest.defaults, sampler=checkpoint.sampler, sampler_options=checkpoint.sampler_options
    )
    changed = replace(manifest, schedule=checkpoint.schedule, defaults=defaults)
    file.write_text(to_json(changed), encoding="utf-8")
    return bundle


def drawn_by_diffusers(folder: Path, scheduler: str | None = None) -> Any:
    """Latents of its pipeline, with the folder's scheduler or with another class that reads the same file."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if scheduler is not None:
        pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
    result = pipeline(
        PROMPT,
        num_inference_steps=STEPS,
        latents=torch.from_numpy(LATENTS),
        height=16,
        width=16,
        output_type="latent",
    )
    return result.images.numpy()


def error(bundle: Path, expected: Any, **options: Any) -> float:
    """Relative L2 of the bundle's latents."""
    given = {"num_inference_steps": STEPS, "latents": LATENTS, "output_type": "latents", **options}
    with Pipeline.load(bundle, backend="onnxruntime-cpu", verify=False) as pipeline:
        latents = pipeline(PROMPT, **given).latents
    return float(np.linalg.norm(latents - expected) / np.linalg.norm(expected))


def test_an_edm_checkpoint_is_exported_and_drawn_as_diffusers_draws_it(
    checkpoint_copy: Path, traced_before: Sequence[str], tmp_path: Path
) -> None:
    """With the parity gate, whose sampling run is another for such models."""
    folder, out = with_scheduler(checkpoint_copy, EQUAL["edm dpmpp"]), tmp_path / "exported"
    assert cli.main([str(folder), str(out), "--quiet", *traced_before]) == 0
    figures = json.loads((out / "manifest.json").read_text())["parity"]["figures"]
    assert [figure["inputs"][:13] for figure in figures if figure["output"] == "latents"][
        -1
    ] == "4 euler steps"
    assert error(out, drawn_by_diffusers(folder)) <= tolerances.SCHEDULER_RUN


@pytest.mark.parametrize(
    "case", ["euler old", "dpmpp karras", "dpm plain", "unipc old", "euler zero snr", "edm euler of v"]
)
def test_a_bundle_draws_as_diffusers_draws_the_folder(
    case: str, checkpoint_copy: Path, bundle_copy: Path
) -> None:
    folder = with_scheduler(checkpoint_copy, EQUAL[case])
    assert (
        error(with_manifest_of(bundle_copy, folder), drawn_by_diffusers(folder)) <= tolerances.SCHEDULER_RUN
    )


@pytest.mark.parametrize(
    ("sampler", "scheduler"),
    [("pndm", None), (None, "DPMSolverMultistepScheduler"), ("euler", "EulerDiscreteScheduler")],
)
def test_another_sampler_has_its_own_defaults(
    sampler: str | None, scheduler: str | None, checkpoint_copy: Path, bundle_copy: Path
) -> None:
    """Stable Diffusion 1.4, whose file knows of no spacing, comes with PNDMScheduler."""
    folder = with_scheduler(checkpoint_copy, PUBLISHED["sd-1.4"])
    bundle = with_manifest_of(bundle_copy, folder)
    assert error(bundle, drawn_by_diffusers(folder, scheduler), sampler=sampler) <= tolerances.SCHEDULER_RUN
