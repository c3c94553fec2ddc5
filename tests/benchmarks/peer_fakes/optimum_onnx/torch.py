"""torch as far as the workers of diffusers' pipelines know it; importing the real one takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from support.fakes.fake_record import note


class Tensor:
    def __init__(self, data: Any) -> None:
        self.data = data

    def numpy(self) -> Any:
        return self.data

    def float(self) -> Tensor:
        return self

    def cpu(self) -> Tensor:
        return self


def from_numpy(array: Any) -> Tensor:
    return Tensor(array)


def tensor(value: int, device: str) -> Tensor:
    assert device == "cpu"
    return Tensor(value)


def set_num_threads(threads: int) -> None:
    note("set_num_threads", threads=threads)


def no_grad() -> Callable[[Callable[[], object]], Callable[[], object]]:
    return lambda run: run
