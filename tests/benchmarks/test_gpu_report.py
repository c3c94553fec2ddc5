"""The page that ``make gpu`` writes: every figure in its place, and what did not run said plainly."""

from __future__ import annotations

from typing import Any

import pytest

from sdrt.benchmarks.gpu_report import HEADINGS, markdown


def _stats(value: float) -> dict[str, float]:
    return {"median": value, "lowest": value / 2, "highest": value * 2}


def _document() -> dict[str, Any]:
    stages = {name: _stats(0.004) for name in ("step", "text_encoder", "vae_decoder")}
    row = {
        "batch": 1,
        "steps": 20,
        "repeats": 3,
        "contenders": {
            "sdrt tensorrt": {**stages, "total": _stats(0.25), "ratio_to_diffusers": _stats(0.5)},
            "diffusers": {**stages, "total": _stats(0.5), "ratio_to_diffusers": _stats(1.0)},
        },
    }
    timings = {
        "size": 512,
        "guided_step_flop": 1_600_000_000_000,
        "contenders": {
            "sdrt tensorrt": {"load_seconds": 2.0, "batch_1": {"warm_up_seconds": 1.0}},
            "torch.compile": {"not_run": "RuntimeError: no compiler"},
            "diffusers": {"load_seconds": 2.0, "batch_4": {"not_run": "out of time"}},
        },
        "fidelity": {
            "sdrt tensorrt": {"finite": False, "latents_rms": 1.0, "relative_l2_to_diffusers": 0.002},
            "diffusers": {"finite": True, "latents_rms": 1.0, "relative_l2_to_diffusers": 0.0},
        },
        "rows": [row, {"batch": 4, "steps": 20, "not_run": "out of time"}],
    }
    return {
        "sdrt": "0.1.0",
        "stages": {
            "facts": {
                "status": "ran",
                "data": {"gpu": "NVIDIA H100", "compute_capability": "9.0", "versions": {"torch": "2.11"}},
            },
            "ceilings": {"status": "ran", "data": {"fp16_flop_per_s": 8e14, "bytes_per_s": 3e12}},
            "tests": {"status": "ran", "last_line": "31 passed in 40.00s"},
            "engine sd15 tensorrt-rtx": {"status": "failed", "reason": "exit status 7: no kernel for 9.0"},
            "timings sd15": {"status": "ran", "data": timings},
            "launches sd15": {
                "status": "ran",
                "data": {
                    "tensorrt": {"launches": 1.0, "waits": 0.0, "copies": 0.0, "allocations": 0.0},
                    "onnxruntime-cuda": {"not_run": "BackendError: not installed"},
                },
            },
            "profile sd15 onnxruntime-cuda": {
                "status": "ran",
                "data": {
                    "onnxruntime-cuda": {
                        "batch 1": {
                            "gpu_ms": 16.8,
                            "launches": 2076.0,
                            "kernels": [{"name": "nchw<a|b>", "ms": 3.3, "launches": 107.0}],
                        },
                        "batch 4": {"not_run": "RuntimeError: no profiler"},
                    }
                },
            },
            "compiled sd15": {"status": "failed", "reason": "stopped after 90 s", "data": timings},
            "memory sd15 tensorrt": {"status": "ran", "data": {"tensorrt": {"bytes": 3 * 2**30}}},
        },
    }


@pytest.mark.parametrize(
    "words",
    [
        "# NVIDIA H100",
        "800 TFLOP/s in fp16, 3.00 TB/s",
        "31 passed",
        # 1.6 TFLOP in 4 ms are 400 TFLOP/s: half of the ceiling.
        "| 1 | 20 | sdrt tensorrt | 4.00 | 50% | 4.00 | 4.00 | 0.250 | 0.50 (0.25 … 1.00) |",
        "| 4 | 20 | not run: out of time |",
        "torch.compile did not run: RuntimeError: no compiler",
        "diffusers, batch 4: not run: out of time",
        "differ from diffusers' (same precision) by 2.0e-03",
        "**NaN or infinity in the latents**",
        "tensorrt: per step 1 launches, 0 waits, 0 copies, 0 allocations",
        "onnxruntime-cuda: launches not measured: BackendError: not installed",
        "3.00 GiB of GPU memory",
        "## sd15, 512 × 512, fp16, guidance on, beside torch.compile",
        'torch.compile with mode="reduce-overhead"',
        "compiled sd15: stopped after 90 s",
        "## Kernels of a step: sd15 onnxruntime-cuda, batch 1",
        "16.80 ms on the GPU in 2076 kernels and copies.",
        r"| 3.300 | 107 | `nchw<a\|b>` |",
        "Kernels of sd15 onnxruntime-cuda, batch 4: not measured: RuntimeError: no profiler",
        "engine sd15 tensorrt-rtx: exit status 7: no kernel for 9.0",
    ],
)
def test_the_page_says(words: str) -> None:
    assert words in markdown(_document())


def test_all_rows_of_a_table_have_its_columns() -> None:
    page = markdown(_document()).partition("## Host work")[0]
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert len(rows) == 2 * 5
    assert {row.count("|") for row in rows} == {len(HEADINGS) + 1}


def test_a_run_that_ended_early_still_makes_a_page() -> None:
    page = markdown({"sdrt": "0.1.0", "stages": {"tests": {"status": "not run", "reason": "no time"}}})
    assert "tests: no time" in page
