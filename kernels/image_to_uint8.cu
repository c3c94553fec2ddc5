// Entry points of image_to_uint8.cuh.
#include "image_to_uint8.cuh"

template <class T, int W>
__device__ __forceinline__ void image_to_uint8(const ImageToUint8Params &params) {
  const unsigned stride = gridDim.x * blockDim.x * W;
  for (unsigned i = (blockIdx.x * blockDim.x + threadIdx.x) * W; i < params.positions; i += stride)
    convert_pixels<T, W>(params, i);
}

#define ENTRY(name, function)                                   \
  extern "C" __global__ void __launch_bounds__(128)             \
      name(const __grid_constant__ ImageToUint8Params params) { \
    function(params);                                           \
  }

ENTRY(image_to_uint8_f16, (image_to_uint8<Half, 1>))
ENTRY(image_to_uint8_f16x4, (image_to_uint8<Half, 4>))
ENTRY(image_to_uint8_f32, (image_to_uint8<float, 1>))
ENTRY(image_to_uint8_f32x4, (image_to_uint8<float, 4>))
