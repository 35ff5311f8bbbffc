// One character of a stream through the character model; captured as a graph and replayed (src/char/gpu_stream.rs).
//
//   char_embed     x = embedding row of the symbol, in f32
//   char_project   y = W n, n = x r w (w given) or x; y is stored, added to the residual stream, or gated:
//                  silu(y_i) y_{i + rows}
//   char_attend    keeps the rotated key and the value, and attends to the chunk so far and to the partner chunk or its
//                  means; the last character of a chunk makes that chunk's
//
// Shapes  x f32 [n]; W bf16 [rows, n] (gated: [2 rows, n]); qkv f32 [3 H 64]; keys, values bf16 [chunks][H][B][64];
//         rope f32 [2, 2 B, 32]; n a multiple of 8, at most 4,096; B at most 128.
// Launch  char_embed: ceil(n / 256), 256 threads. char_project: ceil(rows / 8), 256 threads, a warp a row, 4 n bytes of
//         dynamic shared memory. char_attend: grid H, 256 threads.
//
// The position and the symbol are in device memory, so that the same launches serve every character.
#include "common.cuh"
using T = __nv_bfloat16;
constexpr int THREADS = 256, WARPS = THREADS / WARP, DIM = 64, HALF = DIM / 2, MOST_KEYS = 256;
enum { STORE = 0, ADD = 1, GATE = 2 };

struct CharState {
  int position;
  unsigned int symbol;
};

struct CharProject {
  const T *weight;
  const float *x, *norm;
  float *to;
  int rows, n, mode;
  float eps;
};
MIRRORED(CharProject, 48);
FIELD(CharProject, weight, 0); FIELD(CharProject, x, 8); FIELD(CharProject, norm, 16); FIELD(CharProject, to, 24);
FIELD(CharProject, rows, 32); FIELD(CharProject, n, 36); FIELD(CharProject, mode, 40); FIELD(CharProject, eps, 44);

struct CharAttend {
  const CharState *state;
  const float *qkv, *rope;
  T *keys, *values;
  float *out;
  T *mean_keys, *mean_values;  // [distance][H][64], where the partner is read as means; else null
  int heads, chunk, distance, chunks;
};
MIRRORED(CharAttend, 80);
FIELD(CharAttend, state, 0); FIELD(CharAttend, qkv, 8); FIELD(CharAttend, rope, 16); FIELD(CharAttend, keys, 24);
FIELD(CharAttend, values, 32); FIELD(CharAttend, out, 40); FIELD(CharAttend, mean_keys, 48); FIELD(CharAttend, mean_values, 56);
FIELD(CharAttend, heads, 64); FIELD(CharAttend, chunk, 68); FIELD(CharAttend, distance, 72); FIELD(CharAttend, chunks, 76);

extern "C" __global__ void __launch_bounds__(THREADS) char_embed(const CharState *state, const T *embedding, float *x, int n) {
  const int c = blockIdx.x * THREADS + threadIdx.x;
  if (c < n) x[c] = __bfloat162float(embedding[(int64_t)state->symbol * n + c]);
}

// The sum over a block's threads, for all of them; `room` [WARPS].
__device__ inline float block_sum(float x, float *room) {
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % WARP == 0) room[threadIdx.x / WARP] = x;
  __syncthreads();
  float all = 0.f;
  for (int i = 0; i < WARPS; i++) all += room[i];
  return all;
}

__device__ inline float dot_row(const T *row, const float *x, int n) {
  float sum = 0.f;
  for (int c = threadIdx.x % WARP * 8; c < n; c += WARP * 8) {
    const uint4 v = *(const uint4 *)(row + c);
    const uint32_t w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 two = unpack<T>(w[i]);
      sum = fmaf(two.x, x[c + 2 * i], fmaf(two.y, x[c + 2 * i + 1], sum));
    }
  }
  return warp_sum(sum);
}

