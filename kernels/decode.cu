// The steps of decoding one token, all but attention (attention_decode.cu): each a pass over some weights, in f32 from 16-bit
// weights; from quantised ones: quantised.cu.
//
// decode_embed    x = embedding[token] * scale; cos and sin of the position for every rotary table.
//                 Grid ceil(N / 256), 256 threads.
// decode_matvec   out = W v (+ bias), or out += W v (+ bias), or out = act(W0 v) * (W1 v), or the largest element of W v;
//                 v = x, or its RMS norm x / sqrt(mean(x^2) + eps) * w. Up to three matrices [rows, N] side by side.
//                 Grid so that each warp gets ROWS rows at a time, 256 threads, shared memory 4 N bytes. N a multiple of 8.
//                 Bound by the weights' bytes; the first of them are asked for before v is there.
// decode_add_norm x += norm(y) * w, for families that norm what they add. One block, 256 threads.
// decode_finish   notes the token and moves on. One thread.
#include "matvec.cuh"

template <typename T>
__device__ void embed(const T *table, float scale, float *x, int n, const float *frequencies, const float *amplitudes, float *cos, float *sin,
                      int tables, int half, const DecodeState *state) {
  release_next();
  await_previous();
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) x[i] = to_float(table[(int64_t)state->token * n + i]) * scale;
  rotary(i, frequencies, amplitudes, cos, sin, tables, half, state->position);
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
  const int chunks = p.columns / 8, total = all_rows<MODE>(p);
  uint4 w[ROWS][AHEAD];
  int first = warp * ROWS;
  auto fetch = [&](int c) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const uint8_t *from = row_of<MODE>(p, min(first + r, total - 1), chunks * 16);
#pragma unroll
      for (int a = 0; a < AHEAD; a++) {
        const int chunk = c + a * WARP + lane;
        w[r][a] = chunk < chunks ? load16_stream(from + chunk * 16) : make_uint4(0, 0, 0, 0);
      }
    }
  };
  if (first < total) fetch(0);
  stage(p, v, [](int i) { return i; });
  Outcome<MODE, ROWS> outcome;
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
    if (lane == 0) outcome.take(p, first, total, sums);
  }
  if (lane == 0) outcome.report(p);
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

#define INSTANCE(NAME, T)                                                                                                       \
  extern "C" __global__ void decode_embed_##NAME(const T *table, float scale, float *x, int n, const float *frequencies,        \
                                                 const float *amplitudes, float *cos, float *sin, int tables, int half,          \
                                                 const DecodeState *state) {                                                    \
    embed<T>(table, scale, x, n, frequencies, amplitudes, cos, sin, tables, half, state);                                       \
  }                                                                                                                             \
  MATVECS(NAME, T, __launch_bounds__(256))
INSTANCE(bf16, __nv_bfloat16)
INSTANCE(f16, __half)
