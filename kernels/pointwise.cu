// The small operators between matrix products, each one pass over its data.
//
// add_norm   x' = x + y (y may be null), n = x' / sqrt(mean(x'^2) + eps) * w                     (RMS norm, arXiv:1910.07467)
//            x, y, x', n [T, N]; w f32 [N]. Grid T, 256 threads. add_norm_wide: 16-bit elements, N a multiple of 8 up to 8192,
//            read once and held in registers; `warps` (1, 2, 4 or 8) to a row, N <= 1024 warps; grid ceil(T warps / 8).
// heads      out[t, h] = rotate(norm(x[t, h] + bias[h])): bias f32 [H D], norm weight f32 [D], cos and sin f32 [T, D / 2], any
//            of them null. x [T, ..] with its own row stride, out [T, H, D].                      (RoPE, arXiv:2104.09864)
//            Grid ceil(T H / 8), 256 threads: one warp per head. D even, at most 512. heads_wide: 16-bit elements, D / 16 a power
//            of two up to 16, rows 16-byte aligned; D / 16 threads to a head of 8 pairs each, grid ceil(T H D / 4096).
// rope_table cos and sin of position * frequency, times an amplitude: positions start + i, or f32 positions[i].
//            Grid ceil(T F / 256), 256 threads.
// gated      act(gate) * up, elementwise, SiLU or GELU's tanh form. Grid ceil(n / 2048), 256 threads, 8 elements each.
// gather     out[i] = table[ids[i]]: table [.., N] with its own row stride, ids u32 [n] below its rows, out [n, N]. Grid n, 256 threads.
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

// Eight consecutive elements, as f32.
template <typename T> __device__ inline void load8(float (&v)[8], const T *from) {
  const uint4 x = *(const uint4 *)from;
  const float2 a = unpack<T>(x.x), b = unpack<T>(x.y), c = unpack<T>(x.z), d = unpack<T>(x.w);
  v[0] = a.x, v[1] = a.y, v[2] = b.x, v[3] = b.y, v[4] = c.x, v[5] = c.y, v[6] = d.x, v[7] = d.y;
}
template <> __device__ inline void load8<float>(float (&v)[8], const float *from) {
  const float4 a = *(const float4 *)from, b = *(const float4 *)(from + 4);
  v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}
template <typename T> __device__ inline void store8(T *to, const float (&v)[8]) {
  *(uint4 *)to = make_uint4(pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7]));
}

template <typename T>
__device__ void add_norm_wide(const T *x, const T *y, const float *w, T *sum, T *out, int n, float eps, int tokens, int warps) {
  constexpr int HELD = 4;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, t = blockIdx.x * (8 / warps) + warp / warps;
  const int first = warp % warps * WARP + lane, step = warps * WARP, chunks = t < tokens ? n / 8 : 0;
  const int64_t row = (int64_t)t * n;
  float v[HELD][8], squares = 0.f;
#pragma unroll
  for (int j = 0; j < HELD; j++) {
    const int c = first + j * step;
    if (c >= chunks) continue;
    load8<T>(v[j], x + row + c * 8);
    if (y) {
      float added[8];
      load8<T>(added, y + row + c * 8);
#pragma unroll
      for (int i = 0; i < 8; i++) v[j][i] = to_float(from_float<T>(v[j][i] + added[i]));
      store8<T>(sum + row + c * 8, v[j]);
    }
#pragma unroll
    for (int i = 0; i < 8; i++) squares += v[j][i] * v[j][i];
  }
  squares = warp_sum(squares);
  if (warps > 1) {
    __shared__ float parts[8];
    if (lane == 0) parts[warp] = squares;
    __syncthreads();
    squares = 0.f;
    for (int i = 0; i < warps; i++) squares += parts[warp / warps * warps + i];
  }
  const float factor = 1.f / sqrtf(squares / n + eps);
#pragma unroll
  for (int j = 0; j < HELD; j++) {
    const int c = first + j * step;
    if (c >= chunks) continue;
    float weight[8];
    load8<float>(weight, w + c * 8);
#pragma unroll
    for (int i = 0; i < 8; i++) v[j][i] *= factor * weight[i];
    store8<T>(out + row + c * 8, v[j]);
  }
}

