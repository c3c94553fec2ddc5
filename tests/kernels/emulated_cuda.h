// As much of CUDA's execution model as the kernels use, on host threads: every thread of every block at once;
// of a kernel with shared memory, which is static here, the blocks one after the other.
#pragma once
#include <barrier>
#include <cstddef>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(threads)
#define __shared__ static

struct Index {
  unsigned x;
};
inline thread_local Index threadIdx, blockIdx;
inline Index blockDim, gridDim;

struct Block {
  explicit Block(unsigned threads) : barrier(static_cast<std::ptrdiff_t>(threads)) {}
  std::barrier<> barrier;
  int any = 0;
};
inline thread_local Block *block;

inline int __syncthreads_or(int predicate) {
  if (predicate) __atomic_store_n(&block->any, 1, __ATOMIC_SEQ_CST);
  block->barrier.arrive_and_wait();
  const int any = __atomic_load_n(&block->any, __ATOMIC_SEQ_CST);
  block->barrier.arrive_and_wait();
  if (threadIdx.x == 0) __atomic_store_n(&block->any, 0, __ATOMIC_SEQ_CST);
  return any;
}

inline void __syncthreads() { block->barrier.arrive_and_wait(); }

inline int atomicCAS(int *address, int expected, int value) {
  __atomic_compare_exchange_n(address, &expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
  return expected;
}

inline unsigned atomicAdd(unsigned *address, unsigned value) {
  return __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST);
}

template <class Params>
void emulate(
    void (*kernel)(const Params), const Params &params, unsigned blocks, unsigned threads, bool in_turn) {
  blockDim.x = threads;
  gridDim.x = blocks;
  std::vector<std::unique_ptr<Block>> grid;
  std::vector<std::thread> workers;
  for (unsigned b = 0; b < blocks; ++b) grid.push_back(std::make_unique<Block>(threads));
  const auto join = [&workers] {
    for (std::thread &worker : workers) worker.join();
    workers.clear();
  };
  for (unsigned b = 0; b < blocks; ++b) {
    for (unsigned t = 0; t < threads; ++t)
      workers.emplace_back([=, &params, &grid] {
        threadIdx.x = t;
        blockIdx.x = b;
        block = grid[b].get();
        kernel(params);
        block->barrier.arrive_and_drop();  // who has left is not waited for
      });
    if (in_turn) join();
  }
  join();
}
