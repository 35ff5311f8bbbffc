// The steps of decoding one token, all but attention: each a pass over some weights, in f32 from 16-bit weights.
//
// decode_embed    x = embedding[token] * scale; cos and sin of the position for every rotary table.
//                 Grid ceil(N / 256), 256 threads.
// decode_matvec   out = W v (+ bias), or out += W v (+ bias), or out = act(W0 v) * (W1 v), or the largest element of W v;
//                 v = x, or its RMS norm x / sqrt(mean(x^2) + eps) * w. Up to three matrices [rows, N] side by side.
//                 Grid so that each warp gets ROWS rows at a time, 256 threads, shared memory 4 N bytes. N a multiple of 8.
//                 Bound by the weights' bytes; the first of them are asked for before v is there.
// decode_heads    norm and rotation of q and k per head; q to `q`, k and v to their row of the ring and to the sinks.
//                 Grid ceil((H + 2 G) / 8), 256 threads: one warp per head. D even, at most 512.
// decode_pool     adds the token to the block in progress and stores the mean of a block that it completes. After attention,
//                 which may still read the row that the mean replaces. Grid ceil(2 G D / 256), 256 threads.
// decode_add_norm x += norm(y) * w, for families that norm what they add. One block, 256 threads.
// decode_finish   notes the token and moves on. One thread.
#include "decode.cuh"

template <typename T>
__device__ void embed(const T *table, float scale, float *x, int n, const float *frequencies, const float *amplitudes, float *cos, float *sin,
                      int tables, int half, const DecodeState *state) {
  release_next();
  await_previous();
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) x[i] = to_float(table[(int64_t)state->token * n + i]) * scale;
  if (i < tables * half) {
    float s, c;
    sincosf(__fmul_rn((float)state->position, frequencies[i]), &s, &c);
    cos[i] = c * amplitudes[i / half];
    sin[i] = s * amplitudes[i / half];
  }
}

// Mirrors `Matvec` in src/generate/graph.rs.
struct MatvecParams {
  const void *w[3];
  const float *bias[3];
  int rows[3];
  int columns;
  const float *x;
  const float *norm;  // null: x as it is
  float eps;
  int activation;
  float *out;
  float *logits;  // largest element: also stored, if not null
  DecodeState *state;
};

enum { STORE, ADD, GATED, LARGEST };

__device__ inline float activate(float x, int kind) {
  const float inner = kind == 0 ? x : 1.5957691216057308f * (x + 0.044715f * x * x * x);
  return x / (1.f + expf(-inner));
}

template <typename T> __device__ inline float dot8(uint4 w, const float *v) {
  const float4 a = *(const float4 *)v, b = *(const float4 *)(v + 4);
  const float2 w0 = unpack<T>(w.x), w1 = unpack<T>(w.y), w2 = unpack<T>(w.z), w3 = unpack<T>(w.w);
  return w0.x * a.x + w0.y * a.y + w1.x * a.z + w1.y * a.w + w2.x * b.x + w2.y * b.y + w3.x * b.z + w3.y * b.w;
}

