// One step of the deterministic sampler (DDIM, Eq. 12 with sigma = 0), in place on x_t.
//
// NumPy twin: diffusionact/schedule.py, ddim_step, with the float32 scalars of schedule.Step.
// Compiled with --fmad=false both agree bit for bit. x stays float32 whatever the network's
// precision: at high noise an error in x is multiplied by sqrt_recip, up to 97 times.

// The scalars of one step, in the order of the fields of schedule.Step (after `row`). What the
// network predicts, eps, v or x_0, is in the first two, so the kernel has no branch for it; render
// and inversion differ in the last two only.
struct Step {
  float x0_on_x;
  float x0_on_prediction;
  float sqrt_recip;            // sqrt(1 / alpha_bar)
  float sqrt_recip_minus_one;  // sqrt(1 / alpha_bar - 1)
  float to_signal;             // sqrt(alpha_bar_to)
  float to_noise;              // sqrt(1 - alpha_bar_to)
};

// x: float32 [count], updated in place; prediction: float32 [count]; table: float32 [T,6] in
// execution order; step: int32 [1], the row to use. The row is read on the device, so a graph
// captured once serves every step; nothing here may write to it while a step is in flight.
extern "C" __global__ void ddim_step(float* __restrict__ x, const float* __restrict__ prediction,
                                     const Step* __restrict__ table, const int* __restrict__ step,
                                     int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const Step s = table[*step];
  const float x_t = x[i];
  const float x_0 = x_t * s.x0_on_x + prediction[i] * s.x0_on_prediction;
  // DiffAE code: clip x_0, then re-derive the noise from the clipped one.
  const float clipped = fminf(fmaxf(x_0, -1.0f), 1.0f);
  const float eps = (x_t * s.sqrt_recip - clipped) / s.sqrt_recip_minus_one;
  x[i] = clipped * s.to_signal + eps * s.to_noise;
}
