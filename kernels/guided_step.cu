// Entry points of guided_step.cuh. One launch does the whole step; nothing of it depends on the host.
#include "guided_step.cuh"

template <class T, int W>
__device__ __forceinline__ void guided_step(const GuidedStepParams &params) {
  const unsigned stride = gridDim.x * blockDim.x * W;
  unsigned i = (blockIdx.x * blockDim.x + threadIdx.x) * W;
  // What does not depend on the counter is asked for before it: one wait for both. The scale of the guidance
  // comes with the row, all of whose numbers are one wait.
  StepInputs<T, W> inputs = load_inputs<T, W>(params, i < params.elements ? i : 0);
  const StepPlan plan = plan_step(params);
  if (!plan.active) return;  // the whole grid: no ticket is drawn
  // Before the elements, so that no register holds the timestep while they are gone through.
  if (plan.has_next && blockIdx.x == 0) write_timesteps(params, plan.timestep, threadIdx.x, blockDim.x);

  bool finite = true;
  while (i < params.elements) {
    finite = step_elements(params, plan, inputs, i) && finite;
    i += stride;
    if (i < params.elements) inputs = load_inputs<T, W>(params, i);
  }

  const bool block_fault = __syncthreads_or(!finite);
  if (threadIdx.x != 0) return;
  if (block_fault) atomicCAS(params.fault, NO_FAULT, plan.step);
  // Every block has read the counter before it draws its ticket, so the one that draws the last may count up.
  if (atomicAdd(params.ticket, 1u) == gridDim.x - 1) {
    *params.ticket = 0;
    finish_step(params, plan);
  }
}

template <class T, int W>
__device__ __forceinline__ void prepare_input(const GuidedStepParams &params) {
  const int step = *params.counter;
  if (step >= row_count(params)) return;
  StepPlan plan{};
  plan_input(params, step, plan);
  const unsigned stride = gridDim.x * blockDim.x * W;
  for (unsigned i = (blockIdx.x * blockDim.x + threadIdx.x) * W; i < params.elements; i += stride)
    write_sample<T>(params, plan.input_scale, i, load_pack<W>(params.latents + i));
  if (blockIdx.x == 0) write_timesteps(params, plan.timestep, threadIdx.x, blockDim.x);
}

#define ENTRY(name, function)                                 \
  extern "C" __global__ void __launch_bounds__(128)           \
      name(const __grid_constant__ GuidedStepParams params) { \
    function(params);                                         \
  }

ENTRY(guided_step_f16, (guided_step<Half, 1>))
ENTRY(guided_step_f16x4, (guided_step<Half, 4>))
ENTRY(guided_step_f32, (guided_step<float, 1>))
ENTRY(guided_step_f32x4, (guided_step<float, 4>))
ENTRY(prepare_input_f16, (prepare_input<Half, 1>))
ENTRY(prepare_input_f16x4, (prepare_input<Half, 4>))
ENTRY(prepare_input_f32, (prepare_input<float, 1>))
ENTRY(prepare_input_f32x4, (prepare_input<float, 4>))
