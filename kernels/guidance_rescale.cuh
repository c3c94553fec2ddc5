// guidance_rescale: what each image's guided prediction is to be multiplied with. The reference is
// guidance_rescale.py; the sums stand here in its order: compile without contraction.
#pragma once
#include "guided_step.cuh"

constexpr unsigned LANES = 256;  // partial sums of an image; on a GPU the threads of its block

struct GuidanceRescaleParams {
  const void *noise_pred;         // [2 N, C, h, w], the unconditional half first
  const float *rows;              // [capacity, COLUMNS]
  const float *guidance_rescale;  // [1], phi
  const int *counter;             // [1]
  const int *count;               // [1], or null: capacity
  float *factors;                 // [N]
  unsigned images;                // N
  unsigned image_elements;        // C h w
  int capacity;
};

// Sums of differences from the first element, and of their squares.
struct Moments {
  double conditional, conditional_squares, guided, guided_squares;
};

SDRT_BOTH Moments operator+(const Moments &one, const Moments &other) {
  return {
      one.conditional + other.conditional,
      one.conditional_squares + other.conditional_squares,
      one.guided + other.guided,
      one.guided_squares + other.guided_squares,
  };
}

SDRT_BOTH bool rescale_is_active(const GuidanceRescaleParams &params) {
  return *params.counter < (params.count ? *params.count : params.capacity);
}

// The sums of elements lane, lane + LANES, … of an image.
template <class T>
SDRT_BOTH Moments lane_moments(const GuidanceRescaleParams &params, unsigned image, unsigned lane) {
  const T *unconditional = static_cast<const T *>(params.noise_pred) + image * params.image_elements;
  const T *conditional = unconditional + params.images * params.image_elements;
  const float scale = params.rows[*params.counter * COLUMNS + GUIDANCE];
  const float first = widen(conditional[0]);
  const float first_guided = guide(widen(unconditional[0]), first, scale);
  Moments sums{};
#ifdef __CUDACC__
#pragma unroll 8  // so many loads on their way at once
#endif
  for (unsigned i = lane; i < params.image_elements; i += LANES) {
    const float c = widen(conditional[i]), g = guide(widen(unconditional[i]), c, scale);
    const double dc = static_cast<double>(c) - static_cast<double>(first);
    const double dg = static_cast<double>(g) - static_cast<double>(first_guided);
    sums = sums + Moments{dc, dc * dc, dg, dg * dg};
  }
  return sums;
}

// The sum of squared deviations from the mean.
SDRT_BOTH double scatter(double sum, double squares, unsigned elements) {
  return squares - sum * sum / static_cast<double>(elements);
}

SDRT_BOTH void write_factor(const GuidanceRescaleParams &params, unsigned image, const Moments &sums) {
  const unsigned elements = params.image_elements;
  const double conditional = scatter(sums.conditional, sums.conditional_squares, elements);
  const double guided = scatter(sums.guided, sums.guided_squares, elements);
  const double phi = static_cast<double>(*params.guidance_rescale);
  const double factor = phi * sqrt(conditional / guided) + (1.0 - phi);
  params.factors[image] = guided == 0.0 ? 1.0f : static_cast<float>(factor);  // constant: nothing to rescale
}
