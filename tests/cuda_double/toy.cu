// Networks of one line each, so that the loop's GPU tests need no other library.

// image, condition: float32 [1,3,S,S] -> z: float32 [1,count].
extern "C" __global__ void toy_encode(const float* image, const float* condition, float* z,
                                      int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) z[i] = image[i] * 0.5f + condition[i];
}

// z: float32 [1,Z]; rows: float32 [T,2*K] -> scale, shift: float32 [T,K]; count: T * K.
extern "C" __global__ void toy_modulate(const float* z, const float* rows, float* scale,
                                        float* shift, int k, int z_size, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const float* row = rows + i / k * 2 * k;
  scale[i] = row[i % k] * z[i % z_size];
  shift[i] = row[k + i % k] + z[i % z_size];
}

// x: float32 [count]; scale, shift: float32 [1,K] -> prediction: float32 [count].
extern "C" __global__ void toy_step(const float* x, const float* scale, const float* shift,
                                    float* prediction, int k, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) prediction[i] = x[i] * scale[i % k] + shift[i % k];
}
