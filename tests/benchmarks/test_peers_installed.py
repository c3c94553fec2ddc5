"""Every peer that is installed draws with the embedded model: ``pytest -m peers``."""

from __future__ import annotations

from typing import Final

import pytest

from sdrt.benchmarks.harness import measure
from sdrt.benchmarks.options import parser
from sdrt.benchmarks.peers.registry import PEERS, is_installed
from tolerances import EMBEDDED_PSNR_DB

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("user_cache")]
# It knows the published architectures alone.
REFUSES: Final = {"stable-diffusion.cpp": "knows the published architectures alone"}


@pytest.mark.parametrize("name", PEERS)
def test_an_installed_peer_draws_what_pytorch_draws(name: str) -> None:
    if not is_installed(name):
        pytest.skip(f"not installed: sd-bench peers install {name}")
    words = ["emoji", "--backends", "none", "--peers", name, "--only", "warm,fidelity"]
    arguments = parser().parse_args([*words, "--quick", "--rounds", "1", "--steps", "4", "--quiet"])

    recorder = measure.measure(arguments, ["sd-bench", *words], lambda *_: None, RuntimeError)
    document = recorder.document(complete=True)
    if name in REFUSES:
        assert document.failures
        assert all(REFUSES[name] in failure.error for failure in document.failures)
        return
    assert document.failures == ()
    quantities = {entry.quantity for entry in document.measurements}
    assert quantities >= {"image", "step", "unet", "text_encoder", "vae_decoder", "vae_encoder", "memory"}
    (step,) = document.select("step")
    assert len(step.values) == 3
    psnr = [value for entry in document.select("psnr") for value in entry.values]
    assert len(psnr) == (name != "diffusers")  # which is the reference itself
    assert all(value is None or value >= EMBEDDED_PSNR_DB for value in psnr)
