"""What a pipeline leaves behind, and what becomes of it in a forked process or a pickle."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdrt.runtime.errors import UsageError
from sdrt.runtime.pipeline import Pipeline

BACKENDS = {"onnxruntime-cpu": 8, "openvino-cpu": 2}  # and how often each is loaded: the second takes long
# ONNX Runtime's own reporting has a thread that no child can end; whoever loads it has it off.
ENVIRONMENT = {**os.environ, "ORT_DISABLE_TELEMETRY": "1"}


def python(code: str, *arguments: object) -> str:
    """Run a few lines in a process of their own, and give what they print."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=ENVIRONMENT,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


# --- nothing is left


FLAT = """
import gc, os, sys
gc.disable()
import numpy as np
from sdrt.runtime import Pipeline, SdrtError

def one():
    try:
        pipeline = Pipeline.load(sys.argv[1], backend=sys.argv[2], verify=False)
    except SdrtError:
        return
    arguments = dict(seed=1, num_inference_steps=2, callback_on_step_end=lambda *_: None)
    pipeline("a", num_images_per_prompt=2, **arguments)
    pipeline("a", image=np.zeros((16, 16, 3), np.uint8), **arguments)

def used():
    pages = int(open("/proc/self/statm").read().split()[1])
    return len(os.listdir("/proc/self/task")), pages * os.sysconf("SC_PAGESIZE") / 1e6

gc.collect()
for _ in range(int(sys.argv[3])):
    one()
threads, megabytes = used()
for _ in range(int(sys.argv[3])):
    one()
more = [now - before for now, before in zip(used(), (threads, megabytes))]
gc.set_debug(gc.DEBUG_SAVEALL)
gc.collect()
ours = {type(found).__name__ for found in gc.garbage if type(found).__module__.startswith("sdrt")}
print(more[0], round(more[1]), sorted(ours))
"""


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [False, True], ids=["drawn", "refused"])
def test_threads_and_memory_are_free_at_once(bundle_copy: Path, backend: str, bad: bool) -> None:
    """Without a garbage collection: nothing refers to itself."""
    if bad:
        graph = bundle_copy / "unet" / "model.onnx"
        graph.write_bytes(bytes(100) + graph.read_bytes()[100:])
    threads, megabytes, ours = python(FLAT, bundle_copy, backend, BACKENDS[backend]).split(maxsplit=2)
    # A thread that was told to end may need a moment; what stays would be there that many times.
    assert int(threads) <= 2
    assert int(megabytes) <= 2 * BACKENDS[backend]  # as much as the allocator's share varies
    assert ours == "[]\n"


# --- another process


FORK = """
import os, signal, sys
from sdrt.runtime import Pipeline, UsageError

pipeline = Pipeline.load(sys.argv[1], backend=sys.argv[2])
arguments = dict(seed=5, num_inference_steps=2, output_type="numpy")
expected = pipeline("a", **arguments).images
child = os.fork()
if not child:
    signal.alarm(60)  # a hang is no success
    for call in (lambda: pipeline("a"), lambda: pipeline.interpolate("a", "b", frames=2)):
        try:
            call()
        except UsageError as error:
            print(error, flush=True)
    with pipeline:
        pass
    with Pipeline.load(sys.argv[1], backend=sys.argv[2]) as own:
        assert (own("a", **arguments).images == expected).all()
    del pipeline, own
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
assert (pipeline("a", **arguments).images == expected).all()
"""


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_forked_child_loads_its_own(tiny_bundle: Path, backend: str) -> None:
    """Neither drawing there, nor closing, nor the child's end hangs; loading anew works."""
    line = (
        "the pipeline was loaded before this process was forked from another, where its threads have stayed: "
        "call Pipeline.load in the child\n"
    )
    assert python(FORK, tiny_bundle, backend) == 2 * line


def test_a_forked_worker_is_refused(tiny_bundle: Path) -> None:
    code = """
    import multiprocessing, sys
    from sdrt.runtime import Pipeline

    pipeline = Pipeline.load(sys.argv[1], backend="onnxruntime-cpu")

    def draw(prompt):
        try:
            return len(pipeline(prompt).images)
        except ValueError as error:
            return str(error)

    with multiprocessing.get_context("fork").Pool(1) as pool:
        print(pool.apply_async(draw, ("a",)).get(60))
    """
    assert python(code, tiny_bundle).endswith("call Pipeline.load in the child\n")


@pytest.mark.parametrize("hand_on", [pickle.dumps, copy.copy, copy.deepcopy])
def test_it_is_not_pickled_or_copied(tiny_bundle: Path, hand_on: Callable[[Any], Any]) -> None:
    with (
        Pipeline.load(tiny_bundle, backend="onnxruntime-cpu") as pipeline,
        pytest.raises(UsageError, match=r"cannot be pickled or copied.*call Pipeline\.load with it"),
    ):
        hand_on(pipeline)
