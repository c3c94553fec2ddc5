"""The training loop that both stages share: budget, learning rate, averaging, saving, resuming.

A stage is a set of modules and a function that draws a batch and returns its loss. Everything random
comes from a generator seeded with (seed, step), so a resumed run repeats what an uninterrupted one does.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor, nn

LossFunction = Callable[[torch.Generator, float], Tensor]
"""(generator of this step's randomness, fraction of the budget used) → scalar loss."""


@dataclass(frozen=True)
class Options:
    """What a training run is told: where its state lives and how long and how fast it learns.

    The length is `steps` where given, else `minutes` of training time summed over all sittings.
    """

    state: Path
    minutes: float = 60.0
    steps: int | None = None
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    warm_up: float = 0.03
    average: float = 0.999
    clip_norm: float = 1.0
    seed: int = 0
    save_every: float = 120.0
    polite: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def fraction(self, step: int, seconds: float) -> float:
        """How much of the budget is used, 0…1."""
        used = step / self.steps if self.steps else seconds / (60.0 * self.minutes)
        return min(used, 1.0)


def learning_rate_at(fraction: float, peak: float, warm_up: float) -> float:
    """Linear warm-up to `peak`, then half a cosine down to 1 % of it."""
    if fraction < warm_up:
        return peak * (0.01 + 0.99 * fraction / warm_up)
    progress = (fraction - warm_up) / (1.0 - warm_up)
    return peak * (0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * progress)))


