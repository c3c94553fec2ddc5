// Entry points of check_finite.cuh.
#include "check_finite.cuh"

template <class T>
__device__ __forceinline__ void check_finite(const CheckFiniteParams &params) {
  const unsigned long long workers = static_cast<unsigned long long>(gridDim.x) * blockDim.x;
  const unsigned long long first = static_cast<unsigned long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  const bool block_fault = __syncthreads_or(!share_is_finite<T>(params, first, workers));
  if (block_fault && threadIdx.x == 0) *params.fault = 1;  // whoever else writes it writes the same
}

extern "C" __global__ void __launch_bounds__(128)
    check_finite_f16(const __grid_constant__ CheckFiniteParams params) {
  check_finite<Half>(params);
}

extern "C" __global__ void __launch_bounds__(128)
    check_finite_f32(const __grid_constant__ CheckFiniteParams params) {
  check_finite<float>(params);
}
