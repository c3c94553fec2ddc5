"""The build of one engine, in a process of its own (`sdrt.export.engines.process` starts it).

A build takes gigabytes, prints from C++, may end in an abort, and cannot be stopped everywhere; here all of
that ends with the process. The job comes as a JSON file; events go out as JSON lines on a descriptor of their
own. When standard input ends (the parent wants no more, or is gone) the build stops.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from sdrt.export.engines.flavours import import_for_polygraphy
from sdrt.export.engines.layers import (
    Layer,
    check_attentions,
    layers_document,
    layers_from_inspector,
    layers_from_log,
    memory_from_log,
)
from sdrt.export.passes.attention import NARROWEST_HEAD, WIDEST_HEAD
from sdrt.runtime.backends.onnxruntime_cuda.library import NAME as ORT_CUDA
from sdrt.runtime.backends.trt.library import RTX
from sdrt.runtime.errors import BackendError, SdrtError
from sdrt.runtime.system.files import explain

GRACE: Final = 3.0  # seconds from the wish to stop to the end of the process
EVENT_INTERVAL: Final = 0.1  # seconds between two reports of progress inside a phase
_NO_KERNEL: Final = "not supported by a dedicated kernel"


class Events:
    """Events to the parent, one JSON object a line."""

    def __init__(self, descriptor: int) -> None:
        self._stream = os.fdopen(descriptor, "w", encoding="utf-8")
        self._lock = threading.Lock()

    def send(self, kind: str, **fields: Any) -> None:
        """Send one event; if nobody listens any more there is nothing left to do."""
        with self._lock:
            try:
                self._stream.write(json.dumps({"event": kind, **fields}) + "\n")
                self._stream.flush()
            except OSError:
                os._exit(1)


class Progress:
    """How far a build is, from TensorRT's tree of phases: each phase has steps, a step may hold a phase."""

    def __init__(self, events: Events, stop: threading.Event) -> None:
        self._events, self._stop = events, stop
        self._phases: dict[str, list[int]] = {}  # name → steps done, steps; outermost first
        self._sent = 0.0

    def phase_start(self, phase: str, _parent: str | None, steps: int) -> None:
        """A phase of ``steps`` steps begins."""
        self._phases[phase] = [0, max(steps, 1)]
        self._report(always=True)

    def step_complete(self, phase: str, step: int) -> bool:
        """Step number ``step`` is done; False asks TensorRT to stop."""
        if phase in self._phases:
            self._phases[phase][0] = step + 1
        self._report()
        return not self._stop.is_set()

    def phase_finish(self, phase: str) -> None:
        """A phase ends, with it those inside."""
        names = list(self._phases)
        for name in names[names.index(phase) :] if phase in names else ():
            del self._phases[name]
        self._report()

    def fraction(self) -> float:
        """Share of the steps that are done, 0 … 1."""
        part = 0.0
        for done, steps in reversed(self._phases.values()):
            part = min((done + part) / steps, 1.0)
        return part

    def _report(self, *, always: bool = False) -> None:
        now = time.monotonic()
        if self._phases and (always or now - self._sent >= EVENT_INTERVAL):
            self._sent = now
            self._events.send("progress", phase=list(self._phases)[-1], fraction=self.fraction())


def main(job_file: str, descriptor: str) -> int:
    """Build what the job says; the exit status is 0 or, after an ``error`` event, 1."""
    events = Events(int(descriptor))
    stop = threading.Event()
    threading.Thread(target=_watch, args=(stop,), daemon=True).start()
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    started = time.perf_counter()
    try:
        facts = build(job, events, stop)
    except SdrtError as error:
        events.send("error", message=str(error), status=error.exit_status)
        return 1
    except OSError as error:
        events.send("error", message=f"cannot write the engine: {explain(error)}", status=8)
        return 1
    except MemoryError:
        events.send("error", message="out of memory", status=BackendError.exit_status)
        return 1
    events.send("done", build_seconds=time.perf_counter() - started, peak_bytes=peak_memory(), facts=facts)
    return 0


def _watch(stop: threading.Event) -> None:
    """Wait for the end of standard input, then for the build to notice, then no longer."""
    while os.read(0, 4096):
        pass
    stop.set()
    time.sleep(GRACE)
    os._exit(1)


