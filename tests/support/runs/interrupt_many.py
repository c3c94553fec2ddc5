"""Interrupt a command at random moments of its start, many times: run this file.

Right is an end within a second, with 130, a line that says so and no traceback, and nothing unfinished left.
A signal that comes before the command's first line, while Python itself starts, is Python's: it is counted
apart.
"""

from __future__ import annotations

import argparse
import collections
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

BIN: Final = Path(sys.executable).parent
# Long enough to be interrupted: whatever the moment, they are not done.
COMMANDS: Final = {
    "sd-run": ("a red apple", "--steps", "400", "--num-images", "64"),
    "sd-export": (str(Path(__file__).parents[3] / "models/emoji"), "out"),
    "sd-bench": ("emoji", "--quick", "--peers", "none", "--only", "cold", "--cold-rounds", "1000"),
}
SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
HANGS: Final = 20.0  # seconds after which a process is taken to hang
SOON: Final = 1.0
ENDED: Final = "ended with 130"
BEFORE: Final = "before the command's first line: died of the signal, or of Python's KeyboardInterrupt"
SWALLOWED: Final = "before the command's first line: swallowed by Python, which went on"
RIGHT: Final = (ENDED, BEFORE, SWALLOWED)


@dataclass(frozen=True, slots=True)
class Interrupted:
    """How one process took its signal.

    Attributes:
        moment: Seconds from its start to the signal.
        seconds: From the signal to its end.
        outcome: One of ``RIGHT``, or what is wrong.
    """

    moment: float
    seconds: float
    outcome: str


def interrupt(words: Sequence[str], number: signal.Signals, moment: float) -> Interrupted:
    """Start a command in an empty folder and send it a signal that many seconds later."""
    with tempfile.TemporaryDirectory(prefix="sdrt-interrupt-") as folder:
        began = time.perf_counter()
        process = subprocess.Popen(
            [str(BIN / words[0]), *words[1:]],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        time.sleep(max(0.0, began + moment - time.perf_counter()))
        process.send_signal(number)
        sent = time.perf_counter()
        try:
            _, said = process.communicate(timeout=HANGS)
        except subprocess.TimeoutExpired:
            process.kill()
            _, said = process.communicate()
            return Interrupted(moment, HANGS, SWALLOWED if _is_of_python(said) else f"hangs: {said}")
        seconds = time.perf_counter() - sent
        return Interrupted(moment, seconds, _outcome(process.returncode, said, Path(folder)))


def _outcome(status: int, said: str, folder: Path) -> str:
    left = [path.name for path in folder.iterdir() if path.suffix != ".png" or path.name.startswith(".")]
    if left:
        return f"left {', '.join(left)}"
    if status == 130 and "interrupted" in said.splitlines()[-1] and "Traceback" not in said:
        return ENDED
    if (status in [-number for number in SIGNALS] and not said) or _is_of_python(said):
        return BEFORE
    return f"status {status}: {said}"


def _is_of_python(said: str) -> bool:
    """Whether it tells of a KeyboardInterrupt before `console.enter.enter`: from there on is none."""
    return "KeyboardInterrupt" in said and ", in enter" not in said


def interrupt_many(
    words: Sequence[str], count: int, longest: float, seed: int, signals: Sequence[signal.Signals] = SIGNALS
) -> list[Interrupted]:
    """Interrupt a command ``count`` times, each at a random moment up to ``longest`` seconds."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    generator = random.Random(seed)
    return [
        interrupt(words, signals[index % len(signals)], generator.uniform(0.0, longest))
        for index in range(count)
    ]


def main() -> int:
    """Count, and tell; the status is 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--command", choices=COMMANDS, default="sd-run", help="by default sd-run")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--longest", type=float, default=0.6, metavar="SECONDS", help="latest moment")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--only-sigint", action="store_true", help="not SIGTERM and SIGHUP in turn")
    arguments = parser.parse_args()
    words = (arguments.command, *COMMANDS[arguments.command])
    signals = SIGNALS[:1] if arguments.only_sigint else SIGNALS
    results = interrupt_many(words, arguments.count, arguments.longest, arguments.seed, signals)
    for outcome, times in collections.Counter(result.outcome for result in results).most_common():
        moments = [result.moment for result in results if result.outcome == outcome]
        print(f"{times:6}  {outcome}  (signals at {min(moments):.3f} to {max(moments):.3f} s)")
    late = [result for result in results if result.outcome != SWALLOWED and result.seconds > SOON]
    print(f"{len(late):6}  took longer than {SOON:g} s")
    return int(bool(late) or any(result.outcome not in RIGHT for result in results))


if __name__ == "__main__":
    sys.exit(main())
