// check_finite: is any element NaN or infinite? The reference is check_finite.py.
#pragma once
#include "portable.cuh"

constexpr int VECTOR_WORDS = 4;  // 16 bytes, the widest load

struct CheckFiniteParams {
  const void *buffer;           // [elements]
  int *fault;                   // [1]
  unsigned long long elements;
  unsigned long long vectors;   // so many vectors first, then element by element
};

SDRT_BOTH bool is_finite(Half value) { return (value.bits & 0x7c00u) != 0x7c00u; }

// Whether a 32-bit word of the buffer holds only finite numbers: one float, or two halves.
template <class T>
SDRT_BOTH bool word_is_finite(unsigned word);

template <>
SDRT_BOTH bool word_is_finite<float>(unsigned word) {
  return (word & 0x7f800000u) != 0x7f800000u;
}

template <>
SDRT_BOTH bool word_is_finite<Half>(unsigned word) {
  return (word & 0x7c00u) != 0x7c00u && (word & 0x7c000000u) != 0x7c000000u;
}

// What worker `first` of `workers` looks at: every so many-th vector, then so of the elements behind them.
template <class T>
SDRT_BOTH bool share_is_finite(
    const CheckFiniteParams &params, unsigned long long first, unsigned long long workers) {
  bool finite = true;
  const unsigned *words = static_cast<const unsigned *>(params.buffer);
  for (unsigned long long i = first; i < params.vectors; i += workers) {
    const Pack<unsigned, VECTOR_WORDS> vector = load_pack<VECTOR_WORDS>(words + i * VECTOR_WORDS);
    for (int k = 0; k < VECTOR_WORDS; ++k) finite = word_is_finite<T>(vector.v[k]) && finite;
  }
  const T *elements = static_cast<const T *>(params.buffer);
  const unsigned long long rest = params.vectors * (sizeof(unsigned) * VECTOR_WORDS / sizeof(T));
  for (unsigned long long i = rest + first; i < params.elements; i += workers)
    finite = is_finite(elements[i]) && finite;
  return finite;
}
