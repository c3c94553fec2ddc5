"""The result of ``make gpu`` as a page of Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

HEADINGS: Final = (
    "batch",
    "steps",
    "",
    "step, ms",
    "of the ceiling",
    "text encoder, ms",
    "VAE decoder, ms",
    "image, s",
    "to diffusers",
)

COMPILED: Final = (
    'Measured in a run of its own, after all others. torch.compile with mode="reduce-overhead": default '
    'kernels in CUDA graphs. mode="max-autotune" may be faster, but had not compiled SD 1.5 after 330 s '
    "on an H100."
)

Stages = Mapping[str, Mapping[str, Any]]


def markdown(document: Mapping[str, Any]) -> str:
    """A page with the machine, the tests, the timings and what could not run.

    Args:
        document: ``sdrt`` (version) and ``stages``, as `sdrt.benchmarks.gpu` writes them.
    """
    stages: Stages = document["stages"]
    return (
        "\n".join(
            [
                *_machine(document),
                *_tests(stages),
                *_timings(stages),
                *_host(stages),
                *_kernels(stages),
                *_rest(stages),
            ]
        )
        + "\n"
    )


def _data(stages: Stages, name: str) -> Mapping[str, Any]:
    data: Mapping[str, Any] = stages.get(name, {}).get("data") or {}
    return data


def _machine(document: Mapping[str, Any]) -> Iterator[str]:
    stages = document["stages"]
    facts, ceilings = _data(stages, "facts"), _data(stages, "ceilings")
    yield f"# {facts.get('gpu', 'unknown GPU')}"
    yield ""
    yield (
        f"`make gpu`, sdrt {document['sdrt']}, compute capability {facts.get('compute_capability', '?')}, "
        f"Python {facts.get('python', '?')}"
    )
    versions = facts.get("versions", {})
    yield ""
    yield ", ".join(f"{name} {number or 'not installed'}" for name, number in versions.items())
    if ceilings:
        yield ""
        yield (
            f"Measured ceilings: {ceilings['fp16_flop_per_s'] / 1e12:.0f} TFLOP/s in fp16, "
            f"{ceilings['bytes_per_s'] / 1e12:.2f} TB/s."
        )


def _tests(stages: Stages) -> Iterator[str]:
    tests = stages.get("tests")
    if tests:
        yield ""
        yield f"Tests marked `gpu`: {tests.get('last_line') or tests.get('reason')}"


def _timings(stages: Stages) -> Iterator[str]:
    peak = _data(stages, "ceilings").get("fp16_flop_per_s")
    for name in stages:
        kind, _, architecture = name.partition(" ")
        data = _data(stages, name)
        if kind not in ("timings", "compiled") or not data:
            continue
        beside = ", beside torch.compile" if kind == "compiled" else ""
        yield ""
        yield f"## {architecture}, {data['size']} × {data['size']}, fp16, guidance on{beside}"
        yield ""
        if beside:
            yield COMPILED
            yield ""
        yield f"| {' | '.join(HEADINGS)} |"
        yield "|---" * len(HEADINGS) + "|"
        for row in data.get("rows", []):
            yield from _row(row, data["guided_step_flop"], peak)
        yield from _contenders(data)


def _row(row: Mapping[str, Any], flop: int, peak: float | None) -> Iterator[str]:
    head = f"| {row['batch']} | {row['steps']} |"
    if "not_run" in row:
        yield f"{head} not run: {row['not_run']} |" + " |" * (len(HEADINGS) - 3)
        return
    for name, stages in row["contenders"].items():
        step = stages["step"]["median"]
        share = f"{flop * row['batch'] / step / peak:.0%}" if peak else "?"
        ratio = stages.get("ratio_to_diffusers")
        cells = [
            name,
            f"{step * 1e3:.2f}",
            share,
            f"{stages['text_encoder']['median'] * 1e3:.2f}",
            f"{stages['vae_decoder']['median'] * 1e3:.2f}",
            f"{stages['total']['median']:.3f}",
            f"{ratio['median']:.2f} ({ratio['lowest']:.2f} … {ratio['highest']:.2f})" if ratio else "?",
        ]
        yield f"{head} {' | '.join(cells)} |"


def _contenders(data: Mapping[str, Any]) -> Iterator[str]:
    lines = []
    for name, record in data.get("contenders", {}).items():
        if "not_run" in record:
            lines.append(f"- {name} did not run: {record['not_run']}")
        for key, value in record.items():
            if isinstance(value, Mapping) and "not_run" in value:
                lines.append(f"- {name}, {key.replace('_', ' ')}: not run: {value['not_run']}")
    for name, figures in data.get("fidelity", {}).items():
        error = figures.get("relative_l2_to_diffusers")
        if error is not None and name != "diffusers":
            lines.append(
                f"- {name}: final latents differ from diffusers' (same precision) by {error:.1e}, relative L2"
            )
        if not figures["finite"]:
            lines.append(f"- {name}: **NaN or infinity in the latents**")
    if lines:
        yield ""
        yield from lines


_UNSEEN: Final = "PyTorch's profiler does not list the launch of a graph by the driver's own function"


def _host(stages: Stages) -> Iterator[str]:
    lines = []
    for name in stages:
        kind, _, rest = name.partition(" ")
        for backend, figures in _data(stages, name).items() if kind in ("launches", "memory") else ():
            if "not_run" in figures:
                lines.append(f"- {rest}, {backend}: {kind} not measured: {figures['not_run']}")
            elif kind == "launches":
                counts = ", ".join(
                    f"{figures[key]:g} {key}" for key in ("launches", "waits", "copies", "allocations")
                )
                unseen = "" if figures["launches"] else f" ({_UNSEEN})"
                lines.append(f"- {rest}, {backend}: per step {counts}{unseen}")
            else:
                lines.append(f"- {rest}: {figures['bytes'] / 2**30:.2f} GiB of GPU memory")
    if lines:
        yield ""
        yield "## Host work and memory"
        yield ""
        yield from lines


def _kernels(stages: Stages) -> Iterator[str]:
    for name in stages:
        kind, _, rest = name.partition(" ")
        for figures in _data(stages, name).values() if kind == "profile" else ():
            for batch, found in figures.items():
                yield ""
                if "not_run" in found:
                    yield f"Kernels of {rest}, {batch}: not measured: {found['not_run']}"
                    continue
                yield f"## Kernels of a step: {rest}, {batch}"
                yield ""
                yield f"{found['gpu_ms']:.2f} ms on the GPU in {found['launches']:g} kernels and copies."
                yield ""
                yield "| ms | launches | kernel |"
                yield "|---|---|---|"
                for kernel in found["kernels"]:
                    text = kernel["name"].replace("|", "\\|")
                    yield f"| {kernel['ms']:.3f} | {kernel['launches']:g} | `{text}` |"


def _rest(stages: Stages) -> Iterator[str]:
    missed = {name: stage["reason"] for name, stage in stages.items() if stage["status"] != "ran"}
    if missed:
        yield ""
        yield "## What did not run"
        yield ""
        for name, reason in missed.items():
            yield f"- {name}: {reason}"
