"""A bundle's components on a backend: what every drawing needs, and the rest when it is first wanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from sdrt.runtime.backends.executor import Executor
from sdrt.runtime.backends.registry import Choice, load_executor
from sdrt.runtime.bundle.bundle import Bundle, Verify
from sdrt.runtime.bundle.families.components import CLASS_LABELS
from sdrt.runtime.bundle.families.stable_unclip import IMAGE_ENCODER
from sdrt.runtime.bundle.manifest import Manifest
from sdrt.runtime.checks import whole_from
from sdrt.runtime.devices.device import Device
from sdrt.runtime.drawing.condition_encoder import ConditionEncoder
from sdrt.runtime.drawing.text_conditioning import PromptEncoder
from sdrt.runtime.drawing.text_encoders import open_tokenizers, text_encoders
from sdrt.runtime.errors import BackendError, UsageError
from sdrt.runtime.request.ensemble import check_refiner
from sdrt.runtime.request.request import Request
from sdrt.runtime.request.texts import MAX_IMAGES
from sdrt.runtime.text.chunks import Blend, Prompt, PromptPlanner
from sdrt.runtime.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from sdrt.runtime.drawing.picture_conditioning import LabelEncoder

Loaded = TypeVar("Loaded")

MAX_DEVICES: Final = 64
AT_ONCE: Final = 2  # components that are loaded at the same time: loading one is partly single-threaded


def check_gpu(device: int, stream: object) -> None:
    if stream is not None:
        raise UsageError("device and stream were both given: a stream has its device, leave the number out")
    whole_from("device", device, 0, MAX_DEVICES - 1)


def condition_encoder(
    bundle: Bundle,
    executors: Mapping[str, Executor],
    device: Device,
    tokenizers: Sequence[Tokenizer] | None = None,
) -> ConditionEncoder:
    """What reads the conditions; tokenizers that are not given are opened."""
    limits = bundle.manifest.limits
    family = bundle.manifest.record
    if not family.reads_text:
        from sdrt.runtime.drawing.picture_conditioning import ImageEncoder

        (encoder,) = family.encoders
        return ImageEncoder(executors[encoder.component], encoder.gives, device, batch=limits.min_batch)
    return PromptEncoder(
        text_encoders(bundle, executors, open_tokenizers(bundle) if tokenizers is None else tokenizers),
        device,
        batch=limits.min_batch,
        most_texts=family.guided_rows * min(limits.max_batch, MAX_IMAGES),
        max_chunks=limits.max_chunks,
        max_clip_skip=limits.max_clip_skip,
    )


def label_encoder(bundle: Bundle, executors: Mapping[str, Executor], device: Device) -> LabelEncoder | None:
    """What makes class_labels of a picture, in a family whose U-Net reads them."""
    manifest = bundle.manifest
    if manifest.record.picture_input != CLASS_LABELS:
        return None
    from sdrt.runtime.drawing.picture_conditioning import LabelEncoder

    return LabelEncoder(executors[IMAGE_ENCODER.name], device, manifest)


def longest_prompt(bundle: Bundle, requests: Sequence[Request]) -> int:
    """The chunks of the longest prompt of some requests, before anything is loaded.

    Tokenizers are only read where a text could have more than one chunk: each token is a character or more.
    Embeddings, which have more tokens than their names, are not known yet.
    """
    conditions = [one for request in requests for one in (*request.conditions, *request.negatives)]
    ends = [end for one in conditions if isinstance(one, Blend) for end in (one.first, one.second)]
    prompts = [prompt for prompt in (*conditions, *ends) if isinstance(prompt, Prompt)]
    room = min((facts.max_length - 2 for facts in bundle.manifest.tokenizers), default=0)
    long = dict.fromkeys(
        prompt
        for prompt in prompts
        if prompt.text and (len(prompt.text.encode()) > room or "BREAK" in prompt.text)
    )
    if not long:
        return 1
    limits = bundle.manifest.limits
    planner = PromptPlanner(
        open_tokenizers(bundle), max_chunks=limits.max_chunks, max_clip_skip=limits.max_clip_skip
    )
    return max(len(planner.plan(prompt).chunks) for prompt in long)


def needed(bundle: Bundle) -> list[str]:
    """The components that every drawing needs, the largest first: it takes the longest to load."""
    return sorted(bundle.manifest.record.required, key=lambda name: -_size(bundle, name))


def executor_of(
    executors: dict[str, Executor], load_more: Callable[[str], Executor] | None, name: str
) -> Executor:
    """A component of ``executors``; one that is not there yet is loaded.

    Raises:
        BackendError: It cannot be.
    """
    if name not in executors:
        if load_more is None:
            raise BackendError(f"this pipeline was made without the {name}")
        executors[name] = load_more(name)
    return executors[name]


def load_component(
    bundle: Bundle, choice: Choice, device: Device, threads: int | None, verify: Verify, name: str
) -> Executor:
    if bundle.component(name).precision == "bf16":
        raise BackendError(
            f"{name} is in bfloat16, which the kernels around it do not read: "
            "export with --dtype fp16 or fp32"
        )
    return load_executor(bundle, name, backend=choice.name, device=device, threads=threads, verify=verify)


def _size(bundle: Bundle, component: str) -> int:
    return sum(entry.size for entry in bundle.component(component).files)


def load_refiner(
    manifest: Manifest, refiner: str | Path | Bundle, load: Callable[[Bundle], Loaded]
) -> Loaded:
    """Open the second bundle of an ensemble, see whether it fits the first, and load it.

    Args:
        manifest: The first bundle's.
        refiner: The second, or its folder.
        load: Loads it.

    Raises:
        UsageError: The two do not fit together.
    """
    bundle = refiner if isinstance(refiner, Bundle) else Bundle.open(refiner, verify=False)
    check_refiner(manifest, bundle.manifest)
    return load(bundle)