def generator_for(seed: int, step: int) -> torch.Generator:
    """The generator of one step. On the CPU on every device: a GPU run sees the same batches."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


class Average:
    """Exponential moving average of a module's parameters, in fp32.

    The decay grows from 0.1 to `decay` over the first steps, so that the start is forgotten fast.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move the average towards the module's present parameters."""
        decay = min(self.decay, (1 + step) / (10 + step))
        now = [p.detach() for _, p in module.named_parameters()]
        torch._foreach_lerp_(list(self.values.values()), now, 1.0 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Overwrite the module's parameters with the average."""
        for name, parameter in module.named_parameters():
            parameter.copy_(self.values[name])


def save_state(path: Path, state: dict[str, object]) -> None:
    """Write training state beside its place, then rename: a crash leaves the old file or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


def load_state(path: Path, device: torch.device | str = "cpu") -> dict[str, object]:
    """Read training state. Tensors and plain values only; a pickle with code in it is refused."""
    state: dict[str, object] = torch.load(path, map_location=device, weights_only=True)
    return state


def averaged_parameters(path: Path) -> dict[str, Tensor]:
    """The averaged parameters in a saved state."""
    parameters = load_state(path)["average"]
    assert isinstance(parameters, dict)
    return parameters


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Inside: SIGINT and SIGTERM no longer end the program but make the yielded function true."""
    received: list[int] = []

    def remember(number: int, _: FrameType | None) -> None:
        received.append(number)

    before = {s: signal.signal(s, remember) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(modules: nn.Module, loss_of: LossFunction, options: Options) -> Average:
    """Train `modules` until the budget is used or a signal comes; returns the averaged parameters.

    Picks up `options.state` where it exists and leaves it there at the end.
    """
    optimizer = torch.optim.AdamW(
        modules.parameters(),
        lr=options.learning_rate,
        betas=(0.9, 0.99),
        weight_decay=options.weight_decay,
        fused=True,
    )
    average = Average(modules, options.average)
    step, seconds = restore(modules, optimizer, average, options)
    clock = Clock(seconds)
    with stop_on_signal() as stopped:
        while not stopped() and (used := options.fraction(step, clock.seconds())) < 1.0:
            if options.polite:
                leave_busy_cores()
            rate = learning_rate_at(used, options.learning_rate, options.warm_up)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(generator_for(options.seed, step), used)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(modules.parameters(), options.clip_norm)
            optimizer.step()
            step += 1
            average.update(modules, step)
            clock.report(step, used, rate, loss)
            if clock.due(options.save_every):
                store(modules, optimizer, average, step, clock.seconds(), options)
    store(modules, optimizer, average, step, clock.seconds(), options)
    return average


def store(
    modules: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: Average,
    step: int,
    seconds: float,
    options: Options,
) -> None:
    """Save everything that `restore` needs."""
    state: dict[str, object] = {
        "modules": modules.state_dict(),
        "optimizer": optimizer.state_dict(),
        "average": average.values,
        "step": step,
        "seconds": seconds,
    }
    save_state(options.state, state)


def restore(
    modules: nn.Module, optimizer: torch.optim.Optimizer, average: Average, options: Options
) -> tuple[int, float]:
    """Load what `store` saved, if there is any. Returns (steps done, seconds trained)."""
    if not options.state.exists():
        return 0, 0.0
    state: dict = load_state(options.state, options.device)  # type: ignore[type-arg]
    modules.load_state_dict(state["modules"])
    optimizer.load_state_dict(state["optimizer"])
    average.values = state["average"]
    print(f"resumed {options.state} at step {state['step']}", flush=True)
    return state["step"], state["seconds"]


def leave_busy_cores() -> None:
    """Use one thread fewer for each other task that wants a core at this moment (Linux).

    PyTorch splits each operation evenly and waits for the slowest part. With a low priority (`nice`), a
    thread that shares its core with another program hardly runs, and the other threads wait for it.
    """
    time.sleep(0.002)  # by then this process's own workers are asleep
    fields = dict(line.split(maxsplit=1) for line in Path("/proc/stat").read_text().splitlines())
    others = int(fields["procs_running"]) - 1
    torch.set_num_threads(max(1, (os.cpu_count() or 1) - others))


class Clock:
    """Counts training seconds over all sittings and prints a progress line now and then."""

    def __init__(self, seconds_before: float, every: float = 20.0) -> None:
        self.start = time.monotonic() - seconds_before
        self.every = every
        self.saved = self.printed = time.monotonic()
        self.losses: list[Tensor] = []

    def seconds(self) -> float:
        """Seconds of training so far."""
        return time.monotonic() - self.start

    def due(self, interval: float) -> bool:
        """True once per `interval` seconds."""
        if time.monotonic() - self.saved < interval:
            return False
        self.saved = time.monotonic()
        return True

    def report(self, step: int, used: float, rate: float, loss: Tensor) -> None:
        """Print step, share of the budget, rate and the mean loss since the last line."""
        self.losses.append(loss.detach())
        elapsed = time.monotonic() - self.printed
        if elapsed < self.every:
            return
        mean = torch.stack(self.losses).mean().item()
        speed = len(self.losses) / elapsed
        print(
            f"{datetime.now(UTC):%H:%M:%S} step {step:6d}  {used:6.1%}  loss {mean:.5f}  "
            f"lr {rate:.2e}  {speed:.2f} steps/s",
            flush=True,
        )
        self.losses, self.printed = [], time.monotonic()


def add_arguments(parser: argparse.ArgumentParser, minutes: float) -> None:
    """The command line that both stages have in common."""
    parser.add_argument("--minutes", type=float, default=minutes, help="training time in all")
    parser.add_argument("--until", metavar="HH:MM", help="train until this time (UTC) instead")
    parser.add_argument("--steps", type=int, help="a number of steps instead of a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--polite", action="store_true", help="leave cores that others want")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")


def options_from(
    arguments: argparse.Namespace, state: Path, learning_rate: float, average: float = 0.999
) -> Options:
    """Options from the common command line; also sets up threads and the device."""
    torch.set_flush_denormal(True)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    name = arguments.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    minutes = arguments.minutes
    if arguments.until:
        minutes = minutes_until(arguments.until, datetime.now(UTC)) + minutes_done(state)
    return Options(
        state=state,
        minutes=minutes,
        steps=arguments.steps,
        learning_rate=learning_rate,
        average=average,
        seed=arguments.seed,
        polite=arguments.polite,
        device=torch.device(name),
    )


def minutes_until(clock_time: str, now: datetime) -> float:
    """Minutes from `now` to the next time the clock shows `HH:MM`."""
    hour, minute = map(int, clock_time.split(":"))
    end = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
    if end <= now:
        end += timedelta(days=1)
    return (end - now).total_seconds() / 60.0


def minutes_done(state: Path) -> float:
    """Minutes of training that a saved state already holds."""
    if not state.exists():
        return 0.0
    seconds = load_state(state)["seconds"]
    assert isinstance(seconds, float)
    return seconds / 60.0
