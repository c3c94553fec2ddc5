// Entry point of philox_normal.cuh.
#include "philox_normal.cuh"

extern "C" __global__ void __launch_bounds__(128)
    philox_normal_f32(const __grid_constant__ PhiloxNormalParams params) {
  unsigned long long draw;
  if (!draw_number(params, draw)) return;
  const unsigned stride = gridDim.x * blockDim.x;
  for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < params.elements; i += stride)
    philox_normal_element(params, draw, i);
}