template <typename T, int MODE, int ROWS> __device__ void matvec(const MatvecParams &p) {
  extern __shared__ __align__(16) float v[];
  constexpr int AHEAD = ROWS == 1 ? 8 : ROWS == 2 ? 4 : 2;  // 16-byte loads in flight per row
  const int lane = threadIdx.x % WARP, warp = blockIdx.x * 8 + threadIdx.x / WARP, warps = gridDim.x * 8;
  const int n = p.columns, chunks = n / 8;
  const int total = MODE == GATED ? 2 * p.rows[0] : p.rows[0] + p.rows[1] + p.rows[2];
  // Row i of all matrices side by side; with GATED, gate and up alternate.
  auto row = [&](int i) -> const T * {
    if (MODE == GATED) return (const T *)p.w[i & 1] + (int64_t)(i >> 1) * n;
    if (i < p.rows[0]) return (const T *)p.w[0] + (int64_t)i * n;
    i -= p.rows[0];
    if (i < p.rows[1]) return (const T *)p.w[1] + (int64_t)i * n;
    return (const T *)p.w[2] + (int64_t)(i - p.rows[1]) * n;
  };
  auto bias = [&](int i) -> float {
    for (int m = 0; m < 3; m++) {
      if (i < p.rows[m]) return p.bias[m] ? p.bias[m][i] : 0.f;
      i -= p.rows[m];
    }
    return 0.f;
  };
  uint4 w[ROWS][AHEAD];
  int first = warp * ROWS;
  auto fetch = [&](int c) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const T *from = row(min(first + r, total - 1));
#pragma unroll
      for (int a = 0; a < AHEAD; a++) {
        const int chunk = c + a * WARP + lane;
        w[r][a] = chunk < chunks ? load16_stream(from + chunk * 8) : make_uint4(0, 0, 0, 0);
      }
    }
  };
  if (first < total) fetch(0);
  release_next();
  await_previous();
  float squares = 0.f;
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    const float x = p.x[i];
    v[i] = x;
    squares += x * x;
  }
  if (p.norm) {
    __shared__ float parts[8];
    squares = warp_sum(squares);
    if (lane == 0) parts[threadIdx.x / WARP] = squares;
    __syncthreads();
    float sum = 0.f;
    for (int i = 0; i < 8; i++) sum += parts[i];
    const float factor = 1.f / sqrtf(sum / n + p.eps);
    for (int i = threadIdx.x; i < n; i += blockDim.x) v[i] *= factor * p.norm[i];
  }
  __syncthreads();
  unsigned long long best = 0;
  bool finite = true;
  for (; first < total; first += warps * ROWS) {
    float sums[ROWS] = {};
    for (int c = 0; c < chunks; c += AHEAD * WARP) {
      if (c > 0 || first != warp * ROWS) fetch(c);
#pragma unroll
      for (int a = 0; a < AHEAD; a++) {
        const int chunk = min(c + a * WARP + lane, chunks - 1);
#pragma unroll
        for (int r = 0; r < ROWS; r++) sums[r] += dot8<T>(w[r][a], v + chunk * 8);
      }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) sums[r] = warp_sum(sums[r]);
    if (lane == 0) {
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        const int i = first + r;
        if (i >= total) break;
        if (MODE == STORE) p.out[i] = sums[r] + bias(i);
        if (MODE == ADD) p.out[i] += sums[r] + bias(i);
        if (MODE == GATED && r % 2 == 0) p.out[i >> 1] = activate(sums[r], p.activation) * sums[(r + 1) % ROWS];
        if (MODE == LARGEST) {
          // The first of equals wins.
          const unsigned long long key = (unsigned long long)ordered(sums[r]) << 32 | (0xffffffffu - i);
          best = max(best, key);
          finite = finite && isfinite(sums[r]);
          if (p.logits) p.logits[i] = sums[r];
        }
      }
    }
  }
  if (MODE == LARGEST && lane == 0) {
    if (best) atomicMax(&p.state->best, best);
    if (!finite) p.state->stopped = 2;
  }
}

// Mirrors `Heads` in src/generate/graph.rs. A layer's caches are [rows, G, D].
struct HeadsParams {
  const float *qkv;      // [H + 2 G, D]
  const float *q_norm;   // [D] or null
  const float *k_norm;
  float eps;
  const float *cos;      // [D / 2]
  const float *sin;
  void *q;               // [H, D]
  void *ring_k, *ring_v;
  void *sink_k, *sink_v; // or null
  void *mean_k, *mean_v; // summaries, or null
  float *running;        // [2, G D]
  int heads, kv_heads, dim, capacity, sinks, block, mean_rows, readable;
  DecodeState *state;
};

template <typename T> __device__ void heads(const HeadsParams &p) {
  constexpr int PAIRS = 8;
  const int unit = blockIdx.x * 8 + threadIdx.x / WARP, lane = threadIdx.x % WARP, half = p.dim / 2;
  release_next();
  await_previous();
  if (unit >= p.heads + 2 * p.kv_heads || p.state->stopped) return;
  const int kind = unit < p.heads ? 0 : unit < p.heads + p.kv_heads ? 1 : 2, position = p.state->position;
  const float *from = p.qkv + unit * p.dim;
  const float *weight = kind == 0 ? p.q_norm : kind == 1 ? p.k_norm : nullptr;
  float a[PAIRS], b[PAIRS], squares = 0.f;
  for (int j = 0; j < PAIRS; j++) {
    const int i = lane + j * WARP;
    if (i >= half) break;
    a[j] = from[i];
    b[j] = from[i + half];
    squares += a[j] * a[j] + b[j] * b[j];
  }
  const float factor = weight ? 1.f / sqrtf(warp_sum(squares) / p.dim + p.eps) : 1.f;
  const int g = unit - p.heads - (kind == 2 ? p.kv_heads : 0), width = p.kv_heads * p.dim;
  T *to = kind == 0 ? (T *)p.q + unit * p.dim
                    : (T *)(kind == 1 ? p.ring_k : p.ring_v) + (int64_t)(position % p.capacity) * width + g * p.dim;
  T *sink = kind > 0 && position < p.sinks ? (T *)(kind == 1 ? p.sink_k : p.sink_v) + position * width + g * p.dim : nullptr;
  for (int j = 0; j < PAIRS; j++) {
    const int i = lane + j * WARP;
    if (i >= half) break;
    if (weight) {
      a[j] *= factor * weight[i];
      b[j] *= factor * weight[i + half];
    }
    if (kind < 2) {
      const float c = p.cos[i], s = p.sin[i], first = a[j];
      a[j] = first * c - b[j] * s;
      b[j] = b[j] * c + first * s;
    }
    to[i] = from_float<T>(a[j]);
    to[i + half] = from_float<T>(b[j]);
    if (sink) {
      sink[i] = to[i];
      sink[i + half] = to[i + half];
    }
  }
}

