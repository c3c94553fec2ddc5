"""What the machine can do at most, measured in the same run: matrix product and memory bandwidth.

    python -m sdrt.benchmarks.harness.ceilings [--device cuda] [--threads N] [--quick]

It runs as a process of its own, so that its memory and its thread pools are gone when the rest is measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sdrt.benchmarks.document.document import Ceilings
from sdrt.benchmarks.harness.free_memory import available_memory
from sdrt.runtime.backends.executor import usable_cores

SIDES: Final = (512, 1024, 2048, 3072)  # of the square matrices
QUICK_SIDES: Final = (512, 1024)
BEST_OF: Final = 5
_MIB: Final = 1 << 20
_CACHES_BEYOND: Final = 4  # arrays together are this many last-level caches
_MIN_ARRAY: Final = 64 * _MIB
_MAX_ARRAY: Final = 2048 * _MIB
_CHUNK: Final = 1 << 20  # elements that one thread works on at once


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print one line of JSON."""
    commands = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands.add_argument("--threads", type=int, default=usable_cores())
    commands.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    commands.add_argument("--quick", action="store_true", help="smaller matrices and arrays: a smoke run")
    arguments = commands.parse_args(argv)
    if arguments.device == "cuda":
        found = gpu_ceilings()
    else:
        found = measure_ceilings(arguments.threads, quick=arguments.quick)
    print(json.dumps(asdict(found)))
    return 0


def gpu_ceilings(device: str = "cuda", side: int = 8192, copied: int = 1 << 32) -> Ceilings:
    """A GPU's, by PyTorch: its fp16 matrix product and a copy within its memory.

    Args:
        device: Of PyTorch.
        side: Of the square matrices: large enough to fill every multiprocessor.
        copied: Bytes.
    """
    import torch

    a, b = (torch.randn(side, side, device=device, dtype=torch.float16) for _ in range(2))
    source = torch.empty(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def finished(work: Callable[[], object]) -> None:
        work()
        if device == "cuda":
            torch.cuda.synchronize()

    # Some of each, so that waiting for them is nothing beside them.
    product = best_seconds(lambda: finished(lambda: [torch.mm(a, b) for _ in range(10)])) / 10
    copy = best_seconds(lambda: finished(lambda: [target.copy_(source) for _ in range(10)])) / 10
    how = f"PyTorch's fp16 product of two {side} x {side} matrices, and copying {copied >> 20} MiB"
    return Ceilings(2 * side**3 / product, 2 * copied / copy, f"{how}; the best of {BEST_OF} times", "cuda")


def measure_ceilings(threads: int, *, quick: bool = False) -> Ceilings:
    """Both ceilings.

    NumPy's threads are those that ``OMP_NUM_THREADS`` allowed when it was imported.

    Args:
        threads: Of ONNX Runtime's matrix product and of the memory test.
        quick: Small sizes.
    """
    products = {"numpy": numpy_flop_per_s}
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError:
        pass  # `how` says what was measured
    else:
        products["ONNX Runtime"] = lambda side: onnxruntime_flop_per_s(side, threads)
    speeds = {
        (measure(side), name, side)
        for name, measure in products.items()
        for side in (QUICK_SIDES if quick else SIDES)
    }
    flop_per_s, name, side = max(speeds)
    array = array_bytes(last_level_cache(), available_memory() // (8 if quick else 1))
    bytes_per_s, kind = memory_bandwidth(array, threads)
    return Ceilings(
        flop_per_s,
        bytes_per_s,
        f"largest of {' and '.join(products)}: {name}'s fp32 product of two {side} x {side} matrices; "
        f"{kind} of arrays of {array // _MIB} MiB by NumPy in {threads} threads; the best of {BEST_OF} times",
    )


def numpy_flop_per_s(side: int) -> float:
    """NumPy's fp32 matrix product, random operands: products of zeros may run faster than real work."""
    a, b = _random(side), _random(side)
    out = np.empty_like(a)
    return 2 * side**3 / best_seconds(lambda: np.matmul(a, b, out=out))


def onnxruntime_flop_per_s(side: int, threads: int) -> float:
    """ONNX Runtime's fp32 MatMul by a constant, which it packs beforehand as it does with weights."""
    import onnx
    import onnxruntime

    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["a", "b"], ["c"])],
        "product",
        [helper.make_tensor_value_info("a", kind, [side, side])],
        [helper.make_tensor_value_info("c", kind, [side, side])],
        [onnx.numpy_helper.from_array(_random(side), "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    binding = session.io_binding()
    binding.bind_cpu_input("a", _random(side))
    binding.bind_output("c", "cpu")
    return 2 * side**3 / best_seconds(lambda: session.run_with_iobinding(binding))


def _random(side: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((side, side), dtype=np.float32)


def last_level_cache(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Bytes of the largest cache that a core can reach; 32 MiB where the system does not say."""
    units = {"K": 1024, "M": _MIB, "G": 1024 * _MIB}
    sizes = [0]
    for file in folder.glob("index*/size"):
        text = file.read_text(encoding="ascii").strip()
        sizes.append(int(text[:-1]) * units[text[-1]] if text[-1:] in units else int(text))
    return max(sizes) or 32 * _MIB


def array_bytes(cache: int, available: int) -> int:
    """Size of each of two arrays: well beyond the cache, and no more than a quarter of the free memory."""
    wanted = max(_MIN_ARRAY, _CACHES_BEYOND * cache // 2)
    return max(_MIB, min(wanted, _MAX_ARRAY, available // 8) // _MIB * _MIB)


def memory_bandwidth(array: int, threads: int) -> tuple[float, str]:
    """The larger of copying and of ``a = a + b``, in bytes read and written a second, and its name.

    Args:
        array: Bytes of each of the two arrays.
        threads: That share the work; NumPy lets go of the interpreter's lock inside.
    """
    a, b = np.ones(array // 4, np.float32), np.ones(array // 4, np.float32)

    def copy(part: slice) -> None:
        np.copyto(a[part], b[part])

    def add(part: slice) -> None:
        np.add(a[part], b[part], out=a[part])

    speeds = {
        2 * a.nbytes / best_seconds(lambda: _in_threads(copy, a.size, threads)): "copying",
        3 * a.nbytes / best_seconds(lambda: _in_threads(add, a.size, threads)): "adding",
    }
    return max(speeds), speeds[max(speeds)]


def _in_threads(work: Callable[[slice], None], elements: int, threads: int) -> None:
    def share(index: int) -> None:
        first, last = elements * index // threads, elements * (index + 1) // threads
        for start in range(first, last, _CHUNK):
            work(slice(start, min(start + _CHUNK, last)))

    workers = [threading.Thread(target=share, args=(index,)) for index in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def best_seconds(work: Callable[[], Any]) -> float:
    """The shortest of some times, after one that does not count: a ceiling is what can be reached."""
    work()
    seconds = []
    for _ in range(BEST_OF):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


if __name__ == "__main__":
    sys.exit(main())
