// recall_text_keys, recall_text_values: what codes decode to, refitted to a prompt's chunk that recall_encode has coded.
//
//   mean_c, scale_c = the line of least squares of the keys of channel c over the levels of their codes;
//   codeword w      = the mean of the values that have it.
//
// src/recall/text.rs has the definition. Sums over earlier chunks are in `lines`; a codeword's mean stands for its earlier
// values, with their number in `counts`. Every sum has a fixed order.
//
// Shapes  k, v [T, G, D] in bf16, f16 or f32, positions start .. start + T; codes as in recall.cuh. D up to 256.
// Launch  recall_text_keys: grid G, 1024 threads. recall_text_values: grid (ceil(D / 16), G), 256 threads.
//
// Values: a thread owns a codeword. It lists those of TEXT_TILE tokens that have it and then reads their values: with a
// list, loads of several tokens are in flight at once.
#include "recall.cuh"

constexpr int TEXT_KEY_THREADS = 1024, TEXT_TILE = 4096;
constexpr double TEXT_PRIOR = 16.0;  // tokens that the calibration's line counts as

struct TextParams {
  const void *k, *v;
  const uint8_t *key_codes, *value_codes;
  const float *mean, *scale;        // of the calibration, [G, D]
  float *read_mean, *read_scale;    // what codes decode with
  const RecallField *fields;
  const int *first;
  const float *levels;
  double *lines;                    // [G, 5, D]: number, Σ level, Σ key, Σ level key, Σ level²
  __half *read_codebook;            // [G, ceil(D / 16), 256, 16]
  uint32_t *counts;                 // [G, ceil(D / 16), 256]: values of each codeword so far
  int tokens, start, ctx, kv_heads, dim, bytes, type, sinks;
};
MIRRORED(TextParams, 144);
FIELD(TextParams, k, 0); FIELD(TextParams, v, 8); FIELD(TextParams, key_codes, 16); FIELD(TextParams, value_codes, 24);
FIELD(TextParams, mean, 32); FIELD(TextParams, scale, 40); FIELD(TextParams, read_mean, 48); FIELD(TextParams, read_scale, 56);
FIELD(TextParams, fields, 64); FIELD(TextParams, first, 72); FIELD(TextParams, levels, 80); FIELD(TextParams, lines, 88);
FIELD(TextParams, read_codebook, 96); FIELD(TextParams, counts, 104); FIELD(TextParams, tokens, 112);
FIELD(TextParams, start, 116); FIELD(TextParams, ctx, 120); FIELD(TextParams, kv_heads, 124); FIELD(TextParams, dim, 128);
FIELD(TextParams, bytes, 132); FIELD(TextParams, type, 136); FIELD(TextParams, sinks, 140);

extern "C" __global__ void __launch_bounds__(TEXT_KEY_THREADS) recall_text_keys(const __grid_constant__ TextParams p) {
  __shared__ double sums[TEXT_KEY_THREADS];
  __shared__ int place[256];  // of a channel: byte << 8 | shift << 4 | bits
  const int g = blockIdx.x, *first = p.first + g * (p.bytes + 1);
  const int teams = TEXT_KEY_THREADS / p.dim, team = threadIdx.x / p.dim, c = threadIdx.x % p.dim;
  if (threadIdx.x < 256) place[threadIdx.x] = 0;
  __syncthreads();
  for (int b = threadIdx.x; b < p.bytes; b += TEXT_KEY_THREADS)
    for (int i = first[b]; i < first[b + 1]; i++) {
      const RecallField f = p.fields[g * p.dim + i];
      place[f.channel] = b << 8 | f.shift << 4 | f.bits;
    }
  __syncthreads();
  double own[5] = {};
  if (team < teams) {
    const int at = place[c] >> 8, shift = place[c] >> 4 & 15, bits = place[c] & 15;
    for (int t = max(p.sinks - p.start, 0) + team; t < p.tokens; t += teams) {
      const int code = p.key_codes[((int64_t)g * p.ctx + p.start + t) * p.bytes + at] >> shift & ((1 << bits) - 1);
      const double level = bits > 0 ? p.levels[(1 << bits) + code] : 0.f;
      const double key = element(p.k, ((int64_t)t * p.kv_heads + g) * p.dim + c, p.type);
      own[0] += 1.0, own[1] += level, own[2] += key, own[3] += level * key, own[4] += level * level;
    }
  }
  double all[5];
#pragma unroll
  for (int i = 0; i < 5; i++) {
    __syncthreads();
    sums[threadIdx.x] = own[i];
    __syncthreads();
    if (team == 0) {
      double *line = p.lines + ((int64_t)g * 5 + i) * p.dim + c;
      all[i] = *line;
      for (int other = 0; other < teams; other++) all[i] += sums[other * p.dim + c];
      *line = all[i];
    }
  }
  if (team > 0) return;
  const double count = all[0] + TEXT_PRIOR, square = all[4] + TEXT_PRIOR;
  const double key = all[2] + TEXT_PRIOR * p.mean[g * p.dim + c], product = all[3] + TEXT_PRIOR * p.scale[g * p.dim + c];
  const double determinant = count * square - all[1] * all[1];
  p.read_mean[g * p.dim + c] = (float)((key * square - product * all[1]) / determinant);
  p.read_scale[g * p.dim + c] = (float)((count * product - all[1] * key) / determinant);
}

extern "C" __global__ void __launch_bounds__(256) recall_text_values(const __grid_constant__ TextParams p) {
  __shared__ uint8_t codes[TEXT_TILE];
  __shared__ uint16_t list[TEXT_TILE];
  __shared__ int begin[256];
  const int m = blockIdx.x, g = blockIdx.y, subs = (p.dim + RECALL_SUB - 1) / RECALL_SUB, word = threadIdx.x;
  const int width = min(RECALL_SUB, p.dim - m * RECALL_SUB);
  float sum[RECALL_SUB] = {};
  int count = 0;
  for (int from = max(p.sinks - p.start, 0); from < p.tokens; from += TEXT_TILE) {
    const int here = min(TEXT_TILE, p.tokens - from);
    __syncthreads();
    for (int i = threadIdx.x; i < here; i += 256)
      codes[i] = p.value_codes[((int64_t)g * p.ctx + p.start + from + i) * subs + m];
    __syncthreads();
    int own = 0;
    for (int i = 0; i < here; i++) own += codes[i] == word;
    begin[word] = own;
    __syncthreads();
    int at = 0;
    for (int w = 0; w < word; w++) at += begin[w];
    const int last = at + own;
    int next = at;
    for (int i = 0; i < here; i++)
      if (codes[i] == word) list[next++] = (uint16_t)i;
    count += own;
    // A thread's own part of the list: no other reads it.
#pragma unroll 4
    for (int i = at; i < last; i++) {
      const int64_t value = ((int64_t)(from + list[i]) * p.kv_heads + g) * p.dim + m * RECALL_SUB;
#pragma unroll
      for (int c = 0; c < RECALL_SUB; c++)
        if (c < width) sum[c] += element(p.v, value + c, p.type);
    }
  }
  if (count == 0) return;
  const int64_t own = ((int64_t)g * subs + m) * 256 + word;
  const uint32_t before = p.counts[own];
  p.counts[own] = before + count;
  __half *to = p.read_codebook + own * RECALL_SUB;
  for (int c = 0; c < width; c++) {
    const float mean = before > 0 ? __half2float(to[c]) : 0.f;
    to[c] = __float2half(mean + (sum[c] - (float)count * mean) / (float)(before + count));
  }
}