def build(job: Mapping[str, Any], events: Events, stop: threading.Event) -> dict[str, Any]:
    """Prepare the graph and build; write the plan and ``layers.json``; return what is worth recording.

    Raises:
        BackendError: The flavour cannot build this.
    """
    events.send("progress", phase="Preparing the graph", fraction=0.0)
    graph = Path(job["work"]) / "model.onnx"
    passes, attentions = prepare_graph(job, graph)
    facts: dict[str, Any] = {"passes": passes}
    if job["flavour"] == ORT_CUDA:
        graph.replace(job["plan"])
        return facts
    builder = _Builder(job, Progress(events, stop), attentions)
    layers = builder.write_plan(graph)
    report = check_attentions(attentions, layers, len(job["shapes"]))
    document = layers_document(layers, builder.source, len(job["shapes"]))
    Path(job["layers"]).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if report.decomposed and not job["allow_unfused"]:
        raise BackendError(
            f"TensorRT runs {len(report.decomposed)} of {report.nodes} attentions as separate kernels "
            f"({_some(report.decomposed)}): with larger or several sizes it takes the fused kernel; "
            "--allow-unfused-attention builds the engine as it is"
        )
    return {**facts, "attention": report.to_dict(), "layers": len(layers), **builder.memory}


def prepare_graph(job: Mapping[str, Any], path: Path) -> tuple[Any, list[str]]:
    """Rewrite a component's graph for its flavour and write it to ``path``; weights stay where they are.

    Returns:
        The passes' report, and the names of the Attention nodes that are left in the graph.
    """
    import onnx_ir as ir

    from sdrt.export.passes.pipeline import prepare_for_onnxruntime_cuda, prepare_for_tensorrt

    source = Path(job["model"])
    model = ir.load(source)
    if job["flavour"] == ORT_CUDA:
        report = prepare_for_onnxruntime_cuda(model, job["component"], job["precision"])
    else:
        report = prepare_for_tensorrt(model, job["component"], job["precision"], job["islands"])
    # New small tensors go into the graph, the rest is read from the component's own files through links.
    ir.save(model, path)
    for weights in map(Path, job["weights"]):
        link = path.parent / weights.relative_to(source.parent)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(weights.resolve())
    attentions = [str(node.name) for node in model.graph.all_nodes() if node.op_type == "Attention"]
    return dataclasses.asdict(report), attentions


