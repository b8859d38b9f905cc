// Group norm, per-channel scale and shift, and SiLU in one pass over channels-last memory, with
// its gradient. Training on a CPU spends more time in these three than in its convolutions.
#include <torch/extension.h>
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>

#include <cmath>
#include <tuple>
#include <vector>

namespace {

using Row = std::vector<float>;

inline float load(const float* p) { return *p; }
inline float load(const c10::BFloat16* p) { return static_cast<float>(*p); }
inline void store(float* p, float v) { *p = v; }
inline void store(c10::BFloat16* p, float v) { *p = c10::BFloat16(v); }

// Clamped: beyond -80 the vectorised exp overflows, and fast arithmetic makes NaN of infinity.
inline float sigmoid(float u) { return 1.0f / (1.0f + std::exp(-std::max(u, -80.0f))); }

// Mean and 1/std of every group of one sample, from per-channel sums.
template <typename T>
void moments(const T* x, int64_t cells, int64_t channels, int64_t groups, float eps, float* mean,
             float* rstd) {
  Row sum(channels, 0.0f), square(channels, 0.0f);
  for (int64_t p = 0; p < cells; ++p) {
    const T* row = x + p * channels;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const float v = load(row + c);
      sum[c] += v;
      square[c] += v * v;
    }
  }
  const int64_t width = channels / groups;
  for (int64_t g = 0; g < groups; ++g) {
    double s = 0, q = 0;
    for (int64_t c = g * width; c < (g + 1) * width; ++c) {
      s += sum[c];
      q += square[c];
    }
    const double count = static_cast<double>(width * cells);
    const double m = s / count;
    mean[g] = static_cast<float>(m);
    rstd[g] = static_cast<float>(1.0 / std::sqrt(std::max(q / count - m * m, 0.0) + eps));
  }
}

template <typename T>
void forward_sample(const T* x, const float* scale, const float* shift, int64_t cells,
                    int64_t channels, int64_t groups, float eps, float* mean, float* rstd, T* y) {
  moments(x, cells, channels, groups, eps, mean, rstd);
  Row a(channels), b(channels);
  const int64_t width = channels / groups;
  for (int64_t c = 0; c < channels; ++c) {
    a[c] = rstd[c / width] * scale[c];
    b[c] = shift[c] - mean[c / width] * a[c];
  }
  for (int64_t p = 0; p < cells; ++p) {
    const T* in = x + p * channels;
    T* out = y + p * channels;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const float u = a[c] * load(in + c) + b[c];
      store(out + c, u * sigmoid(u));
    }
  }
}

template <typename T>
void backward_sample(const T* x, const T* grad, const float* scale, const float* shift,
                     const float* mean, const float* rstd, int64_t cells, int64_t channels,
                     int64_t groups, float* dscale, float* dshift, T* dx) {
  const int64_t width = channels / groups;
  Row m(channels), r(channels), du(cells * channels);
  for (int64_t c = 0; c < channels; ++c) {
    m[c] = mean[c / width];
    r[c] = rstd[c / width];
  }
  for (int64_t p = 0; p < cells; ++p) {
    const T *in = x + p * channels, *g = grad + p * channels;
    float* d = du.data() + p * channels;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const float n = (load(in + c) - m[c]) * r[c];
      const float u = n * scale[c] + shift[c];
      const float s = sigmoid(u);
      const float v = load(g + c) * s * (1.0f + u * (1.0f - s));
      d[c] = v;
      dshift[c] += v;
      dscale[c] += v * n;
    }
  }
  // dx = rstd (scale du - mean(scale du) - n mean(scale du n)), means over the group.
  Row first(channels), second(channels);
  const float count = static_cast<float>(width * cells);
  for (int64_t g = 0; g < groups; ++g) {
    float f = 0, s = 0;
    for (int64_t c = g * width; c < (g + 1) * width; ++c) {
      f += scale[c] * dshift[c];
      s += scale[c] * dscale[c];
    }
    for (int64_t c = g * width; c < (g + 1) * width; ++c) {
      first[c] = f / count;
      second[c] = s / count;
    }
  }
  for (int64_t p = 0; p < cells; ++p) {
    const T* in = x + p * channels;
    const float* d = du.data() + p * channels;
    T* out = dx + p * channels;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const float n = (load(in + c) - m[c]) * r[c];
      store(out + c, r[c] * (scale[c] * d[c] - first[c] - n * second[c]));
    }
  }
}

template <typename F>
void dispatch(at::ScalarType type, F run) {
  if (type == at::kBFloat16) return run(c10::BFloat16{});
  TORCH_CHECK(type == at::kFloat, "norm_silu takes float32 or bfloat16, not ", type);
  run(float{});
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(const at::Tensor& x, const at::Tensor& scale,
                                                       const at::Tensor& shift, int64_t groups,
                                                       double eps) {
  const int64_t n = x.size(0), c = x.size(1), cells = x.size(2) * x.size(3);
  auto y = at::empty_like(x);
  auto mean = at::empty({n, groups}, scale.options()), rstd = at::empty_like(mean);
  dispatch(x.scalar_type(), [&](auto tag) {
    using scalar_t = decltype(tag);
      at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          forward_sample(x.data_ptr<scalar_t>() + i * c * cells, scale.data_ptr<float>() + i * c,
                         shift.data_ptr<float>() + i * c, cells, c, groups,
                         static_cast<float>(eps), mean.data_ptr<float>() + i * groups,
                         rstd.data_ptr<float>() + i * groups,
                         y.data_ptr<scalar_t>() + i * c * cells);
        }
      });
  });
  return {y, mean, rstd};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& x, const at::Tensor& grad,
                                                        const at::Tensor& scale,
                                                        const at::Tensor& shift,
                                                        const at::Tensor& mean,
                                                        const at::Tensor& rstd, int64_t groups) {
  const int64_t n = x.size(0), c = x.size(1), cells = x.size(2) * x.size(3);
  auto dx = at::empty_like(x);
  auto dscale = at::zeros_like(scale), dshift = at::zeros_like(shift);
  dispatch(x.scalar_type(), [&](auto tag) {
    using scalar_t = decltype(tag);
      at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          backward_sample(x.data_ptr<scalar_t>() + i * c * cells,
                          grad.data_ptr<scalar_t>() + i * c * cells,
                          scale.data_ptr<float>() + i * c, shift.data_ptr<float>() + i * c,
                          mean.data_ptr<float>() + i * groups, rstd.data_ptr<float>() + i * groups,
                          cells, c, groups, dscale.data_ptr<float>() + i * c,
                          dshift.data_ptr<float>() + i * c, dx.data_ptr<scalar_t>() + i * c * cells);
        }
      });
  });
  return {dx, dscale, dshift};
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("forward", &forward);
  m.def("backward", &backward);
}
