"""The LoRAs of a call: those that it names, those that its prompts name, and those that are active."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from sdrt.runtime.checks import flag
from sdrt.runtime.errors import UsageError
from sdrt.runtime.lora.library import Lora, LoraLibrary
from sdrt.runtime.lora.weights import LoraWeights, checked_weights, short_name
from sdrt.runtime.request.recipes import check_lora, checked_digests, refuse_missing_lora
from sdrt.runtime.text.syntax import LoraTag, PromptSyntaxWarning

if TYPE_CHECKING:
    from sdrt.runtime.lora.file import LoraFile


class LoraUse(NamedTuple):
    """A LoRA that an image is drawn with.

    Attributes:
        name: As the caller has it: an adapter's, a path, or what a prompt says.
        lora: Its file.
        weights: How strongly it changes the model.
        tagged: Whether the prompt asks for it.
    """

    name: str
    lora: Lora
    weights: LoraWeights
    tagged: bool = False


@dataclass(frozen=True, slots=True)
class LoraSet:
    """What the weights of a model are changed by. Two are equal if they change them alike.

    Attributes:
        key: Identity of each file and its two weights, in the order of the files'; without weights of 0.
        files: By identity.
    """

    key: tuple[tuple[str, float, float], ...] = ()
    files: Mapping[str, LoraFile] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, uses: Sequence[LoraUse]) -> LoraSet:
        """The set of an image; what is named twice has the sum of its weights."""
        sums: dict[str, LoraWeights] = {}
        for identity, weights in ((use.lora.file.identity, use.weights) for use in uses):
            sums[identity] = weights.plus(sums[identity]) if identity in sums else weights
        key = tuple((identity, *weights) for identity, weights in sorted(sums.items()) if any(weights))
        files = {use.lora.file.identity: use.lora.file for use in uses if any(sums[use.lora.file.identity])}
        return cls(key, files)

    def of_component(self, component: str) -> list[tuple[LoraFile, float]]:
        """What of the files changes a component, each with its weight there."""
        found = []
        for identity, text_encoder, unet in self.key:
            file, weight = self.files[identity], unet if component == "unet" else text_encoder
            changes = {key: change for key, change in file.changes.items() if key.folder == component}
            if changes and weight:
                found.append((replace(file, changes=changes), weight))
        return found


NO_LORAS: Final = LoraSet()


def image_loras(
    tags: Sequence[Sequence[LoraTag]], options: Mapping[str, Any], library: LoraLibrary | None
) -> list[tuple[LoraUse, ...]]:
    """Check what of a call's options is about LoRAs, and read their files.

    Args:
        tags: What each image's prompt asks for.
        options: The call's.
        library: Finds them; None where there are none.

    Raises:
        UsageError: There is no such LoRA, its file cannot be used, it is not the one that a recipe was drawn
            with, or a weight is none.
    """
    partial = flag("lora_partial", options.get("lora_partial", False))
    digests = checked_digests("lora_sha256", options.get("lora_sha256"))
    named = [
        LoraUse(name, _needed(library).find(name, partial=partial), weights)
        for name, weights in _named(options, library).items()
    ]
    written = {
        name: None if library is None else library.find_tagged(name, partial=partial) for name in _names(tags)
    }
    for tag in dict.fromkeys(tag for image in tags for tag in image):
        if written[tag.name] is None:
            refuse_missing_lora(tag.name, digests)
            _warn_of_nowhere(tag)
    images = []
    for image in tags:
        found = [(tag, lora) for tag in image if (lora := written[tag.name]) is not None]
        images.append((*named, *(LoraUse(tag.name, lora, tag.weights, True) for tag, lora in found)))
    for use in {(use.name, use.tagged): use for image in images for use in image}.values():
        check_lora(use.name, use.lora.file.sha256, digests)
    return images


def _names(tags: Sequence[Sequence[LoraTag]]) -> list[str]:
    return list(dict.fromkeys(tag.name for image in tags for tag in image))


def _warn_of_nowhere(tag: LoraTag) -> None:
    warnings.warn(
        f"the prompt's {tag.quoted}, asks for a LoRA, and it is not said where LoRAs lie: it is left out; "
        "give their folder (--lora-dir DIR, Pipeline.load(lora_dir=…)) or its file (--lora FILE, "
        "load_lora_weights)",
        PromptSyntaxWarning,
        stacklevel=2,
    )


def _named(options: Mapping[str, Any], library: LoraLibrary | None) -> Mapping[str, LoraWeights]:
    """The LoRAs that a call names, or else those that are active."""
    given = options.get("loras")
    if given is None:
        return {} if library is None else library.active
    if not isinstance(given, Mapping):
        raise UsageError(f"loras is {type(given).__name__}: a table of names or paths and their weights")
    for name in given:
        if not isinstance(name, str) or not name or "\0" in name:
            raise UsageError(f"loras names {str(name)[:100]!r}: the name of a LoRA, or a path, is wanted")
    return {name: checked_weights(name, weight) for name, weight in given.items()}


def _needed(library: LoraLibrary | None) -> LoraLibrary:
    if library is None:
        raise UsageError("loras is given: nothing here can read them")
    return library


def lora_recipe(uses: Sequence[LoraUse], *, partial: bool) -> dict[str, Any]:
    """What a recipe says of an image's LoRAs; what its prompt says is not said again."""
    if not uses:
        return {}
    named = {use.name: use.weights.plain for use in uses if not use.tagged}
    return {
        **({"loras": named} if named else {}),
        **({"lora_partial": True} if partial else {}),
        "lora_sha256": {use.name: use.lora.file.sha256 for use in uses},
        "lora_hashes": {
            use.name if use.tagged else short_name(use.name): use.lora.a1111_hash for use in uses
        },
    }


def blended(first: Sequence[LoraUse], last: Sequence[LoraUse], share: float) -> tuple[LoraUse, ...]:
    """The LoRAs of a frame between two: each weight on the way from that of the first to that of the last."""
    none = LoraWeights(0.0, 0.0)

    def weights(uses: Sequence[LoraUse], key: tuple[str, bool]) -> LoraWeights:
        found = [use.weights for use in uses if (use.name, use.tagged) == key]
        return functools.reduce(LoraWeights.plus, found) if found else none

    every = {(use.name, use.tagged): use for use in (*first, *last)}
    return tuple(
        use._replace(weights=weights(first, key).mixed(weights(last, key), share))
        for key, use in every.items()
    )
