// The kernels of a decode step but attention (attention_decode.cu): passes over 16-bit weights in f32 arithmetic.
// Quantised weights: quantised.cu.
//
// decode_embed    x = embedding[token] * scale; cos and sin of the position for every rotary table.
//                 Grid ceil(N / 256), 256 threads.
// decode_matvec   out = W v (+ bias), or out += W v (+ bias), or out = act(W0 v) * (W1 v), or the largest element of W v;
//                 v = x, or its RMS norm x / sqrt(mean(x^2) + eps) * w. Up to four matrices [rows, N] side by side.
//                 Grid so that each warp gets ROWS rows at a time, 256 threads, shared memory 4 N bytes. N a multiple of 8.
//                 Bound by the weights' bytes; the first loads are issued before v is ready.
// decode_add_norm x += norm(y) * w, for families with a norm after the mixer. One block, 256 threads.
// decode_gate     x *= sigmoid(gate), the gate of attention's output. Grid ceil(N / 256), 256 threads.
// decode_finish   stores the token and increments the position. One thread.
// decode_journal  saves what the next `count` steps overwrite in rings that are shorter than the context, in summary rows and in
//                 running sums or recurrent states, or puts it back (`restore`): a batch of steps that was cut off is undone and repeated in part.
//                 Grid (layers, any), 256 threads. At most JOURNAL steps; rows of a multiple of 16 bytes.
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

extern "C" __global__ void decode_gate(float *x, const float *gate, int n) {
  release_next();
  await_previous();
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) x[i] /= 1.f + expf(-gate[i]);
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

// Steps that a journal holds at most: `BATCH` in src/generate/graph/mod.rs.
constexpr int JOURNAL = 8;

// What a layer overwrites. Mirrors `Journal` in src/generate/graph/journal.rs.
struct Journal {
  uint8_t *ring_k, *ring_v;  // position x in row x % capacity
  uint8_t *mean_k, *mean_v;  // block n in row n % mean_rows; null where there are none
  float *running;            // [width], or null: running sums, or a recurrent state
  uint8_t *saved;            // 4 JOURNAL rows, then the sums
  int capacity, row;         // bytes of a row; capacity 0: no ring to save
  int mean_rows, block, readable, width;
};
MIRRORED(Journal, 72);
FIELD(Journal, ring_k, 0); FIELD(Journal, ring_v, 8); FIELD(Journal, mean_k, 16); FIELD(Journal, mean_v, 24);
FIELD(Journal, running, 32); FIELD(Journal, saved, 40); FIELD(Journal, capacity, 48); FIELD(Journal, row, 52);
FIELD(Journal, mean_rows, 56); FIELD(Journal, block, 60); FIELD(Journal, readable, 64); FIELD(Journal, width, 68);

__device__ inline void exchange(uint8_t *live, uint8_t *saved, int bytes, int restore) {
  uint4 *to = (uint4 *)(restore ? live : saved);
  const uint4 *from = (const uint4 *)(restore ? saved : live);
  for (int i = threadIdx.x; i < bytes / 16; i += blockDim.x) to[i] = from[i];
}

extern "C" __global__ void decode_journal(const Journal *layers, const DecodeState *state, int count, int restore) {
  const Journal j = layers[blockIdx.x];
  const int position = state->position;
  for (int i = 0; i < count && j.capacity > 0 && blockIdx.y == 0; i++) {
    const int64_t at = (int64_t)((position + i) % j.capacity) * j.row;
    exchange(j.ring_k + at, j.saved + (int64_t)(4 * i) * j.row, j.row, restore);
    exchange(j.ring_v + at, j.saved + (int64_t)(4 * i + 1) * j.row, j.row, restore);
  }
  for (int i = 0; i < count && j.mean_k && blockIdx.y == 0; i++) {
    const int n = (position + i) / j.block;
    if ((position + i + 1) % j.block != 0 || n >= j.readable) continue;
    const int64_t at = (int64_t)(n % j.mean_rows) * j.row;
    exchange(j.mean_k + at, j.saved + (int64_t)(4 * i + 2) * j.row, j.row, restore);
    exchange(j.mean_v + at, j.saved + (int64_t)(4 * i + 3) * j.row, j.row, restore);
  }
  float *sums = (float *)(j.saved + (int64_t)(4 * JOURNAL) * j.row);
  for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < j.width && j.running; i += gridDim.y * blockDim.x) {
    if (restore) j.running[i] = sums[i];
    else sums[i] = j.running[i];
  }
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
