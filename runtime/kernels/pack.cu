// Pictures to network tensors and back, one thread per pixel. No host sync, no allocation.
//
// NumPy twins: diffusionact/image.py, to_tensor (pack) and to_uint8 (unpack). Compiled with
// --fmad=false both agree with their twin bit for bit.

// Return the index of this thread's pixel in the whole grid.
static __device__ __forceinline__ int pixel_index() {
  return blockIdx.x * blockDim.x + threadIdx.x;
}

// picture: uint8 [pixels,3], RGB -> x: float32 [3,pixels] in [-1, 1].
extern "C" __global__ void pack(const unsigned char* __restrict__ picture,
                                float* __restrict__ x, int pixels) {
  const int i = pixel_index();
  if (i >= pixels) return;
  for (int channel = 0; channel < 3; ++channel) {
    // Neighbouring threads write neighbouring floats; the three byte reads share a cache line.
    x[channel * pixels + i] = picture[3 * i + channel] / 127.5f - 1.0f;
  }
}

// x: float32 [3,pixels], nominally [-1, 1] -> picture: uint8 [pixels,3], RGB, clipped and rounded
// to nearest, halves to even. NaN becomes 0: a broken network shows as black, not as a crash.
extern "C" __global__ void unpack(const float* __restrict__ x,
                                  unsigned char* __restrict__ picture, int pixels) {
  const int i = pixel_index();
  if (i >= pixels) return;
  for (int channel = 0; channel < 3; ++channel) {
    const float grey = rintf(x[channel * pixels + i] * 127.5f + 127.5f);
    picture[3 * i + channel] = static_cast<unsigned char>(fminf(fmaxf(grey, 0.0f), 255.0f));
  }
}
