"""What each option does to a picture of the embedded model, measured on the pictures of the gallery.

Distances are root mean squares of levels (0 to 255), or those of the recipe's descriptors (`features.py`),
where two pictures of one emoji are some 0.1 apart and pictures of different emoji 1 and more.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import tolerances
from sdrt.benchmarks.gallery.sections import Entry, Section
from sdrt.runtime.pipeline import Pipeline
from sdrt.runtime.request.build import build_request
from sdrt.runtime.samplers.noise import noise_source, slerp

RECIPE = Path(__file__).parents[2] / "models" / "emoji"
FACES = ("a fox face", "a tiger face", "a lion face", "a dog face", "a cat face", "a bear face", "an owl")
NEED_MORE_STEPS = {("dpm2_a", 10), ("pndm", 10)}  # on this model; diffusers draws the same there
Gallery = tuple[Path, list[Section]]
Picture = NDArray[np.uint8]


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.load(backend="onnxruntime-cpu")


def entries(gallery: Gallery, title: str) -> list[Entry]:
    (section,) = (section for section in gallery[1] if section.title == title)
    return section.entries


def pictures(gallery: Gallery, title: str) -> list[Picture]:
    drawn = [entry.picture for entry in entries(gallery, title)]
    assert all(picture is not None for picture in drawn)
    return [picture for picture in drawn if picture is not None]


def apart(one: Picture, other: Picture) -> float:
    """Root mean square of the difference in levels."""
    return float(np.sqrt(np.mean((one.astype(float) - other) ** 2)))


def feature_distances(drawn: list[Picture], known: list[Picture]) -> NDArray[np.float64]:
    """[drawn, known], by the recipe's descriptors."""
    import torch

    sys.path.insert(0, str(RECIPE))
    try:
        features = importlib.import_module("features")
    finally:
        sys.path.remove(str(RECIPE))

    def tensor(images: list[Picture]) -> Any:
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255

    result: NDArray[np.float64] = features.distances(tensor(drawn), tensor(known)).numpy()
    return result


def test_every_sampler_draws_a_fox(gallery: Gallery, pipeline: Pipeline) -> None:
    known = pipeline(
        list(FACES), seed=100, sampler="ddim", num_inference_steps=50, guidance_scale=4.0, output_type="numpy"
    ).images
    away = feature_distances(pictures(gallery, "Samplers"), list(known))
    others = []
    for entry, row in zip(entries(gallery, "Samplers"), away, strict=True):
        sampler, steps = entry.caption.split()[0].rstrip(","), int(entry.caption.split()[1])
        if (sampler, steps) in NEED_MORE_STEPS:
            others.append(entry.caption)
            continue
        assert FACES[int(row.argmin())] == "a fox face", entry.caption
        assert row[0] < 0.5 * row[1:].min(), entry.caption
    assert len(others) == len(NEED_MORE_STEPS)


def test_guidance_orders_the_distance_from_no_guidance(gallery: Gallery) -> None:
    drawn = pictures(gallery, "Guidance")
    away = [apart(picture, drawn[0]) for picture in drawn]
    assert away == sorted(away)
    assert away[1] > 0
    contrast = [float(picture.std()) for picture in drawn]
    assert contrast == sorted(contrast)


def test_guidance_in_an_interval_is_between_none_and_all(gallery: Gallery) -> None:
    everywhere, inside, _, strong, rescaled = pictures(gallery, "Guidance: interval, schedule, rescale")
    unguided = pictures(gallery, "Guidance")[0]
    assert 0 < apart(inside, unguided) < apart(everywhere, unguided)
    # This model's predictions have the same deviation with and without guidance: little to rescale.
    assert 0 < apart(rescaled, strong) < 0.5 * apart(strong, unguided)


def test_negative_prompts_lead_away(gallery: Gallery, pipeline: Pipeline) -> None:
    """From the picture of what is not wanted, in the space of descriptors."""
    drawn, unwanted = pictures(gallery, "Negative prompts"), ["a clown face", "a yellow face", "a red apple"]
    known = list(pipeline(unwanted, seed=1, guidance_scale=2.0, output_type="numpy").images)
    for pair, name in enumerate(unwanted):
        before, after = feature_distances(drawn[2 * pair : 2 * pair + 2], known)[:, pair]
        assert after > before, name


def test_a_word_beyond_the_token_limit_is_read(gallery: Gallery, pipeline: Pipeline) -> None:
    balloon = pictures(gallery, "Weights, chunks, clip skip")[2]
    known = list(pipeline(["a red balloon", "a white cloud"], seed=1, output_type="numpy").images)
    to_balloon, to_cloud = feature_distances([balloon], known)[0]
    assert to_balloon < 0.5 * to_cloud


def test_strength_orders_the_distance_to_the_input(gallery: Gallery) -> None:
    apple = pictures(gallery, "Prompts")[0]
    away = [apart(picture, apple) for picture in pictures(gallery, "Image to image")]
    assert away == sorted(away)
    assert away[0] < 0.3 * away[-1]


@pytest.mark.parametrize(
    ("index", "source", "mask"),
    [
        (0, "apple.png", "right-half.png"),
        (1, "apple.png", "right-half.png"),
        (2, "face.png", "top-half.png"),
        (3, "apple.png", "middle.png"),
    ],
)
def test_unmasked_pixels_stay_and_masked_ones_change(
    gallery: Gallery, index: int, source: str, mask: str
) -> None:
    folder = gallery[0].parent
    before = np.asarray(Image.open(folder / source).convert("RGB"))
    drawn = np.asarray(Image.open(folder / mask)) > 0
    after = pictures(gallery, "Inpainting")[index]
    assert np.array_equal(after[~drawn], before[~drawn])
    assert apart(after[drawn], before[drawn]) > 20


