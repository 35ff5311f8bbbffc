// recall_encode: key codes and value codes of a prefill chunk, and its rows in the host store.
// recall_means: means of the values of the blocks that the chunk completes, without sinks; rows before the chunk are read
//               from the host store.
//
//   `ScalarCode::encode` and `ValueCode::encode`, operation by operation: the nearest level of each channel, and of 256
//   codewords the nearest to each 16 channels, the first of equals.
//
// Shapes  k, v [T, G, D] in bf16, f16 or f32; codes and store as in recall.cuh, from position `start`; `value_codes` and
//         `store` may be null.
// Launch  recall_means: grid (blocks completed, G), 256 threads.
//         recall_encode: grid (ceil(T / 64), G), 256 threads, dynamic shared memory 64 (max(D, 16) + 1) 4 + 64 max(bytes, D / 16 up) + 18432 bytes.
//
// Bound by arithmetic: 256 distances of 16 channels for each sub-vector. Four threads share a token and take 64 codewords
// each, which they read at the same time.
#include "recall.cuh"

constexpr int ENCODE_THREADS = 256, ENCODE_TOKENS = 64;

struct EncodeParams {
  const void *k, *v;
  uint8_t *key_codes, *value_codes;
  const __half *codebook;
  const float *mean, *scale;
  const RecallField *fields;
  const int *first;
  const float *levels;
  void *store, *means;  // means: [G, blocks, D]
  int tokens, start, ctx, kv_heads, dim, bytes, type, rows;
  int block, blocks, sinks;
};
MIRRORED(EncodeParams, 144);
FIELD(EncodeParams, k, 0); FIELD(EncodeParams, v, 8); FIELD(EncodeParams, key_codes, 16); FIELD(EncodeParams, value_codes, 24);
FIELD(EncodeParams, codebook, 32); FIELD(EncodeParams, mean, 40); FIELD(EncodeParams, scale, 48); FIELD(EncodeParams, fields, 56);
FIELD(EncodeParams, first, 64); FIELD(EncodeParams, levels, 72); FIELD(EncodeParams, store, 80); FIELD(EncodeParams, means, 88);
FIELD(EncodeParams, tokens, 96); FIELD(EncodeParams, start, 100); FIELD(EncodeParams, ctx, 104); FIELD(EncodeParams, kv_heads, 108);
FIELD(EncodeParams, dim, 112); FIELD(EncodeParams, bytes, 116); FIELD(EncodeParams, type, 120); FIELD(EncodeParams, rows, 124);
FIELD(EncodeParams, block, 128); FIELD(EncodeParams, blocks, 132); FIELD(EncodeParams, sinks, 136);

// A thread block's tokens as rows of the store, key and value adjacent, in units of U.
template <typename U> __device__ inline void put_rows(const EncodeParams &p, int g, int first, int here, int row_bytes) {
  const int per = row_bytes / sizeof(U);
  for (int i = threadIdx.x; i < here * 2 * per; i += ENCODE_THREADS) {
    const int t = first + i / (2 * per), half = i / per % 2, u = i % per;
    const U x = ((const U *)(half ? p.v : p.k))[((int64_t)t * p.kv_heads + g) * per + u];
    ((U *)p.store)[(((int64_t)g * p.rows + p.start + t) * 2 + half) * per + u] = x;
  }
}

