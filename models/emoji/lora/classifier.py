"""Is a picture drawn in a style? Logistic regression on the fixed features of `features.py`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from features import features

DECAY = 1e-3


class StyleClassifier:
    """Tells pictures in a style from pictures as they were.

    Trained on pairs of the same things, so that what is drawn says nothing; `accuracy` is that of pairs it
    has not seen.
    """

    def __init__(self, plain: Tensor, styled: Tensor, held_out: Tensor) -> None:
        """Fit on pictures [N, 3, 64, 64] in 0…1, plain and in the style; `held_out` [N] marks the test."""
        pairs = torch.stack([features(plain), features(styled)])
        self.mean, self.scale = pairs.mean(dim=(0, 1)), pairs.std()
        self.weights = self._fitted(self._scaled(pairs[:, ~held_out]))
        test = self._scaled(pairs[:, held_out]) @ self.weights > 0
        self.accuracy = torch.stack([~test[0], test[1]]).float().mean().item()
        self.test_pictures = test.numel()

    def _scaled(self, values: Tensor) -> Tensor:
        ones = torch.ones(*values.shape[:-1], 1)
        return torch.cat([(values - self.mean) / self.scale, ones], dim=-1)

    def _fitted(self, pairs: Tensor) -> Tensor:
        labels = torch.stack([torch.zeros(pairs.shape[1]), torch.ones(pairs.shape[1])])
        weights = torch.zeros(pairs.shape[-1], requires_grad=True)
        optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            error = F.binary_cross_entropy_with_logits(pairs @ weights, labels)
            value = error + DECAY * weights.square().sum()
            value.backward()  # type: ignore[no-untyped-call]
            return value

        optimizer.step(loss)  # type: ignore[no-untyped-call]
        return weights.detach()

    def share(self, drawn: Tensor) -> float:
        """The share of pictures [N, 3, 64, 64] in 0…1 that are called the style."""
        return (self._scaled(features(drawn)) @ self.weights > 0).float().mean().item()
