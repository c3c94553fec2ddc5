// The host build: for each entry point a function <entry>_host that does what the whole grid does.
#include "check_finite.cuh"
#include "guidance_rescale.cuh"
#include "guided_step.cuh"
#include "image_to_uint8.cuh"
#include "philox_normal.cuh"

namespace {

template <class T, int W>
void guided_step(const GuidedStepParams &params) {
  const StepPlan plan = plan_step(params);
  if (!plan.active) return;
  if (plan.has_next) write_timesteps(params, plan.timestep, 0, 1);
  bool finite = true;
  for (unsigned i = 0; i < params.elements; i += W) {
    const StepInputs<T, W> inputs = load_inputs<T, W>(params, i);
    finite = step_elements(params, plan, inputs, i) && finite;
  }
  if (!finite && *params.fault == NO_FAULT) *params.fault = plan.step;
  finish_step(params, plan);
}

template <class T, int W>
void prepare_input(const GuidedStepParams &params) {
  const int step = *params.counter;
  if (step >= row_count(params)) return;
  StepPlan plan{};
  plan_input(params, step, plan);
  for (unsigned i = 0; i < params.elements; i += W)
    write_sample<T>(params, plan.input_scale, i, load_pack<W>(params.latents + i));
  write_timesteps(params, plan.timestep, 0, 1);
}

template <class T>
void guidance_rescale(const GuidanceRescaleParams &params) {
  if (!rescale_is_active(params)) return;
  Moments sums[LANES];
  for (unsigned image = 0; image < params.images; ++image) {
    for (unsigned lane = 0; lane < LANES; ++lane) sums[lane] = lane_moments<T>(params, image, lane);
    for (unsigned half = LANES / 2; half > 0; half /= 2)
      for (unsigned lane = 0; lane < half; ++lane) sums[lane] = sums[lane] + sums[lane + half];
    write_factor(params, image, sums[0]);
  }
}

void philox_normal(const PhiloxNormalParams &params) {
  unsigned long long draw;
  if (!draw_number(params, draw)) return;
  for (unsigned i = 0; i < params.elements; ++i) philox_normal_element(params, draw, i);
}

template <class T, int W>
void image_to_uint8(const ImageToUint8Params &params) {
  for (unsigned i = 0; i < params.positions; i += W) convert_pixels<T, W>(params, i);
}

template <class T>
void check_finite(const CheckFiniteParams &params) {
  if (!share_is_finite<T>(params, 0, 1)) *params.fault = 1;
}

}  // namespace

#define HOST_ENTRY(entry, Params, function) \
  extern "C" void entry##_host(const Params *params) { function(*params); }

HOST_ENTRY(guided_step_f16, GuidedStepParams, (guided_step<Half, 1>))
HOST_ENTRY(guided_step_f16x4, GuidedStepParams, (guided_step<Half, 4>))
HOST_ENTRY(guided_step_f32, GuidedStepParams, (guided_step<float, 1>))
HOST_ENTRY(guided_step_f32x4, GuidedStepParams, (guided_step<float, 4>))
HOST_ENTRY(prepare_input_f16, GuidedStepParams, (prepare_input<Half, 1>))
HOST_ENTRY(prepare_input_f16x4, GuidedStepParams, (prepare_input<Half, 4>))
HOST_ENTRY(prepare_input_f32, GuidedStepParams, (prepare_input<float, 1>))
HOST_ENTRY(prepare_input_f32x4, GuidedStepParams, (prepare_input<float, 4>))
HOST_ENTRY(guidance_rescale_f16, GuidanceRescaleParams, guidance_rescale<Half>)
HOST_ENTRY(guidance_rescale_f32, GuidanceRescaleParams, guidance_rescale<float>)
HOST_ENTRY(philox_normal_f32, PhiloxNormalParams, philox_normal)
HOST_ENTRY(image_to_uint8_f16, ImageToUint8Params, (image_to_uint8<Half, 1>))
HOST_ENTRY(image_to_uint8_f16x4, ImageToUint8Params, (image_to_uint8<Half, 4>))
HOST_ENTRY(image_to_uint8_f32, ImageToUint8Params, (image_to_uint8<float, 1>))
HOST_ENTRY(image_to_uint8_f32x4, ImageToUint8Params, (image_to_uint8<float, 4>))
HOST_ENTRY(check_finite_f16, CheckFiniteParams, check_finite<Half>)
HOST_ENTRY(check_finite_f32, CheckFiniteParams, check_finite<float>)
