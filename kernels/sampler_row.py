"""The layout of one row of a sampler's table, shared by the NumPy, CUDA and C++ step kernels."""

from __future__ import annotations

from enum import IntEnum
from typing import Final

# How many d a row can read, its own included: LMS needs four. PLMS would need five in one of its rows, which
# takes the difference of two x instead. A fifth would cost every sampler: it is as large as the latents, and
# a thread of the step kernel would have 72 registers, where eight blocks fit a multiprocessor with up to 64.
HISTORY: Final = 4


class Column(IntEnum):
    """Where each number of a row is; a kernel reads the row as ``COLUMNS`` floats in this order.

    The last six do not enter the recurrence. ``X0_X`` and ``X0_M`` give the model's guess of the clean
    latents, ``x0 = X0_X * x + X0_M * m``. ``SIGNAL`` and ``NOISE`` say how much noise a given image has when
    the row begins, ``SIGNAL * x0 + NOISE * noise``: it is brought to that level with them before the first
    row and, where a mask keeps it, after each. That is x's own level, but between the two rows of a step.
    After the last row there is no such level; x is the result.
    ``GUIDANCE`` is w of classifier-free guidance, ``m = u + w * (c - u)``, read where both halves are there.
    ``IMAGE_GUIDANCE`` is v of guidance by text and picture, ``m = u + w * (c - i) + v * (i - u)``, read where
    there are three parts. Both belong to the request: a sampler's table leaves them 0, the loop fills them.
    """

    INPUT_SCALE = 0
    P = 1
    Q = 2
    A = 3
    B0 = 4
    B1 = 5
    B2 = 6
    B3 = 7
    E = 8
    C = 9
    SAVE = 10  # 1.0 or 0.0
    X0_X = 11
    X0_M = 12
    SIGNAL = 13
    NOISE = 14
    GUIDANCE = 15
    IMAGE_GUIDANCE = 16


COLUMNS: Final = len(Column)
