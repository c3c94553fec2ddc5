"""What tables and drawings say of a run that measured only a part."""

from __future__ import annotations

from dataclasses import replace

from support.fakes.example_document import document, small_document

from sdrt.benchmarks.document.document import Measurement
from sdrt.benchmarks.report.formatting import time_text
from sdrt.benchmarks.report.plots import bars
from sdrt.benchmarks.report.tables import memory, overview, percentiles


def measured(quantity: str, value: float) -> Measurement:
    return Measurement("m", "a", quantity, 64, 64, 1, 10, (value,), (0,))


def test_notes_speak_only_of_what_is_in_the_table() -> None:
    whole = document()
    words = ("a cold start is", "PSNR and latent error are")
    assert all(word in overview(whole, whole.models[0]).note for word in words)
    assert "“its own” leaves out" in memory(whole, whole.models[0]).note
    warm = replace(small_document(), measurements=(measured("image", 1.0), measured("memory", 1e6)))
    (model,) = warm.models
    assert not any(word in overview(warm, model).note for word in words)
    assert memory(warm, model).note == "Peaks count mapped files, too."


def test_a_networks_times_name_no_steps() -> None:
    warm = replace(small_document(), measurements=(measured("image", 1.0), measured("unet", 0.1)))
    heads = [row.head for row in percentiles(warm, warm.models[0]).rows]
    assert heads == ["Warm image, 64×64, batch 1, 10 steps", "U-Net, 64×64, batch 1"]


def test_a_bar_shows_the_whole_that_was_measured_and_keeps_to_its_length() -> None:
    """Stages are timed apart: on a noisy machine they may add up to more."""
    entries = (measured("image", 1.0), measured("unet", 0.15), measured("vae_decoder", 0.5))
    warm = replace(small_document(), measurements=entries)
    drawn = bars(warm, warm.models[0], cold=False)
    assert drawn is not None
    assert ">1.00 s<" in drawn
    assert "2.00 s" not in drawn  # of 10 evaluations and the decoder


def test_a_moment_is_written_for_people() -> None:
    for moment in ("2026-11-26T17:37:55+00:00", "2026-11-26T17:37:55Z"):
        assert time_text(moment) == "2026-11-26 17:37:55 UTC"
