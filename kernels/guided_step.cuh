// guided_step: combine what was evaluated, apply a sampler's row, blend, write the U-Net's next input.
// The reference is guided_step.py; every float32 operation stands here in its order: compile without
// contraction.
#pragma once
#include "portable.cuh"
#include "sampler_row.cuh"

constexpr int NO_FAULT = -1;

// N images, R rows that were evaluated (1 to 3 an image), R' rows to prepare. guided_step.py says what each
// buffer is.
struct GuidedStepParams {
  const void *noise_pred;        // [R, C, h, w]
  float *latents;                // [N, C, h, w]
  float *history;                // [HISTORY, N, C, h, w]
  float *saved;                  // [N, C, h, w]
  const float *noise;            // [N, C, h, w]
  const float *rows;             // [capacity, COLUMNS]
  const float *timesteps;        // [capacity]
  int *counter;                  // [1]
  int *fault;                    // [1]
  void *sample;                  // [R', C, h, w]
  float *timestep;               // [R']
  const float *mask;             // [N, 1, h, w], or null
  const float *known;            // [N, C, h, w], or null
  const float *known_noise;      // [N, C, h, w], or null
  const float *factors;          // [N], or null
  float *denoised;               // [N, C, h, w], or null
  const int *count;              // [1], or null: capacity
  unsigned *ticket;              // [1], zero between launches
  unsigned elements;             // N C h w
  unsigned image_elements;       // C h w
  unsigned plane;                // h w
  unsigned evaluated;            // R / N, parts of noise_pred: 1, 2 or 3
  unsigned parts;                // R' / N, of sample: 1, 2 or 3
  unsigned prepared;             // R'
  int capacity;
};

// The numbers of one step, the same for every element.
struct StepPlan {
  int step;
  bool active;    // false after the last row: nothing happens
  bool has_next;  // whether there is an input to prepare
  float guidance, image_guidance, p, q, a, b[HISTORY], e, c, save, x0_x, x0_m;
  float input_scale, signal, noise, timestep;  // of the next row
};

SDRT_BOTH int row_count(const GuidedStepParams &params) {
  return params.count ? *params.count : params.capacity;
}

// What both entry points write for the row at `step`.
SDRT_BOTH void plan_input(const GuidedStepParams &params, int step, StepPlan &plan) {
  const float *row = params.rows + step * COLUMNS;
  plan.input_scale = row[INPUT_SCALE];
  plan.signal = row[SIGNAL];
  plan.noise = row[NOISE];
  plan.timestep = params.timesteps[step];
}

SDRT_BOTH StepPlan plan_step(const GuidedStepParams &params) {
  StepPlan plan{};
  const int count = row_count(params);
  plan.step = *params.counter;
  plan.active = plan.step < count;
  if (!plan.active) return plan;
  const float *row = params.rows + plan.step * COLUMNS;
  plan.guidance = row[GUIDANCE];
  if (params.evaluated == 3) plan.image_guidance = row[IMAGE_GUIDANCE];
  plan.p = row[P];
  plan.q = row[Q];
  plan.a = row[A];
  for (int back = 0; back < HISTORY; ++back) plan.b[back] = row[B0 + back];
  plan.e = row[E];
  plan.c = row[C];
  plan.save = row[SAVE];
  plan.x0_x = row[X0_X];
  plan.x0_m = row[X0_M];
  plan.has_next = plan.step + 1 < count;
  plan.signal = 1.0f;  // the result has no noise
  if (plan.has_next) plan_input(params, plan.step + 1, plan);
  return plan;
}

// What a step reads whatever the row.
template <class T, int W>
struct StepInputs {
  Pack<T, W> first, conditional;  // the U-Net's output: the unconditional part first, when guided
  Pack<float, W> x;
  float factor;  // of the image, after guidance
};

template <class T, int W>
SDRT_BOTH StepInputs<T, W> load_inputs(const GuidedStepParams &params, unsigned i) {
  const T *prediction = static_cast<const T *>(params.noise_pred);
  const T *conditional = prediction + (params.evaluated - 1) * params.elements;  // no branch around a load
  const float factor = params.factors ? params.factors[i / params.image_elements] : 1.0f;  // 1 m is m
  return {load_pack<W>(prediction + i), load_pack<W>(conditional + i), load_pack<W>(params.latents + i), factor};
}

// Classifier-free guidance.
SDRT_BOTH float guide(float unconditional, float conditional, float scale) {
  return unconditional + scale * (conditional - unconditional);
}

// The same by text and by picture (InstructPix2Pix).
SDRT_BOTH float guide_by_picture(
    float unconditional, float picture, float conditional, float scale, float image_scale) {
  return unconditional + scale * (conditional - picture) + image_scale * (picture - unconditional);
}

// The terms that only some rows have: d of earlier rows, the saved x, noise.
constexpr int EXTRA_TERMS = HISTORY + 1;

template <int W>
struct ExtraTerms {
  float coefficient[EXTRA_TERMS];
  Pack<float, W> values[EXTRA_TERMS];
};

