"""What ``sd-export`` shows of engine builds: a bar on a terminal while one runs, a line each at the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from sdrt.export.engines.process import OnPhase
from sdrt.export.engines.writer import EngineReport
from sdrt.runtime.bundle.engines import EngineManifest


@contextmanager
def build_bar(*, show: bool) -> Iterator[OnPhase]:
    """Inside, the yielded function moves a bar on the terminal; without ``show`` it does nothing."""
    if not show:
        yield lambda _phase, _fraction: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("", total=1.0)

        def move(phase: str, fraction: float) -> None:
            if fraction == 0.0:  # the next engine
                progress.reset(task)
            progress.update(task, description=phase, completed=fraction)

        yield move


def report_lines(reports: Sequence[EngineReport]) -> list[str]:
    """A heading and a line for each engine: sizes, attentions, plan, memory, time, comparison."""
    if not reports:
        return []
    key = reports[0].manifest.key
    targets = ", ".join(key.targets) or "any"
    heading = f"{key.flavour} {key.flavour_version}, compute capability {targets}:"
    return [heading, *(f"  {report.component}: {_facts(report)}" for report in reports)]


def _facts(report: EngineReport) -> str:
    manifest, facts = report.manifest, report.manifest.facts
    parts = [" or ".join(str(profile) for profile in manifest.key.profiles)]
    if "attention" in facts:
        parts.append(_attention(facts["attention"], facts.get("passes", {})))
    parts.append(f"{manifest.files[0].size / 1e6:.1f} MB")
    if "activation_bytes" in facts:
        parts.append(f"{facts['activation_bytes'] / 2**20:.0f} MiB of scratch memory")
    if report.new:
        parts.append(
            f"built in {facts['build_seconds']:.1f} s with {facts['peak_memory_bytes'] / 2**30:.1f} GiB"
        )
    else:
        parts.append("was there already")
    parts.append(f"compared with ONNX Runtime: {_compared(manifest)}")
    return "; ".join(parts)


def _attention(counts: Mapping[str, Any], passes: Mapping[str, Any]) -> str:
    written_out = len(passes.get("written_out", ()))
    total = counts["nodes"] + written_out
    fused = f"{counts['fused']} of {total} attentions fused" if total else "no attention"
    return f"{fused}, {written_out} written out" if written_out else fused


def _compared(manifest: EngineManifest) -> str:
    compared = manifest.facts.get("compared")
    if not isinstance(compared, list):
        return str(compared)
    worst = max(compared, key=lambda figure: float(figure["relative_l2"]))
    return f"{worst['relative_l2']:.1e} at most, {worst['tolerance']:.1e} allowed"
