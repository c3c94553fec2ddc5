// The layout of one row of a sampler's table: the mirror of sampler_row.py, which says what each number means.
#pragma once

constexpr int HISTORY = 4;

enum Column {
  INPUT_SCALE, P, Q, A, B0, B1, B2, B3, E, C, SAVE, X0_X, X0_M, SIGNAL, NOISE, GUIDANCE, IMAGE_GUIDANCE,
  COLUMNS
};
