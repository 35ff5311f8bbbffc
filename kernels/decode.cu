// The steps of decoding one token, all but attention (attention_decode.cu): each a pass over some weights, in f32 from 16-bit
// weights.
//
// decode_embed    x = embedding[token] * scale; cos and sin of the position for every rotary table.
//                 Grid ceil(N / 256), 256 threads.
// decode_matvec   out = W v (+ bias), or out += W v (+ bias), or out = act(W0 v) * (W1 v), or the largest element of W v;
//                 v = x, or its RMS norm x / sqrt(mean(x^2) + eps) * w. Up to three matrices [rows, N] side by side.
//                 Grid so that each warp gets ROWS rows at a time, 256 threads, shared memory 4 N bytes. N a multiple of 8.
//                 Bound by the weights' bytes; the first of them are asked for before v is there.
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

// Mirrors `Matvec` in src/generate/graph/step.rs.
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
  // Inputs of up to HELD * 1024 elements stay in registers between the two passes of the norm, whose weights are asked for ahead
  // like the matrix.
  constexpr int HELD = 4;
  const int quads = n / 4;
  const bool held = p.norm && quads <= HELD * 256;
  const float4 *x4 = (const float4 *)p.x, *norm4 = (const float4 *)p.norm;
  float4 *v4 = (float4 *)v, weight[HELD], x[HELD];
  auto square = [](float4 a) { return a.x * a.x + a.y * a.y + a.z * a.z + a.w * a.w; };
  auto scaled = [](float4 a, float f, float4 w) { return make_float4(a.x * f * w.x, a.y * f * w.y, a.z * f * w.z, a.w * f * w.w); };
  if (held) {
#pragma unroll
    for (int j = 0; j < HELD; j++) {
      const int i = threadIdx.x + j * 256;
      weight[j] = i < quads ? norm4[i] : make_float4(0.f, 0.f, 0.f, 0.f);
    }
  }
  release_next();
  await_previous();
  float squares = 0.f;
  __shared__ float parts[8];
  auto factor = [&]() {
    squares = warp_sum(squares);
    if (lane == 0) parts[threadIdx.x / WARP] = squares;
    __syncthreads();
    float sum = 0.f;
    for (int i = 0; i < 8; i++) sum += parts[i];
    return 1.f / sqrtf(sum / n + p.eps);
  };
  if (held) {
#pragma unroll
    for (int j = 0; j < HELD; j++) {
      const int i = threadIdx.x + j * 256;
      x[j] = i < quads ? x4[i] : make_float4(0.f, 0.f, 0.f, 0.f);
      squares += square(x[j]);
    }
    const float f = factor();
#pragma unroll
    for (int j = 0; j < HELD; j++) {
      const int i = threadIdx.x + j * 256;
      if (i < quads) v4[i] = scaled(x[j], f, weight[j]);
    }
  } else {
#pragma unroll 8
    for (int i = threadIdx.x; i < quads; i += 256) {
      const float4 a = x4[i];
      v4[i] = a;
      squares += square(a);
    }
    if (p.norm) {
      const float f = factor();
      for (int i = threadIdx.x; i < quads; i += 256) v4[i] = scaled(v4[i], f, norm4[i]);
    }
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
  MATVEC(decode_store_##NAME##_1, T, STORE, 1)                                                                                  \
  MATVEC(decode_store_##NAME##_4, T, STORE, 4)                                                                                  \
  MATVEC(decode_add_##NAME##_1, T, ADD, 1)                                                                                      \
  MATVEC(decode_add_##NAME##_4, T, ADD, 4)                                                                                      \
  MATVEC(decode_gated_##NAME##_2, T, GATED, 2)                                                                                  \
  MATVEC(decode_gated_##NAME##_4, T, GATED, 4)                                                                                  \
  MATVEC(decode_largest_##NAME##_4, T, LARGEST, 4)
INSTANCE(bf16, __nv_bfloat16)
INSTANCE(f16, __half)