extern "C" __global__ void __launch_bounds__(THREADS) char_project(const __grid_constant__ CharProject p) {
  extern __shared__ __align__(16) float x[];
  __shared__ float room[WARPS];
  float squares = 0.f;
  for (int c = threadIdx.x; c < p.n; c += THREADS) {
    const float v = p.x[c];
    x[c] = p.norm ? v * p.norm[c] : v;
    squares += v * v;
  }
  // The factor of the norm is common to all products of a row.
  const float r = p.norm ? rsqrtf(block_sum(squares, room) / p.n + p.eps) : 1.f;
  __syncthreads();
  const int row = blockIdx.x * WARPS + threadIdx.x / WARP;
  if (row >= p.rows) return;
  float y = r * dot_row(p.weight + (int64_t)row * p.n, x, p.n);
  if (p.mode == GATE) {
    const float up = r * dot_row(p.weight + (int64_t)(p.rows + row) * p.n, x, p.n);
    y = y / (1.f + __expf(-y)) * up;
  }
  if (threadIdx.x % WARP) return;
  if (p.mode == ADD) p.to[row] += y;
  else p.to[row] = y;
}

extern "C" __global__ void __launch_bounds__(THREADS) char_attend(const __grid_constant__ CharAttend p) {
  __shared__ __align__(16) float near[DIM], far[DIM], scores[MOST_KEYS], parts[THREADS / DIM][DIM], room[WARPS];
  const int head = blockIdx.x, b = p.chunk, c = p.state->position / b, at = p.state->position % b;
  const int width = p.heads * DIM;
  T *keys = p.keys + ((int64_t)(c % p.chunks) * p.heads + head) * b * DIM;
  T *values = p.values + ((int64_t)(c % p.chunks) * p.heads + head) * b * DIM;
  const bool partner = c >= p.distance, mean = p.mean_keys;
  // The partner's means and, once this chunk is complete, this chunk's.
  const int64_t means = ((int64_t)(c % p.distance) * p.heads + head) * DIM;
  const int64_t before = partner ? ((int64_t)((c - p.distance) % p.chunks) * p.heads + head) * b * DIM : 0;
  if (threadIdx.x < 3 * HALF) {  // the query for the chunk, the query for the partner, the key
    const int which = threadIdx.x / HALF, i = threadIdx.x % HALF, turn = which == 1 ? at + b : at;
    const float *from = p.qkv + (which == 2 ? width : 0) + head * DIM;
    const float low = from[i], high = from[i + HALF];
    const float cos = p.rope[turn * HALF + i], sin = p.rope[(2 * b + turn) * HALF + i];
    const float x = low * cos - high * sin, y = high * cos + low * sin;
    if (which == 2) keys[at * DIM + i] = __float2bfloat16_rn(x), keys[at * DIM + i + HALF] = __float2bfloat16_rn(y);
    else (which ? far : near)[i] = x, (which ? far : near)[i + HALF] = y;
  } else if (threadIdx.x < 3 * HALF + DIM) {
    const int i = threadIdx.x - 3 * HALF;
    values[at * DIM + i] = __float2bfloat16_rn(p.qkv[2 * width + head * DIM + i]);
  }
  __syncthreads();
  // Keys 0 .. b - 1 are the chunk's own, b .. 2 b - 1 the partner's.
  float most = -INFINITY;
  for (int key = threadIdx.x; key < 2 * b; key += THREADS) {
    float score = -INFINITY;
    if (key < b ? key <= at : partner && (!mean || key == b)) {
      const T *row = key < b ? keys + key * DIM : mean ? p.mean_keys + means : p.keys + before + (key - b) * DIM;
      const float *query = key < b ? near : far;
      score = 0.f;
#pragma unroll
      for (int d = 0; d < DIM; d += 8) {
        const uint4 v = *(const uint4 *)(row + d);
        const uint32_t w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float2 two = unpack<T>(w[i]);
          score = fmaf(two.x, query[d + 2 * i], fmaf(two.y, query[d + 2 * i + 1], score));
        }
      }
      score *= 0.125f;
    }
    scores[key] = score;
    most = fmaxf(most, score);
  }
  for (int d = 16; d > 0; d >>= 1) most = fmaxf(most, __shfl_xor_sync(~0u, most, d));
  if (threadIdx.x % WARP == 0) room[threadIdx.x / WARP] = most;
  __syncthreads();
  for (int i = 0; i < WARPS; i++) most = fmaxf(most, room[i]);
  float sum = 0.f;
  for (int key = threadIdx.x; key < 2 * b; key += THREADS) sum += scores[key] = __expf(scores[key] - most);
  sum = block_sum(sum, room);
  // Four groups of threads, a channel each, with every fourth key.
  const int channel = threadIdx.x % DIM, group = threadIdx.x / DIM;
  float o = 0.f;
  for (int key = group; key <= at; key += THREADS / DIM) o = fmaf(scores[key], __bfloat162float(values[key * DIM + channel]), o);
  const T *others = mean ? p.mean_values + means : p.values + before;
  for (int key = group; partner && key < (mean ? 1 : b); key += THREADS / DIM)
    o = fmaf(scores[b + key], __bfloat162float(others[key * DIM + channel]), o);
  parts[group][channel] = o;
  __syncthreads();
  if (threadIdx.x < DIM) {
    float all = 0.f;
    for (int i = 0; i < THREADS / DIM; i++) all += parts[i][threadIdx.x];
    p.out[head * DIM + threadIdx.x] = all / sum;
  }
  if (mean && at == b - 1 && threadIdx.x < 2 * DIM) {
    const T *from = threadIdx.x < DIM ? keys : values;
    float all = 0.f;
    for (int row = 0; row < b; row++) all += __bfloat162float(from[row * DIM + channel]);
    (threadIdx.x < DIM ? p.mean_keys : p.mean_values)[means + channel] = __float2bfloat16_rn(all / b);
  }
}

