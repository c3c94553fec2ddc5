"""The child's side of the protocol between ``sd-bench`` and its workers, version 1.

A worker holds one subject. It reads requests from stdin and answers each on stdout, both as one JSON object
a line; what libraries print goes to stderr. A request is answered by ``{"ok": true, ...}`` or by
``{"ok": false, "error": "Type: message"}``. The parent's side is `sdrt.benchmarks.harness.worker_process`.

A script for a subject defines a class as `Subject` says and ends in ``sys.exit(serve(TheClass(...)))``.
"""

from __future__ import annotations

import itertools
import json
import os
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, TextIO

# NumPy is imported when it is first needed: it is a part of what a cold start pays for.
if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PROTOCOL: Final = 1
STAGES: Final = ("text_encoder", "unet", "vae_decoder", "vae_encoder")
SAMPLER: Final = "ddim"
# What a stage alone is given to read: any text does, since all are padded to one length.
STAGE_PROMPT: Final = "a red apple"
MAX_ERROR: Final = 500  # characters of an error that are passed on; the log has all of it


@dataclass(frozen=True)
class Drawing:
    """What is to be drawn: N pictures of one prompt, DDIM.

    Attributes:
        prompt: Text.
        negative_prompt: Text.
        latents: float32 [N, 4, h, w] of unit variance.
        seed: For a subject that cannot start from given latents.
        steps: Of the sampler.
        guidance_scale: Of every step.
        height: Pixels.
        width: Pixels.
    """

    prompt: str
    negative_prompt: str
    latents: NDArray[np.float32]
    seed: int
    steps: int
    guidance_scale: float
    height: int
    width: int

    @property
    def images(self) -> int:
        """N."""
        return int(self.latents.shape[0])


@dataclass
class Drawn:
    """What a subject gives back.

    Attributes:
        pixels: uint8 [N, H, W, 3], or a function that gives them, called after the clock has stopped.
        step_ends: When each step ended, by ``time.perf_counter``; empty where that cannot be seen. A subject
            that knows the mean of a step alone gives 0 and that.
        final_latents: float32 [N, 4, h, w] as the U-Net's space has them, or a function that gives them;
            None where the subject does not show them.
        why: The reason for that.
    """

    pixels: Any
    step_ends: list[float] = field(default_factory=list)
    final_latents: Any = None
    why: str = ""


class Subject(Protocol):
    """What is measured.

    Attributes:
        packages: Distributions whose versions matter.
        stages: Those of `STAGES` that it can run alone; final after `load`.
        notes: What differs from the others, a sentence each; final after `load`.
    """

    packages: Sequence[str]
    stages: Sequence[str]
    notes: Sequence[str]

    def import_packages(self) -> None:
        """Import what drawing needs."""
        ...

    def load(self, model: Path, threads: int) -> None:
        """Load the model so that it can draw, in fp32."""
        ...

    def draw(self, drawing: Drawing) -> Drawn:
        """Draw, from the prompt to the pixels."""
        ...

    def stage(self, name: str, height: int, width: int, images: int) -> Callable[[], object]:
        """A function that runs one stage once as a drawing of that many pictures does, on inputs made here.

        ``text_encoder`` reads the conditional and the unconditional text, ``unet`` is one evaluation on
        2 · N rows, ``vae_decoder`` and ``vae_encoder`` take N pictures.
        """
        ...


def serve(subject: Subject) -> int:
    """Answer requests until the end of stdin; the exit status is 0."""
    requests, answers = _private_pipes()
    worker = Worker(subject)

    def send(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer, ensure_ascii=False) + "\n")
        answers.flush()

    try:
        send({"ok": True, "event": "started", "protocol": PROTOCOL})
        for line in requests:
            if not line.strip():
                continue
            send(worker.answer(line))
    except (KeyboardInterrupt, BrokenPipeError):
        pass  # whoever asked is gone or going
    return 0


def _private_pipes() -> tuple[TextIO, TextIO]:
    """Stdin and stdout of the protocol; file descriptors 0 and 1 become harmless to those who use them."""
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return requests, answers


