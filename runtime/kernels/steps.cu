// What the sampler does around the network: begin a run, hand the network its row, count on.
//
// The step to do is counted on the device, so one captured step serves every step of every run.
// NumPy twins: runtime/loop.py, _Sampler.sample (its copies and its enumeration).

// x: float32 [count] <- x_T: float32 [count]; step: int32 [1] <- 0.
extern "C" __global__ void start(float* __restrict__ x, const float* __restrict__ x_T,
                                 int* __restrict__ step, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  x[i] = x_T[i];
  if (i == 0) *step = 0;
}

// scales, shifts: float32 [T,count]; rows: int32 [T], of them, in the order of the steps;
// step: int32 [1] -> scale, shift: float32 [count], where the network reads.
extern "C" __global__ void take_row(const float* __restrict__ scales,
                                    const float* __restrict__ shifts,
                                    const int* __restrict__ rows, const int* __restrict__ step,
                                    float* __restrict__ scale, float* __restrict__ shift,
                                    int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const long long from = static_cast<long long>(rows[*step]) * count + i;
  scale[i] = scales[from];
  shift[i] = shifts[from];
}

// step: int32 [1], one more; count: 1. Its own launch: while a step is in flight, all read it.
extern "C" __global__ void next_step(int* __restrict__ step, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) step[i] += 1;
}