template <typename T>
__device__ void heads_wide(const T *x, int64_t x_row, const float *bias, const float *weight, float eps, const float *cos,
                           const float *sin, T *out, int tokens, int count, int dim) {
  const int half = dim / 2, threads = half / 8, at = blockIdx.x * blockDim.x + threadIdx.x;
  const int unit = at / threads, i = at % threads * 8, t = unit / count, h = unit % count;
  const bool live = t < tokens;
  float a[8] = {}, b[8] = {}, squares = 0.f;
  if (live) {
    const T *from = x + t * x_row + h * dim + i;
    load8<T>(a, from);
    load8<T>(b, from + half);
    if (bias) {
      float more[2][8];
      load8<float>(more[0], bias + h * dim + i);
      load8<float>(more[1], bias + h * dim + i + half);
#pragma unroll
      for (int j = 0; j < 8; j++) a[j] += more[0][j], b[j] += more[1][j];
    }
  }
  if (weight) {
#pragma unroll
    for (int j = 0; j < 8; j++) squares += a[j] * a[j] + b[j] * b[j];
    for (int d = threads / 2; d > 0; d >>= 1) squares += __shfl_xor_sync(~0u, squares, d);
    const float factor = 1.f / sqrtf(squares / dim + eps);
    float scale[2][8];
    load8<float>(scale[0], weight + i);
    load8<float>(scale[1], weight + i + half);
#pragma unroll
    for (int j = 0; j < 8; j++) a[j] *= factor * scale[0][j], b[j] *= factor * scale[1][j];
  }
  if (!live) return;
  if (cos) {
    float c[8], s[8];
    load8<float>(c, cos + (int64_t)t * half + i);
    load8<float>(s, sin + (int64_t)t * half + i);
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const float first = a[j];
      a[j] = first * c[j] - b[j] * s[j];
      b[j] = b[j] * c[j] + first * s[j];
    }
  }
  T *to = out + (int64_t)unit * dim + i;
  store8<T>(to, a);
  store8<T>(to + half, b);
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
  extern "C" __global__ void add_norm_##NAME(const T *x, const T *y, const float *w, T *sum, T *out, int n, float eps, int, \
                                             int) {                                                                        \
    add_norm<T>(x, y, w, sum, out, n, eps);                                                                                \
  }                                                                                                                        \
  extern "C" __global__ void heads_##NAME(const T *x, int64_t x_row, const float *bias, const float *weight, float eps,     \
                                          const float *cos, const float *sin, T *out, int tokens, int count, int dim) {    \
    heads<T>(x, x_row, bias, weight, eps, cos, sin, out, tokens, count, dim);                                              \
  }                                                                                                                        \
  extern "C" __global__ void gated_##NAME(const T *gate, const T *up, T *out, int64_t n, int kind) {                        \
    gated<T>(gate, up, out, n, kind);                                                                                      \
  }                                                                                                                        \
  extern "C" __global__ void gather_##NAME(const T *table, int64_t row, const uint32_t *ids, T *out, int n) {               \
    const T *from = table + (int64_t)ids[blockIdx.x] * row;                                                                \
    T *to = out + (int64_t)blockIdx.x * n;                                                                                 \
    for (int i = threadIdx.x; i < n; i += blockDim.x) to[i] = from[i];                                                     \
  }
INSTANCE(f32, float)
INSTANCE(bf16, __nv_bfloat16)
INSTANCE(f16, __half)
#define WIDE(NAME, T)                                                                                                      \
  extern "C" __global__ void __launch_bounds__(256) add_norm_wide_##NAME(                                                  \
      const T *x, const T *y, const float *w, T *sum, T *out, int n, float eps, int tokens, int warps) {                    \
    add_norm_wide<T>(x, y, w, sum, out, n, eps, tokens, warps);                                                             \
  }                                                                                                                        \
  extern "C" __global__ void heads_wide_##NAME(const T *x, int64_t x_row, const float *bias, const float *weight, float eps, \
                                               const float *cos, const float *sin, T *out, int tokens, int count, int dim) { \
    heads_wide<T>(x, x_row, bias, weight, eps, cos, sin, out, tokens, count, dim);                                         \
  }
WIDE(bf16, __nv_bfloat16)
WIDE(f16, __half)
extern "C" __global__ void gated_wide_bf16(const uint4 *gate, const uint4 *up, uint4 *out, int64_t n, int kind) {
  gated_wide<__nv_bfloat16>(gate, up, out, n, kind);
}
extern "C" __global__ void gated_wide_f16(const uint4 *gate, const uint4 *up, uint4 *out, int64_t n, int kind) {
  gated_wide<__half>(gate, up, out, n, kind);
}