extern "C" __global__ void __launch_bounds__(ENCODE_THREADS) recall_encode(const __grid_constant__ EncodeParams p) {
  extern __shared__ __align__(16) char shared[];
  const int g = blockIdx.y, first = blockIdx.x * ENCODE_TOKENS, here = min(ENCODE_TOKENS, p.tokens - first);
  const int subs = (p.dim + RECALL_SUB - 1) / RECALL_SUB, row = max(p.dim, RECALL_SUB) + 1;
  float *word = (float *)shared;                                        // [256][16]
  float2 *best = (float2 *)(word + 256 * RECALL_SUB);                   // [4][64]: distance, word
  float *x = (float *)(best + 4 * ENCODE_TOKENS);                       // [64][row]
  uint8_t *codes = (uint8_t *)(x + ENCODE_TOKENS * row);                // [64][bytes of a code]
  auto stage = [&](const void *from) {
    for (int i = threadIdx.x; i < here * p.dim; i += ENCODE_THREADS) {
      const int t = i / p.dim, c = i % p.dim;
      x[t * row + c] = element(from, ((int64_t)(first + t) * p.kv_heads + g) * p.dim + c, p.type);
    }
    __syncthreads();
  };
  auto store = [&](uint8_t *to, int bytes) {
    __syncthreads();
    uint8_t *rows = to + ((int64_t)g * p.ctx + p.start + first) * bytes;
    for (int i = threadIdx.x; i < here * bytes; i += ENCODE_THREADS) rows[i] = codes[i];
    __syncthreads();
  };
  if (p.store) {
    const int row_bytes = p.dim * (p.type == 0 ? 4 : 2);
    if (row_bytes % 16 == 0) put_rows<uint4>(p, g, first, here, row_bytes);
    else if (row_bytes % 4 == 0) put_rows<uint32_t>(p, g, first, here, row_bytes);
    else put_rows<uint16_t>(p, g, first, here, row_bytes);
  }
  stage(p.k);
  const int *fields_of = p.first + g * (p.bytes + 1);
  for (int i = threadIdx.x; i < here * p.bytes; i += ENCODE_THREADS) {
    const int t = i / p.bytes, b = i % p.bytes;
    codes[i] = key_byte(x + t * row, p.mean + g * p.dim, p.scale + g * p.dim, p.fields + g * p.dim, fields_of[b], fields_of[b + 1], p.levels);
  }
  store(p.key_codes, p.bytes);
  if (!p.value_codes) return;
  stage(p.v);
  const int t = threadIdx.x % ENCODE_TOKENS, quarter = threadIdx.x / ENCODE_TOKENS;
  for (int m = 0; m < subs; m++) {
    const __half *book = p.codebook + ((int64_t)g * subs + m) * 256 * RECALL_SUB;
    for (int i = threadIdx.x; i < 256 * RECALL_SUB; i += ENCODE_THREADS) word[i] = __half2float(book[i]);
    __syncthreads();
    float own[RECALL_SUB];
#pragma unroll
    for (int c = 0; c < RECALL_SUB; c++) own[c] = t < here && m * RECALL_SUB + c < p.dim ? x[t * row + m * RECALL_SUB + c] : 0.f;
    float least = INFINITY;
    int nearest = quarter * 64;
    for (int w = quarter * 64; w < quarter * 64 + 64; w++) {
      const float4 *at = (const float4 *)(word + w * RECALL_SUB);
      float sum = 0.f;
#pragma unroll
      for (int c = 0; c < RECALL_SUB / 4; c++) {
        const float4 a = at[c];
        const float off[4] = {__fsub_rn(a.x, own[4 * c]), __fsub_rn(a.y, own[4 * c + 1]), __fsub_rn(a.z, own[4 * c + 2]), __fsub_rn(a.w, own[4 * c + 3])};
#pragma unroll
        for (int i = 0; i < 4; i++) sum = __fadd_rn(sum, __fmul_rn(off[i], off[i]));
      }
      if (sum < least) least = sum, nearest = w;
    }
    best[quarter * ENCODE_TOKENS + t] = make_float2(least, (float)nearest);
    __syncthreads();
    if (quarter == 0 && t < here) {
      float2 found = best[t];
      for (int i = 1; i < 4; i++) {
        const float2 other = best[i * ENCODE_TOKENS + t];
        if (other.x < found.x) found = other;
      }
      codes[t * subs + m] = (uint8_t)found.y;
    }
  }
  store(p.value_codes, subs);
}

extern "C" __global__ void __launch_bounds__(ENCODE_THREADS) recall_means(const __grid_constant__ EncodeParams p) {
  __shared__ float sums[ENCODE_THREADS];
  const int g = blockIdx.y, block = p.start / p.block + blockIdx.x, first = max(block * p.block, p.sinks);
  block_mean<ENCODE_THREADS>(p.dim, first, (block + 1) * p.block, sums, [&](int at, int c) {
    if (at >= p.start) return element(p.v, ((int64_t)(at - p.start) * p.kv_heads + g) * p.dim + c, p.type);
    return element(p.store, (((int64_t)g * p.rows + at) * 2 + 1) * p.dim + c, p.type);
  }, [&](int c, float mean) { put_element(p.means, ((int64_t)g * p.blocks + block) * p.dim + c, p.type, mean); });
}