// All loads before the first use. A term of coefficient zero is not read: a NaN there must do no harm.
template <int W>
SDRT_BOTH ExtraTerms<W> load_extra_terms(const GuidedStepParams &params, const StepPlan &plan, unsigned i) {
  ExtraTerms<W> terms{};
  const float *address[EXTRA_TERMS];
  for (int back = 1; back < HISTORY; ++back) {
    const unsigned slot = static_cast<unsigned>(plan.step - back) % HISTORY;
    terms.coefficient[back - 1] = plan.b[back];
    address[back - 1] = params.history + slot * params.elements;
  }
  terms.coefficient[HISTORY - 1] = plan.e;
  address[HISTORY - 1] = params.saved;
  terms.coefficient[HISTORY] = plan.c;
  address[HISTORY] = params.noise;
  for (int t = 0; t < EXTRA_TERMS; ++t)
    if (terms.coefficient[t] != 0.0f) terms.values[t] = load_pack<W>(address[t] + i);
  return terms;
}

// x where the mask says so, else the known latents at the noise level of the next row.
template <int W>
SDRT_BOTH void blend(const GuidedStepParams &params, const StepPlan &plan, unsigned i, Pack<float, W> &x) {
  const unsigned image = i / params.image_elements;
  const Pack<float, W> mask = load_pack<W>(params.mask + image * params.plane + i % params.plane);
  const Pack<float, W> known = load_pack<W>(params.known + i), noise = load_pack<W>(params.known_noise + i);
  for (int k = 0; k < W; ++k) {
    const float kept = plan.signal * known.v[k] + plan.noise * noise.v[k];
    x.v[k] = mask.v[k] * x.v[k] + (1.0f - mask.v[k]) * kept;
  }
}

// The U-Net's input, for each part that it will read.
template <class T, int W>
SDRT_BOTH void write_sample(
    const GuidedStepParams &params, float scale, unsigned i, const Pack<float, W> &x) {
  Pack<T, W> scaled;
  for (int k = 0; k < W; ++k) scaled.v[k] = narrow<T>(x.v[k] * scale);
  T *sample = static_cast<T *>(params.sample);
  store_pack(sample + i, scaled);
  if (params.parts > 1) store_pack(sample + params.elements + i, scaled);
  if (params.parts > 2) store_pack(sample + 2 * params.elements + i, scaled);
}

// The step for elements i .. i+W-1, which lie in one plane; false if the prediction is not finite.
template <class T, int W>
SDRT_BOTH bool step_elements(
    const GuidedStepParams &params, const StepPlan &plan, const StepInputs<T, W> &inputs, unsigned i) {
  const ExtraTerms<W> terms = load_extra_terms<W>(params, plan, i);
  Pack<T, W> picture{};  // the middle part, of the picture without the text
  if (params.evaluated == 3)
    picture = load_pack<W>(static_cast<const T *>(params.noise_pred) + params.elements + i);
  Pack<float, W> d, result, x0;
  bool finite = true;
  for (int k = 0; k < W; ++k) {
    float m = widen(inputs.first.v[k]);
    const float conditional = widen(inputs.conditional.v[k]);
    if (params.evaluated == 2) m = guide(m, conditional, plan.guidance);
    if (params.evaluated == 3)
      m = guide_by_picture(m, widen(picture.v[k]), conditional, plan.guidance, plan.image_guidance);
    m *= inputs.factor;
    finite = finite && is_finite(m);
    x0.v[k] = plan.x0_x * inputs.x.v[k] + plan.x0_m * m;
    d.v[k] = plan.p * inputs.x.v[k] + plan.q * m;
    result.v[k] = plan.a * inputs.x.v[k] + plan.b[0] * d.v[k];
  }
  for (int t = 0; t < EXTRA_TERMS; ++t) {
    if (terms.coefficient[t] == 0.0f) continue;
    for (int k = 0; k < W; ++k) result.v[k] += terms.coefficient[t] * terms.values[t].v[k];
  }
  if (params.mask) blend(params, plan, i, result);
  if (params.denoised) store_pack(params.denoised + i, x0);

  store_pack(params.history + static_cast<unsigned>(plan.step) % HISTORY * params.elements + i, d);
  if (plan.save != 0.0f) store_pack(params.saved + i, inputs.x);
  store_pack(params.latents + i, result);
  if (plan.has_next) write_sample<T>(params, plan.input_scale, i, result);
  return finite;
}

// The next timestep, the same for each row that the U-Net will read; shared out among `threads`.
SDRT_BOTH void write_timesteps(
    const GuidedStepParams &params, float timestep, unsigned thread, unsigned threads) {
  for (unsigned row = thread; row < params.prepared; row += threads) params.timestep[row] = timestep;
}

// Once per step, after all elements.
SDRT_BOTH void finish_step(const GuidedStepParams &params, const StepPlan &plan) {
  *params.counter = plan.step + 1;
}
