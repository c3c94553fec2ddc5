"""Prompts to the embeddings that the U-Net reads, each text encoded once."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sdrt.runtime.devices import Device
from sdrt.runtime.errors import NumericsError
from sdrt.runtime.executors import Executor
from sdrt.runtime.tokenizer import Tokenizer

MAX_QUOTED: Final = 400  # characters of a prompt's cut-off end that a warning repeats
MAX_CACHED: Final = 64  # texts; a negative prompt and a few favourites stay


class PromptTruncatedWarning(UserWarning):
    """A prompt has more tokens than the model reads; the message quotes what was cut off."""


class _Encoded(NamedTuple):
    embedding: NDArray[Any]
    cut_off: str


class PromptEncoder:
    """Tokenizer and text encoder, with a cache of the texts that were used last."""

    def __init__(
        self, tokenizer: Tokenizer, executor: Executor, device: Device, *, output: str, batch: int
    ) -> None:
        """Bind the text encoder to buffers of its own.

        Args:
            tokenizer: The bundle's.
            executor: The text encoder on ``device``.
            device: Owns the buffers.
            output: Name of the hidden state that the U-Net was trained on.
            batch: The smallest batch that the graph admits; every row of it holds the same text.
        """
        self._tokenizer = tokenizer
        self._device = device
        spec = executor.spec
        wanted = next(entry for entry in spec.outputs if entry.name == output)
        self._ids = device.zeros(spec.inputs[0].concrete({"batch": batch}), "int64")
        self._result = device.zeros(wanted.concrete({"batch": batch}), wanted.dtype)
        self._evaluate = executor.bind({spec.inputs[0].name: self._ids}, {output: self._result})
        self._cache: OrderedDict[str, _Encoded] = OrderedDict()

    def __call__(self, texts: Sequence[str]) -> NDArray[Any]:
        """Embeddings [len(texts), tokens, width] in the text encoder's precision.

        Warns:
            PromptTruncatedWarning: A text is over the token limit.

        Raises:
            UsageError: A text is not Unicode.
            NumericsError: The text encoder gave NaN or infinity.
        """
        rows = {}
        for text in dict.fromkeys(texts):
            if text not in self._cache:
                self._cache[text] = self._encode(text)
            self._cache.move_to_end(text)
            rows[text] = self._cache[text].embedding
            self._warn_if_cut(self._cache[text].cut_off)
        while len(self._cache) > MAX_CACHED:
            self._cache.popitem(last=False)
        return np.stack([rows[text] for text in texts])

    def _encode(self, text: str) -> _Encoded:
        """One text at a time, so that its embedding never depends on the others of a batch."""
        encoded = self._tokenizer.encode(text)
        self._device.upload(np.broadcast_to(encoded.ids, self._ids.shape), self._ids)
        self._evaluate()
        embedding: NDArray[Any] = self._device.download(self._result)[0]
        if not np.isfinite(embedding).all():
            raise NumericsError(f"the text_encoder gave NaN or infinity for the prompt {text!r}")
        return _Encoded(embedding, encoded.truncated_text)

    def _warn_if_cut(self, cut_off: str) -> None:
        if cut_off:
            warnings.warn(
                f"the prompt is over {self._tokenizer.max_length - 2} tokens; "
                f"this end of it is not read: {_shortened(cut_off)!r}",
                PromptTruncatedWarning,
                stacklevel=2,
            )


def _shortened(text: str) -> str:
    """A quotation that fits on a screen."""
    return text if len(text) <= MAX_QUOTED else f"{text[: MAX_QUOTED // 2]} … {text[-MAX_QUOTED // 2 :]}"