class _Builder:
    """Polygraphy on one flavour, with the log kept and progress passed on."""

    def __init__(self, job: Mapping[str, Any], progress: Progress, attentions: Sequence[str]) -> None:
        self.trt: Any = import_for_polygraphy(job["flavour"])
        self.job, self.attentions = job, attentions
        self.messages: list[str] = []
        self.errors: list[str] = []
        self.memory: dict[str, int] = {}
        self.source = "builder log"
        self._logger = self._make_logger()
        self._monitor = self._make_monitor(progress)

    def write_plan(self, graph: Path) -> list[Layer]:
        """Parse, build, write the plan; return the engine's layers."""
        from polygraphy.backend.trt import engine_bytes_from_network, network_from_onnx_path
        from polygraphy.backend.trt import util as polygraphy_trt
        from polygraphy.exception import PolygraphyException
        from polygraphy.logger import G_LOGGER

        G_LOGGER.module_severity = G_LOGGER.CRITICAL + 1  # its lines would repeat ours
        polygraphy_trt.TRT_LOGGER = self._logger  # one per process, made at first use
        cache = self.job["timing_cache"]
        network = None
        try:
            parsed = network_from_onnx_path(str(graph), strongly_typed=True)
            network = parsed[1]
            plan = engine_bytes_from_network(
                parsed, config=self._config(parsed[0], network), save_timing_cache=cache
            )
        except PolygraphyException as error:
            raise BackendError(self._explain(str(error), network)) from error
        with Path(self.job["plan"]).open("wb") as stream:
            stream.write(plan)
            stream.flush()
            os.fsync(stream.fileno())
        self.memory = {**memory_from_log(self.messages), "plan_bytes": plan.nbytes}
        layers = layers_from_log(self.messages)
        if not layers:
            self.source, layers = "inspector", self._inspect(plan)
        return layers

    def _config(self, builder: Any, network: Any) -> Any:
        from polygraphy.backend.trt import Profile

        job, trt = self.job, self.trt
        profiles = []
        for shapes in job["shapes"]:
            profile = Profile()
            for name, corners in shapes.items():
                profile.add(name, *map(tuple, corners))
            profiles.append(profile)
        limits = {trt.MemoryPoolType.WORKSPACE: job["workspace"]} if job["workspace"] else None
        cache = job["timing_cache"]
        options = {
            "profiles": profiles,
            "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,
            "builder_optimization_level": job["level"],
            "memory_pool_limits": limits,
            "refittable": job["refit"],
            "max_aux_streams": 0,  # one stream is captured; more would only cost scratch memory
            "progress_monitor": self._monitor,
            "load_timing_cache": cache if cache and Path(cache).exists() else None,
        }
        config = self._create_config(options)(builder, network)
        config.clear_flag(trt.BuilderFlag.TF32)  # fp32 means fp32, as in the parity gate
        if self.job["flavour"] == RTX:
            # Without it an engine may allocate as it runs, and then it cannot be captured into a graph.
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        return config

    def _create_config(self, options: Mapping[str, Any]) -> Any:
        """Polygraphy's config loader; the flavours differ in how targets are named."""
        if self.job["flavour"] != RTX:
            from polygraphy.backend.trt import CreateConfig

            return CreateConfig(**options)
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        targets = [tuple(map(int, target.split("."))) for target in self.job["targets"]]
        return CreateConfigRTX(**options, use_gpu=self.job["current"], compute_capabilities=targets or None)

    def _explain(self, reason: str, network: Any) -> str:
        """What TensorRT said first, and what can be done about it where that is known."""
        said = self.errors[0] if self.errors else reason
        line = " ".join(said.split())
        component, level = self.job["component"], self.job["workspace"]
        if any(_NO_KERNEL in message for message in self.errors):
            return (
                f"TensorRT has no fused kernel for an attention of the {component} "
                f"({_some(self._suspects(network))}): it takes fp16 and bf16 with heads {NARROWEST_HEAD} to "
                f"{WIDEST_HEAD} wide; export the bundle with --fp16"
            )
        hint = ""
        if "within workspace limit" in line:
            allowed = f"{level >> 20}MiB" if level else "all there is"
            hint = f"; raise --workspace (now {allowed})"
        elif self.job["refit"] and "graph_jit" in line:
            hint = (
                "; with --refit TensorRT for RTX compiles on the GPU: build where there is one, or without it"
            )
        elif "cudaError" in line or "CUDA initialization" in line:
            hint = "; this build needs a GPU and its driver"
        elif "memory" in line.lower():
            hint = "; smaller sizes or a smaller --batch need less"
        return f"TensorRT cannot build the {component}: {line[:400]}{hint}"

    def _suspects(self, network: Any) -> list[str]:
        """The attentions, those first that no kernel can take; TensorRT does not say which it was."""
        found = []
        for index in range(network.num_layers if network is not None else 0):
            layer = network.get_layer(index)
            if layer.type == self.trt.LayerType.ATTENTION_INPUT:
                query = layer.get_input(0)
                width, name = query.shape[-1], layer.name.removesuffix("_AttentionInput")
                fits = query.dtype != self.trt.DataType.FLOAT and NARROWEST_HEAD <= width <= WIDEST_HEAD
                found.append((fits, f"{name}: {query.dtype.name}, heads {width} wide"))
        return [text for _, text in sorted(found, key=lambda entry: entry[0])]

    def _inspect(self, plan: Any) -> list[Layer]:
        """Open the plan and ask the inspector; none where that needs a GPU and there is none."""
        engine = self.trt.Runtime(self._logger).deserialize_cuda_engine(plan)
        if engine is None:
            return []
        text = engine.create_engine_inspector().get_engine_information(self.trt.LayerInformationFormat.JSON)
        return layers_from_inspector(json.loads(text))

    def _make_logger(self) -> Any:
        trt, messages, errors = self.trt, self.messages, self.errors

        class Logger(trt.ILogger):  # type: ignore[name-defined, misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                messages.append(message)
                if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                    errors.append(message)

        return Logger()

    def _make_monitor(self, progress: Progress) -> Any:
        trt = self.trt

        class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined, misc]
            def __init__(self) -> None:
                trt.IProgressMonitor.__init__(self)

            def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
                progress.phase_start(phase_name, parent_phase, num_steps)

            def step_complete(self, phase_name: str, step: int) -> bool:
                return progress.step_complete(phase_name, step)

            def phase_finish(self, phase_name: str) -> None:
                progress.phase_finish(phase_name)

        return Monitor()


def _some(names: Sequence[str], most: int = 3) -> str:
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def peak_memory(process: int | str = "self") -> int:
    """The most memory that a process has held so far, in bytes; 0 if it is gone."""
    # Not ru_maxrss: that starts with what the parent held when it forked.
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    except OSError:
        return 0
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