class Worker:
    """Requests in, answers out."""

    def __init__(self, subject: Subject) -> None:
        """Nothing is imported or loaded yet."""
        self._subject = subject
        self._loaded = False
        # Prepared stages of the size and batch that were asked for last: some compile a network.
        self._stages: dict[tuple[str, int, int, int], Callable[[], object]] = {}
        self._operations: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "load": self._load,
            "draw": self._draw,
            "stage": self._stage,
            "profile": self._profile,
        }

    def answer(self, line: str) -> dict[str, Any]:
        """The answer to one line; a failure of any kind is an answer too."""
        try:
            request = json.loads(line)
            if not isinstance(request, dict) or request.get("op") not in self._operations:
                raise ValueError(f"{line.strip()[:100]!r} is no request: op is {', '.join(self._operations)}")
            operation = request["op"]
            if operation != "load" and not self._loaded:
                raise RuntimeError(f"{operation} was asked for, but no model is loaded: load comes first")
            return {"ok": True, **self._operations[operation](request)}
        except (Exception, SystemExit) as error:  # whatever a library raises is a row of the report
            traceback.print_exc()
            return {"ok": False, "error": one_line(error)}

    def _load(self, request: dict[str, Any]) -> dict[str, Any]:
        subject = self._subject
        model, threads = Path(needed(request, "model")), int(needed(request, "threads"))
        started = time.perf_counter()
        subject.import_packages()
        imported = time.perf_counter()
        subject.load(model, threads)
        loaded = time.perf_counter()
        self._loaded = True
        return {
            "import_seconds": imported - started,
            "load_seconds": loaded - imported,
            "versions": versions(subject.packages),
            "stages": list(subject.stages),
            "notes": list(subject.notes),
        }

    def _draw(self, request: dict[str, Any]) -> dict[str, Any]:
        drawing = _drawing(request)
        started = time.perf_counter()
        drawn = self._subject.draw(drawing)
        seconds = time.perf_counter() - started
        answer: dict[str, Any] = {"seconds": seconds, "images": drawing.images}
        ends = drawn.step_ends
        answer["step_seconds"] = [after - before for before, after in itertools.pairwise(ends)]
        answer["save_seconds"] = _save(request, drawing, drawn)
        if drawn.final_latents is None and request.get("final_latents"):
            answer |= {"final_latents": None, "why": drawn.why}
        return answer

    def _stage(self, request: dict[str, Any]) -> dict[str, Any]:
        name, stages = needed(request, "stage"), self._subject.stages
        if name not in stages:
            raise ValueError(f"{name} cannot be run alone here, only {', '.join(stages) or 'none'}")
        repeats, height, width, images = (
            int(needed(request, key)) for key in ("repeats", "height", "width", "batch")
        )
        run = self._prepared(name, height, width, images)
        run()
        seconds = []
        for _ in range(repeats):
            started = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - started)
        return {"seconds": seconds}

    def _profile(self, request: dict[str, Any]) -> dict[str, Any]:
        profile = getattr(self._subject, "profile", None)  # of the peers nobody asks for it
        if profile is None:
            raise ValueError("this subject is not profiled")
        found: dict[str, Any] = profile(int(needed(request, "batch")))
        return found

    def _prepared(self, name: str, height: int, width: int, images: int) -> Callable[[], object]:
        key = (name, height, width, images)
        if any(other[1:] != key[1:] for other in self._stages):
            self._stages.clear()
        if key not in self._stages:
            self._stages[key] = self._subject.stage(name, height, width, images)
        return self._stages[key]


def _drawing(request: dict[str, Any]) -> Drawing:
    import numpy as np

    if request.get("sampler", SAMPLER) != SAMPLER:
        raise ValueError(f"sampler is {request['sampler']!r}: workers know {SAMPLER}")
    latents = np.load(needed(request, "latents"))
    if latents.ndim != 4 or latents.dtype != np.float32:
        raise ValueError(f"latents are {latents.dtype}{list(latents.shape)}: float32 [N, C, h, w] is wanted")
    return Drawing(
        prompt=needed(request, "prompt"),
        negative_prompt=request.get("negative_prompt") or "",
        latents=latents,
        seed=int(request.get("seed") or 0),
        steps=int(needed(request, "steps")),
        guidance_scale=float(needed(request, "guidance_scale")),
        height=int(needed(request, "height")),
        width=int(needed(request, "width")),
    )


def _save(request: dict[str, Any], drawing: Drawing, drawn: Drawn) -> float:
    """Write what was asked for; seconds that the first picture's PNG took."""
    import numpy as np

    seconds = 0.0
    if request.get("image") or request.get("pixels"):
        pixels = _given(drawn.pixels)
        shape = (drawing.images, drawing.height, drawing.width, 3)
        if pixels.dtype != np.uint8 or pixels.shape != shape:
            found = f"{pixels.dtype}{list(pixels.shape)}"
            raise ValueError(f"the pictures are {found}, not uint8{list(shape)} as asked for")
        if request.get("image"):
            started = time.perf_counter()
            from PIL import Image

            Image.fromarray(pixels[0]).save(request["image"], format="PNG")
            seconds = time.perf_counter() - started
        if request.get("pixels"):
            _write(request["pixels"], pixels)
    if request.get("final_latents") and drawn.final_latents is not None:
        _write(request["final_latents"], np.asarray(_given(drawn.final_latents), dtype=np.float32))
    return seconds


def _given(value: Any) -> Any:
    return value() if callable(value) else value


def _write(path: str, array: NDArray[Any]) -> None:
    import numpy as np

    with Path(path).open("wb") as stream:  # a name without .npy stays as it is
        np.save(stream, array)


def needed(request: dict[str, Any], key: str) -> Any:
    """A field that a request must have.

    Raises:
        ValueError: It is missing.
    """
    if request.get(key) is None:
        raise ValueError(f"the request {request['op']} needs the field {key}")
    return request[key]


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Installed versions; a package that is not there is left out."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def one_line(error: BaseException) -> str:
    """An exception's type and message on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:MAX_ERROR] if text else type(error).__name__


def random_array(*shape: int) -> NDArray[np.float32]:
    """Normal numbers for a stage to work on, float32."""
    import numpy as np

    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
