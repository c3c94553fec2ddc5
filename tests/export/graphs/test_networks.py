"""The wrappers of the text encoders in PyTorch against transformers' own modules, at any depth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdrt.export.graphs.networks import TextEncoder, TextEncoder2

LAYERS, WIDTH, TOKENS, WORDS = 4, 16, 12, 50


def config(eos: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=8,
        bos_token_id=WORDS - 2,
        eos_token_id=eos,
        pad_token_id=1,
    )


def texts(generator: torch.Generator) -> Tensor:
    """Two rows with an end of text in different places, and something else behind it."""
    ids = torch.randint(3, WORDS - 2, (2, TOKENS), generator=generator)
    ids[0, 5] = ids[1, 9] = WORDS - 1
    return ids


@pytest.mark.parametrize("skip", range(LAYERS))
@pytest.mark.parametrize("eos", [WORDS - 1, 2])  # 2 stood in the configurations of published models
def test_states_and_pooled_embedding(skip: int, eos: int) -> None:
    torch.manual_seed(skip)
    one, two = CLIPTextModel(config(eos)).eval(), CLIPTextModelWithProjection(config(eos)).eval()
    generator = torch.Generator().manual_seed(4)
    ids = texts(generator)
    own = 0.02 * torch.randn(2, TOKENS, WIDTH, generator=generator)
    mine = ids.clone()
    mine[0, 2] = mine[0, 7] = mine[1, 3] = -1  # before and behind the end of the text
    skips = torch.tensor([skip])
    with torch.no_grad():
        last, penultimate = TextEncoder(one)(mine, own, skips)
        second, pooled = TextEncoder2(two)(mine, own, skips)
        for model, got in ((one, penultimate), (two, second)):
            expected = reference(model, ids, mine, own, eos)
            assert torch.equal(got, expected.hidden_states[-(skip + 2)])
            if model is one:
                assert torch.equal(last, one.final_layer_norm(expected.hidden_states[-(skip + 1)]))
            else:
                assert torch.equal(pooled, expected.text_embeds)


def reference(model: Any, ids: Tensor, mine: Tensor, own: Tensor, eos: int) -> Any:
    """transformers' own forward with the embeddings put into the vocabulary, in the place of unused words."""
    taught = ids.clone()
    table = model.get_input_embeddings().weight.detach()
    places = (mine < 0).nonzero().tolist()
    if eos == 2:  # the end is where the highest id is: new ones may not be behind it
        unused = [word for word in range(WORDS - 2) if not (ids == word).any()]
        grown = table.clone()
    else:
        unused = [*range(WORDS, WORDS + len(places))]
        grown = torch.cat([table, torch.zeros(len(places), WIDTH)])
    for word, (row, place) in zip(unused, places, strict=False):
        grown[word] = own[row, place]
        taught[row, place] = word
    original = model.get_input_embeddings()
    model.set_input_embeddings(nn.Embedding(*grown.shape))
    model.get_input_embeddings().weight = nn.Parameter(grown)
    output = model(taught, output_hidden_states=True)
    model.set_input_embeddings(original)
    return output
