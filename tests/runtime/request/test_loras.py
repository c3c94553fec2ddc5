"""Sets of LoRAs: when two are the same, and what each changes of which component."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdrt.runtime.lora.file import LoraFile
from sdrt.runtime.lora.library import Lora
from sdrt.runtime.lora.names import TensorKey
from sdrt.runtime.lora.weights import LoraWeights, short_name
from sdrt.runtime.request.loras import NO_LORAS, LoraSet, LoraUse, blended


class NoChange:
    """Is told apart, and never computed."""


def use(name: str, text_encoder: float, unet: float, *folders: str, tagged: bool = False) -> LoraUse:
    changes = {TensorKey(folder, "weight"): NoChange() for folder in folders}
    file = LoraFile(Path(name), f"sha of {name}", "kohya", changes, (), {})  # type: ignore[arg-type]
    return LoraUse(name, Lora(file, "0" * 12), LoraWeights(text_encoder, unet), tagged)


def test_sets_that_change_the_model_alike_are_equal() -> None:
    a, b = use("a", 1, 0.5, "unet"), use("b", 0, 0.25, "unet")
    assert LoraSet.of([a, b]) == LoraSet.of([b, a])
    assert hash(LoraSet.of([a, b])) == hash(LoraSet.of([b, a]))
    assert LoraSet.of([a]) != LoraSet.of([b])
    half = a._replace(weights=LoraWeights(0.5, 0.25))
    assert LoraSet.of([half, half._replace(name="c")]) == LoraSet.of([a])
    nothing = a._replace(weights=LoraWeights(0.0, -0.0))
    less = a._replace(weights=LoraWeights(-1, -0.5))
    assert LoraSet.of([nothing]) == LoraSet.of([a, less]) == LoraSet.of([]) == NO_LORAS
    assert LoraSet.of([a, nothing]) == LoraSet.of([a])


def test_each_component_has_its_weight_and_its_changes() -> None:
    """The text encoders' counts for both of SDXL's; a file that changes nothing there is none there."""
    wanted = LoraSet.of(
        [
            use("all", 0.5, 2, "text_encoder", "text_encoder_2", "unet"),
            use("second", 1, 1, "text_encoder_2"),
            use("deaf", 0, 1, "text_encoder", "unet"),
        ]
    )
    found = {
        component: {file.path.name: weight for file, weight in wanted.of_component(component)}
        for component in ("text_encoder", "text_encoder_2", "unet", "vae_decoder")
    }
    assert found == {
        "text_encoder": {"all": 0.5},
        "text_encoder_2": {"all": 0.5, "second": 1},
        "unet": {"all": 2, "deaf": 1},
        "vae_decoder": {},
    }
    for file, _ in wanted.of_component("unet"):
        assert [key.folder for key in file.changes] == ["unet"]


def test_weights_of_a_frame() -> None:
    """A tag and an option of one name stay two; what both ends have alike is not touched by rounding."""
    option, tag = use("a", 0.1, 0.7, "unet"), use("a", 1, 1, "unet", tagged=True)
    other = use("b", 1, 0.5, "unet", tagged=True)
    for share in (0.0, 0.3, 1.0):
        found = {
            (one.name, one.tagged): one.weights for one in blended([option, tag], [option, other], share)
        }
        assert found[("a", False)] == (0.1, 0.7)
        assert found[("a", True)] == pytest.approx((1 - share, 1 - share))
        assert found[("b", True)] == pytest.approx((share, share / 2))
    twice = blended([tag, tag], [tag, tag], 0.5)
    assert [one.weights for one in twice] == [(2, 2)]


@pytest.mark.parametrize(
    ("name", "short"),
    [("a/b.c.safetensors", "b.c"), ("pixel", "pixel"), ("styles/ink", "ink"), ("x.safetensors", "x")],
)
def test_what_a_prompt_would_call_it(name: str, short: str) -> None:
    assert short_name(name) == short
