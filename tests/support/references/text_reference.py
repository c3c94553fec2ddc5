"""What a prompt means to the U-Net, plainly, with transformers: the reference of our text conditioning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

Weighted = tuple[str, float]
Array = NDArray[Any]


@dataclass(frozen=True)
class Encoded:
    """float32 [context, width], and [width] for SDXL."""

    states: Array
    pooled: Array | None


class Reference:
    """The text encoders of a checkpoint in float32, one (Stable Diffusion) or two (SDXL)."""

    def __init__(self, folder: Path, own: Mapping[str, Sequence[Array]] | None = None) -> None:
        """``own``: embeddings of textual inversion by name, [k, width] for each encoder."""
        second = (folder / "text_encoder_2").is_dir()
        self.own = {name: len(vectors[0]) for name, vectors in (own or {}).items()}
        self.tokenizers = [CLIPTokenizer.from_pretrained(folder / "tokenizer")]
        self.models: list[Any] = [CLIPTextModel.from_pretrained(folder / "text_encoder").float().eval()]
        if second:
            self.tokenizers.append(CLIPTokenizer.from_pretrained(folder / "tokenizer_2"))
            model = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2")
            self.models.append(model.float().eval())
        self.ids: dict[str, list[int]] = {}
        for index, model in enumerate(self.models):
            for name, vectors in (own or {}).items():
                self._teach(model, name, vectors[index])

    def _teach(self, model: Any, name: str, vectors: Array) -> None:
        """Put the vectors behind the vocabulary, as diffusers does."""
        table = model.get_input_embeddings().weight
        self.ids[name] = list(range(len(table), len(table) + len(vectors)))
        grown = torch.cat([table, torch.from_numpy(vectors)]).detach()
        model.set_input_embeddings(torch.nn.Embedding(*grown.shape))
        model.get_input_embeddings().weight = torch.nn.Parameter(grown)

    def __call__(
        self, sections: Sequence[Sequence[Weighted]], *, clip_skip: int = 0, chunks: int = 1
    ) -> Encoded:
        """Encode what stands between the BREAKs, each as texts with weights; at least ``chunks`` chunks."""
        states, pooled = [], None
        for tokenizer, model in zip(self.tokenizers, self.models, strict=True):
            rows = self.chunks(tokenizer, sections)
            rows += [[]] * (chunks - len(rows))
            encoded = [self._chunk(tokenizer, model, row, clip_skip) for row in rows]
            states.append(np.concatenate([state for state, _ in encoded]))
            pooled = encoded[0][1]
        return Encoded(np.concatenate(states, axis=1), pooled)

    def chunks(self, tokenizer: Any, sections: Sequence[Sequence[Weighted]]) -> list[list[tuple[int, float]]]:
        """(id, weight) of each chunk's tokens; words stay whole."""
        room = tokenizer.model_max_length - 2
        chunks: list[list[tuple[int, float]]] = []
        for section in sections:
            chunks.append([])
            for word in (word for text, weight in section for word in self._words(tokenizer, text, weight)):
                if len(chunks[-1]) + len(word) > room:
                    chunks.append([])
                chunks[-1] += word
        return chunks

    def _words(self, tokenizer: Any, text: str, weight: float) -> list[list[tuple[int, float]]]:
        words: list[list[tuple[int, float]]] = []
        for part in text.split():
            if part in self.ids:
                words.append([(number, weight) for number in self.ids[part]])
                continue
            ids = tokenizer(part, add_special_tokens=False).input_ids
            word: list[tuple[int, float]] = []
            for number, token in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
                word.append((number, weight))
                if token.endswith("</w>"):
                    words.append(word)
                    word = []
        return words

    def _chunk(
        self, tokenizer: Any, model: Any, tokens: Sequence[tuple[int, float]], clip_skip: int
    ) -> tuple[Array, Array | None]:
        length = tokenizer.model_max_length
        ids = [tokenizer.bos_token_id, *(number for number, _ in tokens), tokenizer.eos_token_id]
        ids += [tokenizer.pad_token_id] * (length - len(ids))
        with torch.no_grad():
            output = model(torch.tensor([ids]), output_hidden_states=True)
            if len(self.models) == 1:
                state = model.final_layer_norm(output.hidden_states[-(clip_skip + 1)])
            else:
                state = output.hidden_states[-(clip_skip + 2)]
        pooled = output.text_embeds[0].numpy() if hasattr(output, "text_embeds") else None
        weights = torch.ones(length, 1, dtype=torch.float64)
        weights[1 : len(tokens) + 1, 0] = torch.tensor([weight for _, weight in tokens], dtype=torch.float64)
        if (weights != 1).any():
            product = state * weights
            ratio = state.double().mean() / product.mean()
            # The documented exception: means that are near zero by chance.
            means = all(
                part.double().mean().abs() > 1e-3 * part.double().norm() / part.numel() ** 0.5
                for part in (state, product)
            )
            state = product * ratio if means and 0.1 <= ratio <= 10 else product
        return state[0].float().numpy(), pooled
