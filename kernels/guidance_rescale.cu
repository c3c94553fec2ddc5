// Entry points of guidance_rescale.cuh: one block for each image.
#include "guidance_rescale.cuh"

template <class T>
__device__ __forceinline__ void guidance_rescale(const GuidanceRescaleParams &params, Moments *sums) {
  if (!rescale_is_active(params)) return;
  const unsigned image = blockIdx.x, lane = threadIdx.x;
  sums[lane] = lane_moments<T>(params, image, lane);
  for (unsigned half = LANES / 2; half > 0; half /= 2) {
    __syncthreads();
    if (lane < half) sums[lane] = sums[lane] + sums[lane + half];
  }
  if (lane == 0) write_factor(params, image, sums[0]);
}

#define ENTRY(name, T)                                             \
  extern "C" __global__ void __launch_bounds__(256)                \
      name(const __grid_constant__ GuidanceRescaleParams params) { \
    __shared__ Moments sums[LANES];                                \
    guidance_rescale<T>(params, sums);                             \
  }

ENTRY(guidance_rescale_f16, Half)
ENTRY(guidance_rescale_f32, float)