def test_outpainting_keeps_the_original_and_fills_the_rest(gallery: Gallery) -> None:
    house, car, apple = (pictures(gallery, "Prompts")[index] for index in (2, 3, 0))
    sides, above, left = pictures(gallery, "Outpainting")
    assert np.array_equal(sides[:, 32:96], house)
    assert np.array_equal(above[64:], car)
    assert np.array_equal(left[:, 64:], apple)
    for filled in (sides[:, :32], sides[:, 96:], above[:64], left[:, :64]):
        assert filled.std() > 20  # not one colour


def test_less_new_noise_stays_nearer_and_all_of_it_is_another_picture(gallery: Gallery) -> None:
    drawn, known = pictures(gallery, "Variations without a prompt"), pictures(gallery, "Prompts")
    to_source = feature_distances(drawn, known)[:, 0]
    assert to_source[0] < 0.3  # the inversion gives the picture back
    assert max(to_source[:4]) < 0.5 < to_source[-1]


def test_a_variation_is_nearer_to_its_source_than_to_other_pictures(
    gallery: Gallery, pipeline: Pipeline
) -> None:
    sources = pictures(gallery, "Prompts")
    varied = [pipeline(image=source, seed=17, output_type="numpy").images[0] for source in sources]
    away = feature_distances(varied, sources)
    for number, row in enumerate(away):
        assert row[number] < 0.5 * np.delete(row, number).min()
        assert not np.array_equal(varied[number], sources[number])


@pytest.mark.parametrize("sampler", ["ddim", "euler", "heun", "dpmpp_2m"])
def test_inversion_ends_where_any_sampler_begins(gallery: Gallery, pipeline: Pipeline, sampler: str) -> None:
    """Without new noise and guidance the picture's own latents come back, the nearer the more steps."""
    apple = pictures(gallery, "Prompts")[0]
    task = build_request(pipeline.bundle.manifest, None, {"image": apple}).picture
    assert task is not None
    known = pipeline._parts.vae_encoder.encode(task.canvas).latents.mean
    options: dict[str, Any] = {"image": apple, "variation": 0.0, "guidance_scale": 1.0, "sampler": sampler}
    errors = []
    for steps in (10, 80):
        back = pipeline(num_inference_steps=steps, output_type="latents", **options).latents
        errors.append(float(np.linalg.norm(back - known) / np.linalg.norm(known)))
    assert errors[1] < 0.7 * errors[0]
    assert errors[0] < 0.15


def test_frames_lead_from_one_end_to_the_other(pipeline: Pipeline) -> None:
    options: dict[str, Any] = {"num_inference_steps": 10, "guidance_scale": 4.0, "output_type": "numpy"}
    frames = pipeline.interpolate("a red apple", "a green pear", frames=7, seed=3, **options).images
    from_first = [apart(frame, frames[0]) for frame in frames]
    to_last = [apart(frame, frames[-1]) for frame in frames]
    assert from_first == sorted(from_first)
    assert to_last == sorted(to_last, reverse=True)


def test_slerped_noise_has_unit_variance() -> None:
    one, other = (noise_source("philox", [seed]).draw(0, (4, 32, 32)) for seed in (1, 2))
    for share in (0.0, 0.25, 0.5, 1.0):
        assert (
            abs(float(slerp(one, other, share).std()) - 1) < 0.05
        )  # 3 deviations of 4096 draws, and a little


def test_same_seed_same_picture_in_any_batch(pipeline: Pipeline) -> None:
    options: dict[str, Any] = {"num_inference_steps": 10, "guidance_scale": 4.0, "output_type": "numpy"}
    together = pipeline(["an owl", "a red car", "a house"], seed=[5, 6, 7], **options)
    for index, (prompt, seed) in enumerate([("an owl", 5), ("a red car", 6), ("a house", 7)]):
        alone = pipeline(prompt, seed=seed, **options)
        difference = np.abs(alone.latents[0] - together.latents[index]).max()
        assert difference <= tolerances.OTHER_BATCH * np.abs(alone.latents).max()
        assert apart(alone.images[0], together.images[index]) < 0.1


def test_a_lora_changes_the_picture_as_far_as_its_weight_says(gallery: Gallery) -> None:
    """Delft draws in blue; at weight 0 each file leaves the model as it is."""
    shown = pictures(gallery, "LoRAs")
    delft, outline = shown[:3], shown[3:6]
    assert np.array_equal(delft[0], outline[0])
    blue = [float(np.mean(picture[..., 2].astype(float) - picture[..., 0])) for picture in delft]
    assert blue[0] < blue[1] < blue[2]
    # Paper stays paper, and ink has no colour: an owl is brown without it.
    colour = [float(np.mean(np.ptp(picture.astype(float), axis=-1))) for picture in outline]
    assert colour[0] > 2 * colour[2]


def test_the_few_step_lora_changes_four_steps(gallery: Gallery) -> None:
    _, without, with_it = np.split(np.stack(pictures(gallery, "Few steps")), 3)
    assert all(not np.array_equal(one, other) for one, other in zip(without, with_it, strict=True))
