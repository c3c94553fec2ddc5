// philox_normal: Philox 4x32-10 and the sine half of Box-Muller. The reference is philox.py.
#pragma once
#include "portable.cuh"

struct PhiloxNormalParams {
  float *noise;                     // [N, image_elements]
  const unsigned long long *seeds;  // [N]
  const int *counter;               // [1], or null: draw
  const int *draws;                 // [capacity], with a counter
  unsigned long long draw;
  unsigned elements;  // N image_elements
  unsigned image_elements;
  int capacity;
};

struct TwoWords {
  unsigned first, second;
};

// The first two of the four words of counter (offset, index) under the key `seed`.
SDRT_BOTH TwoWords philox(unsigned long long offset, unsigned index, unsigned long long seed) {
  unsigned c0 = static_cast<unsigned>(offset), c1 = static_cast<unsigned>(offset >> 32), c2 = index, c3 = 0;
  unsigned k0 = static_cast<unsigned>(seed), k1 = static_cast<unsigned>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const unsigned long long p0 = 0xD2511F53ull * c0, p1 = 0xCD9E8D57ull * c2;
    c0 = static_cast<unsigned>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<unsigned>(p1);
    c2 = static_cast<unsigned>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<unsigned>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1};
}

// float32 word * step + step / 2 in one rounding: the product is exact in double.
SDRT_BOTH float spread(unsigned word, double step) {
  return static_cast<float>(static_cast<double>(static_cast<float>(word)) * step + step / 2);
}

SDRT_BOTH float box_muller_sine(TwoWords words) {
  const float u = spread(words.first, 0x1p-32);
  const float v = spread(words.second, 0x1.921fb6p-30);  // float32 2 pi, over 2**32
  const float log_u = static_cast<float>(log(static_cast<double>(u)));
  const float sin_v = static_cast<float>(sin(static_cast<double>(v)));
  return sqrtf(-2.0f * log_u) * sin_v;
}

// Which draw of its stream each image takes; false where the row at the counter takes none.
SDRT_BOTH bool draw_number(const PhiloxNormalParams &params, unsigned long long &draw) {
  draw = params.draw;
  if (!params.counter) return true;
  const int row = *params.counter;
  const int number = row < params.capacity ? params.draws[row] : -1;
  draw = static_cast<unsigned long long>(number);
  return number >= 0;
}

SDRT_BOTH void philox_normal_element(const PhiloxNormalParams &params, unsigned long long draw, unsigned i) {
  const unsigned image = i / params.image_elements;
  params.noise[i] = box_muller_sine(philox(draw, i - image * params.image_elements, params.seeds[image]));
}