// Rotated keys, and values, of the last chunks of a text read at once: rows `from` on of `qkv`, bf16 [rows, 3 H 64].
// Launch  grid any, 256 threads.
extern "C" __global__ void __launch_bounds__(THREADS) char_fill(const __grid_constant__ CharAttend p, const T *qkv, int from, int rows) {
  const int width = p.heads * DIM, b = p.chunk;
  const int64_t count = (int64_t)(rows - from) * p.heads * HALF;
  for (int64_t n = blockIdx.x * (int64_t)THREADS + threadIdx.x; n < count; n += gridDim.x * (int64_t)THREADS) {
    const int i = n % HALF, head = n / HALF % p.heads, row = from + (int)(n / HALF / p.heads), at = row % b;
    const T *k = qkv + (int64_t)row * 3 * width + width + head * DIM, *v = k + width;
    const int64_t to = (((int64_t)(row / b % p.chunks) * p.heads + head) * b + at) * DIM;
    const float low = __bfloat162float(k[i]), high = __bfloat162float(k[i + HALF]);
    const float cos = p.rope[at * HALF + i], sin = p.rope[(2 * b + at) * HALF + i];
    p.keys[to + i] = __float2bfloat16_rn(low * cos - high * sin);
    p.keys[to + i + HALF] = __float2bfloat16_rn(high * cos + low * sin);
    p.values[to + i] = v[i], p.values[to + i + HALF] = v[i + HALF];
  }
}

// Means of chunks of a text read at once, from chunk `first` on; `qkv` as of char_fill.
// Launch  grid (chunks, H), 128 threads.
extern "C" __global__ void __launch_bounds__(2 * DIM) char_fill_means(const __grid_constant__ CharAttend p, const T *qkv, int first) {
  const int c = first + blockIdx.x, head = blockIdx.y, channel = threadIdx.x % DIM, i = channel % HALF;
  const int width = p.heads * DIM, b = p.chunk;
  const bool key = threadIdx.x < DIM;
  float all = 0.f;
  for (int at = 0; at < b; at++) {
    const T *from = qkv + ((int64_t)c * b + at) * 3 * width + (key ? width : 2 * width) + head * DIM;
    float x = __bfloat162float(from[channel]);
    if (key) {
      const float cos = p.rope[at * HALF + i], sin = p.rope[(2 * b + at) * HALF + i];
      const float other = __bfloat162float(from[channel < HALF ? channel + HALF : i]);
      x = __bfloat162float(__float2bfloat16_rn(channel < HALF ? x * cos - other * sin : x * cos + other * sin));
    }
    all += x;
  }
  const int64_t to = ((int64_t)(c % p.distance) * p.heads + head) * DIM + channel;
  (key ? p.mean_keys : p.mean_values)[to] = __float2bfloat16_rn(all / b);
}
