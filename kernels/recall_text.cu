// recall_text_keys, recall_text_values: what codes decode to, refitted to a prompt's chunk that recall_encode has coded.
//
//   mean_c, scale_c = the line of least squares of the keys of channel c over the levels of their codes;
//   codeword w      = the mean of the values that have it.
//
// src/recall/text.rs has the definition. Sums over earlier chunks are in `lines`; a codeword's mean stands for its earlier
// values, with their number in `counts`. Every sum has a fixed order.
//
// Shapes  k, v [T, G, D] in bf16, f16 or f32, positions start .. start + T; codes as in recall.cuh. D up to 256.
// Launch  recall_text_keys: grid (ceil(D / 8), G), 1024 threads. recall_text_values: grid (ceil(D / 16), G), 256 threads.
//
// Keys: a thread owns a channel of eight and every 128th token. Values: a thread owns a codeword. It lists those of TEXT_TILE
// tokens that have it, comparing four codes at a time, and then reads their values: with a list, loads of several tokens are
// in flight at once.
#include "recall.cuh"

constexpr int TEXT_KEY_THREADS = 1024, TEXT_CHANNELS = 8, TEXT_TEAMS = TEXT_KEY_THREADS / TEXT_CHANNELS, TEXT_TILE = 4096;
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
  __shared__ int place[TEXT_CHANNELS];  // of a channel: byte << 8 | shift << 4 | bits
  const int g = blockIdx.y, from = blockIdx.x * TEXT_CHANNELS, *first = p.first + g * (p.bytes + 1);
  const int team = threadIdx.x / TEXT_CHANNELS, own_channel = threadIdx.x % TEXT_CHANNELS, c = from + own_channel;
  if (threadIdx.x < TEXT_CHANNELS) place[threadIdx.x] = 0;
  __syncthreads();
  for (int b = threadIdx.x; b < p.bytes; b += TEXT_KEY_THREADS)
    for (int i = first[b]; i < first[b + 1]; i++) {
      const RecallField f = p.fields[g * p.dim + i];
      if (f.channel >= from && f.channel < from + TEXT_CHANNELS) place[f.channel - from] = b << 8 | f.shift << 4 | f.bits;
    }
  __syncthreads();
  double own[5] = {};
  if (c < p.dim) {
    const int at = place[own_channel] >> 8, shift = place[own_channel] >> 4 & 15, bits = place[own_channel] & 15;
#pragma unroll 4
    for (int t = max(p.sinks - p.start, 0) + team; t < p.tokens; t += TEXT_TEAMS) {
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
    for (int half = TEXT_KEY_THREADS / 2; half >= TEXT_CHANNELS; half /= 2) {
      __syncthreads();
      if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (team == 0 && c < p.dim) {
      double *line = p.lines + ((int64_t)g * 5 + i) * p.dim + c;
      *line = all[i] = *line + sums[threadIdx.x];
    }
  }
  if (team > 0 || c >= p.dim) return;
  const double count = all[0] + TEXT_PRIOR, square = all[4] + TEXT_PRIOR;
  const double key = all[2] + TEXT_PRIOR * p.mean[g * p.dim + c], product = all[3] + TEXT_PRIOR * p.scale[g * p.dim + c];
  const double determinant = count * square - all[1] * all[1];
  p.read_mean[g * p.dim + c] = (float)((key * square - product * all[1]) / determinant);
  p.read_scale[g * p.dim + c] = (float)((count * product - all[1] * key) / determinant);
}

extern "C" __global__ void __launch_bounds__(256) recall_text_values(const __grid_constant__ TextParams p) {
  __shared__ __align__(4) uint8_t codes[TEXT_TILE];
  __shared__ uint16_t list[TEXT_TILE];
  __shared__ int begin[256];
  const int m = blockIdx.x, g = blockIdx.y, subs = (p.dim + RECALL_SUB - 1) / RECALL_SUB, word = threadIdx.x;
  const int width = min(RECALL_SUB, p.dim - m * RECALL_SUB);
  const uint32_t words = word * 0x01010101u;
  const bool whole = width == RECALL_SUB && p.type != 0 && p.dim % 8 == 0;  // rows of 16-byte units
  float sum[RECALL_SUB] = {};
  int count = 0;
  for (int from = max(p.sinks - p.start, 0); from < p.tokens; from += TEXT_TILE) {
    const int here = min(TEXT_TILE, p.tokens - from);
    __syncthreads();
    for (int i = threadIdx.x; i < here; i += 256)
      codes[i] = p.value_codes[((int64_t)g * p.ctx + p.start + from + i) * subs + m];
    __syncthreads();
    // Bit 8 j: whether the code of token i + j is this thread's.
    auto equal = [&](int i) {
      const uint32_t four = __vcmpeq4(*(const uint32_t *)(codes + i), words) & 0x01010101u;
      return here - i >= 4 ? four : four & ((1u << 8 * (here - i)) - 1);
    };
    int own = 0;
#pragma unroll 4
    for (int i = 0; i < here; i += 4) own += __popc(equal(i));
    begin[word] = own;
    __syncthreads();
    int at = 0;
    for (int w = 0; w < word; w++) at += begin[w];
    const int last = at + own;
    int next = at;
    for (int i = 0; i < here && next < last; i += 4)
      for (uint32_t left = equal(i); left; left &= left - 1) list[next++] = (uint16_t)(i + (__ffs(left) - 1) / 8);
    count += own;
    // A thread's own part of the list: no other reads it.
    auto value_of = [&](int i) { return ((int64_t)(from + list[i]) * p.kv_heads + g) * p.dim + m * RECALL_SUB; };
    if (whole) {
#pragma unroll 4
      for (int i = at; i < last; i++) {
        const uint4 *value = (const uint4 *)((const uint16_t *)p.v + value_of(i)), a = value[0], b = value[1];
        const uint32_t pairs[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
        for (int c = 0; c < 8; c++) {
          const float2 two = p.type == 1 ? unpack<__nv_bfloat16>(pairs[c]) : unpack<__half>(pairs[c]);
          sum[2 * c] += two.x, sum[2 * c + 1] += two.y;
        }
      }
      continue;
    }
#pragma unroll 4
    for (int i = at; i < last; i++) {
      const int64_t value = value_of(i);
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
