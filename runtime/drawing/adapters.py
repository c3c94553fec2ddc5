"""LoRAs in a model that is loaded: its executors hold the weights of one set, and change to another's."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sdrt.runtime.backends.executor import Executor
from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.devices.device import Device
from sdrt.runtime.drawing.condition_encoder import ConditionEncoder
from sdrt.runtime.request.loras import LoraSet

if TYPE_CHECKING:
    from sdrt.runtime.lora.file import LoraFile

_Held = tuple[tuple[str, float], ...]  # identity and weight of each file that a component was changed by


class Adapters:
    """What U-Net and encoders are changed by.

    Each component is looked at by itself: one that a set does not change, or changes as the set before, is
    left alone. Whatever fails on the way, the next use begins with what each of them holds then.
    """

    def __init__(
        self, bundle: Bundle, executors: Mapping[str, Executor], encoder: ConditionEncoder, device: Device
    ) -> None:
        """All hold the bundle's own weights.

        Args:
            bundle: Has the weights that are changed.
            executors: Those of the U-Net and the encoders, and perhaps others.
            encoder: What keeps what encoders gave, and the words of textual inversion.
            device: Where the executors work.
        """
        self._bundle, self._encoder, self._device = bundle, encoder, device
        encoders = [one.component for one in bundle.manifest.record.encoders]
        self._executors = {name: executors[name] for name in (*encoders, "unet")}
        # None where it failed or an interrupt came in between: the next use replaces whatever is there.
        self._held: dict[str, _Held | None] = dict.fromkeys(self._executors, ())

    def lend_words(self, wanted: LoraSet) -> None:
        """Let prompts have the words of textual inversion that the files of a set bring along.

        Raises:
            UsageError: One does not fit the text encoders.
        """
        files = wanted.files.values()
        self._encoder.lend_embeddings(
            {name: vectors for file in files for name, vectors in file.embeddings.items()}
        )

    def use(self, wanted: LoraSet) -> float:
        """Let the executors hold the weights of a set, and prompts have its words.

        Returns:
            The seconds that it took; 0 where nothing was to change.

        Raises:
            UsageError: A file changes what the bundle's graphs cannot change by itself.
            BackendError: The backend cannot replace weights; the message says what to do.
        """
        self.lend_words(wanted)
        changes = {}
        for component, held in self._held.items():
            files = wanted.of_component(component)
            if held != (wants := tuple((file.identity, weight) for file, weight in files)):
                changes[component] = (files, wants)
        if not changes:
            return 0.0
        started = time.perf_counter()
        self._device.synchronize()  # of a call that was cancelled steps may still be queued
        for component, (files, wants) in changes.items():
            self._replace(component, files, wants)
        return time.perf_counter() - started

    def _replace(self, component: str, files: Sequence[tuple[LoraFile, float]], wants: _Held) -> None:
        from sdrt.runtime.lora.merge import merged_weights  # who draws without LoRAs need not wait for it

        weights = merged_weights(self._bundle, files, {component}).get(component, {})
        self._held[component] = None
        if component != "unet":
            self._encoder.forget()
        self._executors[component].replace_weights(weights)
        self._held[component] = wants
