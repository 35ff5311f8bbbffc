// The small operators between matrix products, each one pass over its data.
//
// add_norm   x' = x + y (y may be null), n = x' / sqrt(mean(x'^2) + eps) * w                     (RMS norm, arXiv:1910.07467)
//            x, y, x', n [T, N]; w f32 [N]. Grid T, 256 threads.
// heads      out[t, h] = rotate(norm(x[t, h] + bias[h])): bias f32 [H D], norm weight f32 [D], cos and sin f32 [T, D / 2], any
//            of them null. x [T, ..] with its own row stride, out [T, H, D].                      (RoPE, arXiv:2104.09864)
//            Grid ceil(T H / 8), 256 threads: one warp per head. D even, at most 512.
// rope_table cos and sin of position * frequency, times an amplitude: positions start + i, or f32 positions[i].
//            Grid ceil(T F / 256), 256 threads.
// gated      act(gate) * up, elementwise, SiLU or GELU's tanh form. Grid ceil(n / 2048), 256 threads, 8 elements each.
//
// All arithmetic is f32; each result is rounded once.
#include "common.cuh"

template <typename T>
__device__ void add_norm(const T *x, const T *y, const float *w, T *sum, T *out, int n, float eps) {
  const int64_t row = (int64_t)blockIdx.x * n;
  float squares = 0.f;
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    float v = to_float(x[row + i]);
    if (y) {
      const T rounded = from_float<T>(v + to_float(y[row + i]));
      sum[row + i] = rounded;
      v = to_float(rounded);
    }
    squares += v * v;
  }
  __shared__ float parts[8];
  squares = warp_sum(squares);
  if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = squares;
  __syncthreads();
  float total = 0.f;
  for (int i = 0; i < 8; i++) total += parts[i];
  const float factor = 1.f / sqrtf(total / n + eps);
  const T *from = y ? sum : x;
  for (int i = threadIdx.x; i < n; i += blockDim.x) out[row + i] = from_float<T>(to_float(from[row + i]) * factor * w[i]);
}

template <typename T>
__device__ void heads(const T *x, int64_t x_row, const float *bias, const float *weight, float eps, const float *cos,
                      const float *sin, T *out, int tokens, int count, int dim) {
  constexpr int PAIRS = 8;
  const int unit = blockIdx.x * 8 + threadIdx.x / WARP, lane = threadIdx.x % WARP, half = dim / 2;
  if (unit >= tokens * count) return;
  const int t = unit / count, h = unit % count;
  const T *from = x + t * x_row + h * dim;
  float a[PAIRS], b[PAIRS], squares = 0.f;
  for (int j = 0; j < PAIRS; j++) {
    const int i = lane + j * WARP;
    if (i >= half) break;
    a[j] = to_float(from[i]);
    b[j] = to_float(from[i + half]);
    if (bias) {
      a[j] += bias[h * dim + i];
      b[j] += bias[h * dim + i + half];
    }
    squares += a[j] * a[j] + b[j] * b[j];
  }
  float factor = 1.f;
  if (weight) factor = 1.f / sqrtf(warp_sum(squares) / dim + eps);
  T *to = out + ((int64_t)t * count + h) * dim;
  for (int j = 0; j < PAIRS; j++) {
    const int i = lane + j * WARP;
    if (i >= half) break;
    if (weight) {
      a[j] *= factor * weight[i];
      b[j] *= factor * weight[i + half];
    }
    if (cos) {
      const float c = cos[(int64_t)t * half + i], s = sin[(int64_t)t * half + i], first = a[j];
      a[j] = first * c - b[j] * s;
      b[j] = b[j] * c + first * s;
    }
    to[i] = from_float<T>(a[j]);
    to[i + half] = from_float<T>(b[j]);
  }
}

extern "C" __global__ void rope_table(const float *frequencies, const float *positions, int start, float amplitude, float *cos,
                                      float *sin, int tokens, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= tokens * count) return;
  const int t = i / count;
  // The f32 product, as on the host and in transformers.
  const float angle = __fmul_rn(positions ? positions[t] : (float)(start + t), frequencies[i % count]);
  float s, c;
  sincosf(angle, &s, &c);
  cos[i] = c * amplitude;
  sin[i] = s * amplitude;
}

template <typename T> __device__ void gated(const T *gate, const T *up, T *out, int64_t n, int kind) {
  const int64_t first = ((int64_t)blockIdx.x * blockDim.x) * 8 + threadIdx.x;
  for (int j = 0; j < 8; j++) {
    const int64_t i = first + j * blockDim.x;
    if (i < n) out[i] = from_float<T>(activate(to_float(gate[i]), kind) * to_float(up[i]));
  }
}

// Eight 16-bit elements per thread, for lengths and addresses that are multiples of 8.
template <typename T> __device__ void gated_wide(const uint4 *gate, const uint4 *up, uint4 *out, int64_t n, int kind) {
  const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (i * 8 >= n) return;
  const uint4 a = gate[i], b = up[i];
  const uint32_t g[4] = {a.x, a.y, a.z, a.w}, u[4] = {b.x, b.y, b.z, b.w};
  uint32_t r[4];
  for (int j = 0; j < 4; j++) {
    const float2 x = unpack<T>(g[j]), y = unpack<T>(u[j]);
    r[j] = pack<T>(activate(x.x, kind) * y.x, activate(x.y, kind) * y.y);
  }
  out[i] = make_uint4(r[0], r[1], r[2], r[3]);
}

#define INSTANCE(NAME, T)                                                                                                  \
  extern "C" __global__ void add_norm_##NAME(const T *x, const T *y, const float *w, T *sum, T *out, int n, float eps) {    \
    add_norm<T>(x, y, w, sum, out, n, eps);                                                                                \
  }                                                                                                                        \
  extern "C" __global__ void heads_##NAME(const T *x, int64_t x_row, const float *bias, const float *weight, float eps,     \
                                          const float *cos, const float *sin, T *out, int tokens, int count, int dim) {    \
    heads<T>(x, x_row, bias, weight, eps, cos, sin, out, tokens, count, dim);                                              \
  }                                                                                                                        \
  extern "C" __global__ void gated_##NAME(const T *gate, const T *up, T *out, int64_t n, int kind) {                        \
    gated<T>(gate, up, out, n, kind);                                                                                      \
  }
INSTANCE(f32, float)
INSTANCE(bf16, __nv_bfloat16)
INSTANCE(f16, __half)
extern "C" __global__ void gated_wide_bf16(const uint4 *gate, const uint4 *up, uint4 *out, int64_t n, int kind) {
  gated_wide<__nv_bfloat16>(gate, up, out, n, kind);
}
extern "C" __global__ void gated_wide_f16(const uint4 *gate, const uint4 *up, uint4 *out, int64_t n, int kind) {
  gated_wide<__half>(gate, up, out, n, kind);
}