template <typename T> __device__ void pool(const HeadsParams &p) {
  release_next();
  await_previous();
  const int width = p.kv_heads * p.dim, i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= 2 * width || p.state->stopped) return;
  const int position = p.state->position, n = position / p.block, c = i % width;
  const T *ring = (const T *)(i < width ? p.ring_k : p.ring_v) + (int64_t)(position % p.capacity) * width;
  float sum = p.running[i] + (position >= p.sinks ? to_float(ring[c]) : 0.f);
  if ((position + 1) % p.block == 0) {
    const int count = max(1, position + 1 - max(n * p.block, min(p.sinks, position + 1)));
    T *means = (T *)(i < width ? p.mean_k : p.mean_v);
    if (means && n < p.readable) means[(int64_t)(n % p.mean_rows) * width + c] = from_float<T>(sum / count);
    sum = 0.f;
  }
  p.running[i] = sum;
}

extern "C" __global__ void decode_add_norm(float *x, const float *y, const float *w, int n, float eps) {
  release_next();
  await_previous();
  float squares = 0.f;
  for (int i = threadIdx.x; i < n; i += blockDim.x) squares += y[i] * y[i];
  __shared__ float parts[8];
  squares = warp_sum(squares);
  if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = squares;
  __syncthreads();
  float sum = 0.f;
  for (int i = 0; i < 8; i++) sum += parts[i];
  const float factor = 1.f / sqrtf(sum / n + eps);
  for (int i = threadIdx.x; i < n; i += blockDim.x) x[i] += y[i] * factor * w[i];
}

extern "C" __global__ void decode_finish(DecodeState *state, uint32_t *tokens, int capacity, const uint32_t *stops, int count) {
  release_next();
  await_previous();
  const uint32_t token = 0xffffffffu - (uint32_t)state->best;
  state->best = 0;
  if (state->stopped == 1) return;
  tokens[state->step % capacity] = state->stopped ? 0xffffffffu : token;
  state->token = token;
  state->step++;
  state->position++;
  for (int i = 0; i < count; i++)
    if (stops[i] == token) state->stopped = 1;
}

#define MATVEC(NAME, T, MODE, ROWS) \
  extern "C" __global__ void __launch_bounds__(256) NAME(const __grid_constant__ MatvecParams p) { matvec<T, MODE, ROWS>(p); }
#define INSTANCE(NAME, T)                                                                                                       \
  extern "C" __global__ void decode_embed_##NAME(const T *table, float scale, float *x, int n, const float *frequencies,        \
                                                 const float *amplitudes, float *cos, float *sin, int tables, int half,          \
                                                 const DecodeState *state) {                                                    \
    embed<T>(table, scale, x, n, frequencies, amplitudes, cos, sin, tables, half, state);                                       \
  }                                                                                                                             \
  extern "C" __global__ void decode_heads_##NAME(const __grid_constant__ HeadsParams p) { heads<T>(p); }                        \
  extern "C" __global__ void decode_pool_##NAME(const __grid_constant__ HeadsParams p) { pool<T>(p); }                          \
  MATVEC(decode_store_##NAME##_1, T, STORE, 1)                                                                                  \
  MATVEC(decode_store_##NAME##_4, T, STORE, 4)                                                                                  \
  MATVEC(decode_add_##NAME##_1, T, ADD, 1)                                                                                      \
  MATVEC(decode_add_##NAME##_4, T, ADD, 4)                                                                                      \
  MATVEC(decode_gated_##NAME##_2, T, GATED, 2)                                                                                  \
  MATVEC(decode_gated_##NAME##_4, T, GATED, 4)                                                                                  \
  MATVEC(decode_largest_##NAME##_4, T, LARGEST, 4)
INSTANCE(bf16, __nv_bfloat16)
INSTANCE(f16, __half)
