"""What a pipeline can be taught: words by textual inversion, styles and things by LoRAs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from sdrt.runtime.bundle.bundle import Bundle, sha256
from sdrt.runtime.drawing.condition_encoder import ConditionEncoder
from sdrt.runtime.drawing.text_conditioning import PromptEncoder
from sdrt.runtime.errors import UsageError
from sdrt.runtime.lora.library import LoraLibrary


class AdapterLoader:
    """The part of `sdrt.runtime.pipeline.Pipeline` that loads what changes its model.

    Its methods are called as in diffusers, and like a call of the pipeline not while another draws.

    Attributes:
        bundle: The bundle that the pipeline draws from.
    """

    _encoder: ConditionEncoder
    _refiner: AdapterLoader | None

    def __init__(self, bundle: Bundle, lora_dir: str | Path | None) -> None:
        """Nothing is loaded.

        Raises:
            UsageError: There is no such folder.
        """
        self.bundle = bundle
        self._embeddings: dict[str, str] = {}  # name → SHA-256 of its file
        self._loras = LoraLibrary(bundle, lora_dir)
        self._also_taught: tuple[AdapterLoader, ...] = ()  # words: they read the same prompts

    def _alone(self) -> AbstractContextManager[None]:
        """Keep other calls out."""
        raise NotImplementedError

    def _check_open(self) -> None:
        """Refuse to go on once it was closed."""
        raise NotImplementedError

    def load_textual_inversion(self, path: str | Path, token: str | None = None) -> str:
        """Teach the text encoder a word from a textual-inversion file, for prompts that hold it.

        Args:
            path: A ``.safetensors`` file.
            token: The word; by default the file's name without its ending.

        Returns:
            The word.

        Raises:
            UsageError: The file cannot be read or does not fit the text encoder, or the bundle's text encoder
                takes no embeddings.
        """
        from sdrt.runtime.text.textual_inversion import read_embedding

        with self._alone():
            self._check_open()
            if not isinstance(self._encoder, PromptEncoder):
                raise UsageError("this bundle reads no text: there is nothing to teach it a word")
            widths, family = self._encoder.widths, self.bundle.manifest.record
            embedding = read_embedding(path, token, family=family, widths=widths)
            self._encoder.add_embedding(embedding.name, embedding.vectors)
            for other in self._also_taught:
                other.load_textual_inversion(path, token)
            if self._refiner is not None:
                self._refiner.load_textual_inversion(path, token)
            self._embeddings[embedding.name] = sha256(Path(path))
        return embedding.name

    def load_lora_weights(
        self, path: str | Path, adapter_name: str | None = None, *, partial: bool = False
    ) -> str:
        """Load a LoRA, for the calls that follow; what was active before is not any more, as in diffusers.

        Nothing is computed yet: the model is changed before the next picture, and only as far as the LoRAs
        that it is drawn with are others than those of the picture before.

        Args:
            path: A ``.safetensors`` file in one of the formats of `sdrt.runtime.lora.file.read_lora`.
            adapter_name: What it is called in `set_adapters`, ``loras`` and prompts (``<lora:name:0.8>``); by
                default the file's name without its ending.
            partial: Take what has a place in the model; by default a file with anything else is refused.

        Returns:
            The name.

        Raises:
            UsageError: The file cannot be read or is for another model, or another file has the name.
        """
        with self._alone():
            self._check_open()
            return self._loras.load(path, adapter_name, partial=partial)

    def set_adapters(self, adapter_names: str | Sequence[str], adapter_weights: Any = None) -> None:
        """Say which LoRAs a call has that does not name any (``loras``), and how strongly.

        Args:
            adapter_names: Names of `load_lora_weights`; ``()`` for none.
            adapter_weights: One weight for all or a list with one for each, each a number or a table with
                ``text_encoder`` and ``unet``; by default 1.

        Raises:
            UsageError: There is no such adapter, or a weight is no number of −100 to 100.
        """
        with self._alone():
            self._check_open()
            self._loras.activate(adapter_names, adapter_weights)

    def unload_lora_weights(self, adapter_names: str | Sequence[str] | None = None) -> None:
        """Forget LoRAs; the calls that follow draw without them.

        Args:
            adapter_names: Names of `load_lora_weights`; by default all.

        Raises:
            UsageError: There is no such adapter.
        """
        with self._alone():
            self._check_open()
            self._loras.unload(adapter_names)

    def get_list_adapters(self) -> dict[str, list[str]]:
        """The LoRAs that are loaded: component → names of those that change it."""
        names = [*(encoder.component for encoder in self.bundle.manifest.record.encoders), "unet"]
        adapters = self._loras.adapters.items()
        found = {
            component: [name for name, lora in adapters if component in lora.components]
            for component in names
        }
        return {component: changed_by for component, changed_by in found.items() if changed_by}

    def get_active_adapters(self) -> list[str]:
        """The LoRAs of a call that does not name any."""
        return list(self._loras.active)
