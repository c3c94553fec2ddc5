// What the kernels' headers need to mean the same to NVRTC, nvcc and a host compiler. No header of the CUDA
// toolkit is included, so that NVRTC needs no folder of them and the host build no toolkit.
#pragma once

#ifdef __CUDACC__
#define SDRT_BOTH __host__ __device__ __forceinline__
#else
#include <math.h>
#include <string.h>
#define SDRT_BOTH inline
#endif

// W neighbouring elements, moved by one load or store.
template <class T, int W>
struct alignas(sizeof(T) * W) Pack {
  T v[W];
};

template <int W, class T>
SDRT_BOTH Pack<T, W> load_pack(const T *address) {
  return *reinterpret_cast<const Pack<T, W> *>(address);
}

template <class T, int W>
SDRT_BOTH void store_pack(T *address, const Pack<T, W> &pack) {
  *reinterpret_cast<Pack<T, W> *>(address) = pack;
}

SDRT_BOTH unsigned bits_of(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  unsigned bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

SDRT_BOTH float float_of(unsigned bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

SDRT_BOTH bool is_finite(float value) { return (bits_of(value) & 0x7f800000u) != 0x7f800000u; }

// IEEE binary16, as stored.
struct Half {
  unsigned short bits;
};

SDRT_BOTH float widen(float value) { return value; }

SDRT_BOTH float widen(Half half) {
#ifdef __CUDA_ARCH__
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half.bits));
  return value;
#else
  const unsigned sign = (half.bits & 0x8000u) << 16, exponent = half.bits & 0x7c00u;
  const unsigned magnitude = half.bits & 0x7fffu;
  if (exponent == 0x7c00u) return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (exponent == 0) return float_of(sign | bits_of(static_cast<float>(magnitude) * 0x1p-24f));
  return float_of(sign | ((magnitude << 13) + 0x38000000u));  // the exponents' biases: 127 - 15
#endif
}

// The value rounded to T, halves to even, infinity beyond the largest.
template <class T>
SDRT_BOTH T narrow(float value);

template <>
SDRT_BOTH float narrow<float>(float value) {
  return value;
}

template <>
SDRT_BOTH Half narrow<Half>(float value) {
#ifdef __CUDA_ARCH__
  Half half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half.bits) : "f"(value));
  return half;
#else
  const unsigned sign = (bits_of(value) & 0x80000000u) >> 16;
  unsigned magnitude = bits_of(value) & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    magnitude = 0x7e00u;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    magnitude = 0x7c00u;  // 65520 and beyond round to infinity
  } else if (magnitude < 0x38800000u) {
    // Subnormal: next to 0.5 float32 has binary16's smallest spacing, 2**-24, and the sum rounds to it.
    magnitude = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  } else {
    magnitude = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return Half{static_cast<unsigned short>(sign | magnitude)};
#endif
}
