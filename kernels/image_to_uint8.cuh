// image_to_uint8: NCHW floats in [-1, 1] to NHWC bytes. The reference is image_to_uint8.py.
#pragma once
#include "portable.cuh"

constexpr int CHANNELS = 3;

struct ImageToUint8Params {
  const void *image;      // [N, 3, H, W]
  unsigned char *pixels;  // [N, H, W, 3]
  unsigned plane;         // H W
  unsigned positions;     // N H W
};

SDRT_BOTH unsigned byte_of(float value) {
  const float scaled = value * 0.5f + 0.5f;
  const float clamped = scaled > 0.0f ? (scaled < 1.0f ? scaled : 1.0f) : 0.0f;  // NaN fails the first: 0
  return static_cast<unsigned>(rintf(clamped * 255.0f));
}

// Pixels position .. position+W-1, which lie in one image.
template <class T, int W>
SDRT_BOTH void convert_pixels(const ImageToUint8Params &params, unsigned position) {
  const unsigned image = position / params.plane;
  const T *source = static_cast<const T *>(params.image);
  source += CHANNELS * image * params.plane + position % params.plane;
  Pack<T, W> channels[CHANNELS];
  for (int c = 0; c < CHANNELS; ++c) channels[c] = load_pack<W>(source + c * params.plane);
  unsigned char *target = params.pixels + CHANNELS * position;
  if constexpr (W == 4) {  // 12 bytes as three words, the first byte lowest
    unsigned words[CHANNELS] = {};
    for (int b = 0; b < CHANNELS * W; ++b)
      words[b / 4] |= byte_of(widen(channels[b % CHANNELS].v[b / CHANNELS])) << (8 * (b % 4));
    for (int c = 0; c < CHANNELS; ++c) reinterpret_cast<unsigned *>(target)[c] = words[c];
  } else {
    for (int c = 0; c < CHANNELS; ++c)
      target[c] = static_cast<unsigned char>(byte_of(widen(channels[c].v[0])));
  }
}
