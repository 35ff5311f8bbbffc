// The rest of recall_fetch.cu: the estimate of the tokens that are not chosen, by value codes or by means of blocks.
#pragma once
#include "recall.cuh"

constexpr int REST_WORDS = 4;                         // sub-vectors of a thread block
constexpr int REST_TABLE = REST_WORDS * 256 * 128;    // bytes: 32 of a codeword, four times
constexpr int REST_PART = 64 * RECALL_HEADS;          // f32 of a warp's sums

__device__ inline int part_row(const RecallParams &p) { return (p.dim + 3) / 4 * 4 + 4; }
// Parts of a KV head: those of fetchers, of slices of the rest, and their sum. A row ends with m, l and, of the rest, the
// head's largest score.
__device__ inline float *part_of(const RecallParams &p, int g, int part) {
  return p.parts + ((int64_t)g * (p.fetchers + p.rest_slices + 1) + part) * RECALL_HEADS * part_row(p);
}
__device__ inline int *counters_of(const RecallParams &p, int g) { return p.counters + RECALL_COUNTERS * g; }

// One thread block's slice of the tokens that are not chosen.
template <int THREADS> struct Rest {
  static constexpr int WARPS = THREADS / WARP;
  const RecallParams &p;
  const Far far;
  char *table;
  float *sums;
  const int lane, warp, quad, row, g, group, slice, subset;

  __device__ Rest(const RecallParams &params, char *shared, int kv, int slice_, int subset_)
      : p(params), far(params), table(shared), sums((float *)(shared + REST_TABLE)), lane(threadIdx.x % WARP), warp(threadIdx.x / WARP),
        quad(lane % 4), row(lane / 4), g(kv), group(p.heads / p.kv_heads), slice(slice_), subset(subset_) {}

  // Reads the codebook alone.
  static __device__ void build(const RecallParams &p, char *table, int g, int subset) {
    const int subs = (p.dim + RECALL_SUB - 1) / RECALL_SUB, words = min(REST_WORDS, subs - subset * REST_WORDS);
    const uint4 *book = (const uint4 *)(p.read_codebook + ((int64_t)g * subs + subset * REST_WORDS) * 256 * RECALL_SUB);
    for (int i = threadIdx.x; i < REST_WORDS * 256; i += THREADS) {
      const bool any = i < words * 256;
      const uint4 lo = any ? book[2 * i] : make_uint4(0, 0, 0, 0), hi = any ? book[2 * i + 1] : make_uint4(0, 0, 0, 0);
      // Channels c and c + 8 side by side.
      const uint4 a = make_uint4(__byte_perm(lo.x, hi.x, 0x5410), __byte_perm(lo.x, hi.x, 0x7632), __byte_perm(lo.y, hi.y, 0x5410),
                                 __byte_perm(lo.y, hi.y, 0x7632));
      const uint4 b = make_uint4(__byte_perm(lo.z, hi.z, 0x5410), __byte_perm(lo.z, hi.z, 0x7632), __byte_perm(lo.w, hi.w, 0x5410),
                                 __byte_perm(lo.w, hi.w, 0x7632));
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const int chunk = (j + threadIdx.x) % 8;  // a warp's stores in different banks
        *(uint4 *)(table + i / 512 * 65536 + i % 256 * 256 + i / 256 % 2 * 128 + chunk * 16) = chunk % 2 ? b : a;
      }
    }
  }

  // log2 of what weights are relative to, for head h.
  __device__ float base(int h) const { return p.mass[g * group + h] + fmaxf(p.lowest[g], -126.f); }

  // A token's bytes of this subset's sub-vectors.
  __device__ uint32_t code_of(int token) const {
    const int subs = (p.dim + RECALL_SUB - 1) / RECALL_SUB;
    const uint8_t *from = p.value_codes + ((int64_t)g * p.ctx + token) * subs + subset * REST_WORDS;
    if (subs % 4 == 0) return __ldcs((const uint32_t *)from);
    uint32_t code = 0;
    for (int b = 0; b < min(REST_WORDS, subs - subset * REST_WORDS); b++) code |= (uint32_t)from[b] << (8 * b);
    return code;
  }

  // Of 32 tokens those that do not count: chosen, sinks, near.
  __device__ uint32_t excluded(const uint32_t *bitmap, int unit) const {
    uint32_t out = bitmap[unit];
    if (unit * WARP < far.begin) out |= far.begin - unit * WARP >= WARP ? ~0u : (1u << (far.begin - unit * WARP)) - 1;
    if (far.end - unit * WARP < WARP) out |= ~0u << (far.end - unit * WARP);
    return out;
  }

  // Weights of this lane's eight tokens of 32, whose scores are `x`, for its head.
  __device__ void weigh(uint4 x, uint32_t out, float against, float cap, __half2 &most, float &sum, float (&weight)[8]) const {
    uint32_t scored[4] = {x.x, x.y, x.z, x.w};
    if (out) {
      const uint32_t mine = out >> (quad * 8);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        if (mine >> (2 * i) & 1) scored[i] = (scored[i] & 0xffff0000u) | 0xfc00u;
        if (mine >> (2 * i + 1) & 1) scored[i] = (scored[i] & 0xffffu) | 0xfc000000u;
      }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      most = __hmax2(most, *(__half2 *)&scored[i]);
      const float2 s = unpack<__half>(scored[i]);
      weight[2 * i] = exp2f(fminf(s.x * LOG2E, cap) - against);
      weight[2 * i + 1] = exp2f(fminf(s.y * LOG2E, cap) - against);
      sum += weight[2 * i] + weight[2 * i + 1];
    }
  }

  // Sums over the slice with scores capped at `cap`, weights relative to `against` (both base 2, of the head of `row`); returns the
  // head's largest score and writes the part.
  __device__ float codes(float against, float cap, float *to) const {
    const int units = (far.end + WARP - 1) / WARP, each = (units + p.rest_slices - 1) / p.rest_slices;
    const int until = min(units, (slice + 1) * each);
    const uint32_t *bitmap = p.bitmap + (int64_t)g * (p.ctx / WARP);
    const __half *scores = p.scores + (int64_t)(g * group + min(row, group - 1)) * p.ctx + quad * 8;
    float acc[REST_WORDS][4] = {}, sum = 0.f;
    __half2 most = __half2half2(__ushort_as_half(0xfc00));
    const uint32_t own = quad * 32 + row * 4;
    // One unit ahead. A lane loads the code of one token; the four lanes that decode it together ask for it by shuffle.
    uint4 next_x = make_uint4(0, 0, 0, 0);
    uint32_t next_code = 0, next_out = 0;
    auto load = [&](int unit) {
      if (unit >= until) return;
      next_x = load16_written(scores + unit * WARP);
      next_code = code_of(unit * WARP + quad * 8 + row);
      next_out = excluded(bitmap, unit);
    };
    load(slice * each + warp);
    for (int unit = slice * each + warp; unit < until; unit += WARPS) {
      const uint4 x = next_x;
      const uint32_t code = next_code, out = next_out;
      load(unit + WARPS);
      float weight[8];
      weigh(x, out, against, cap, most, sum, weight);
      uint32_t b[4];
#pragma unroll
      for (int i = 0; i < 4; i++) b[i] = pack<__half>(weight[2 * i], weight[2 * i + 1]);
#pragma unroll
      for (int s = 0; s < 2; s++) {
        uint32_t c[4];
#pragma unroll
        for (int i = 0; i < 4; i++) c[i] = __shfl_sync(~0u, code, (4 * s + i) * 4 + quad);
#pragma unroll
        for (int m = 0; m < REST_WORDS; m++) {
          uint32_t v[4];
#pragma unroll
          for (int i = 0; i < 4; i++)  // the byte becomes the second of the address, whose first is the lane's place
            v[i] = *(const uint32_t *)(table + m / 2 * 65536 + m % 2 * 128 + __byte_perm(c[i], own, 0x6604 | m << 4));
          const uint32_t a[4] = {__byte_perm(v[0], v[1], 0x5410), __byte_perm(v[0], v[1], 0x7632), __byte_perm(v[2], v[3], 0x5410),
                                 __byte_perm(v[2], v[3], 0x7632)};
          mma<__half>(acc[m], a, b[2 * s], b[2 * s + 1]);
        }
      }
    }
    // [warp][channel][head]
    float *part = sums + warp * REST_PART;
#pragma unroll
    for (int m = 0; m < REST_WORDS; m++)
#pragma unroll
      for (int c = 0; c < 4; c++) part[(m * 16 + row + c / 2 * 8) * RECALL_HEADS + quad * 2 + c % 2] = acc[m][c];
    __shared__ float total[WARPS][RECALL_HEADS], top[WARPS][RECALL_HEADS];
    float largest = fmaxf(__low2float(most), __high2float(most)) * LOG2E;
    for (int d = 1; d < 4; d *= 2) {
      sum += __shfl_xor_sync(~0u, sum, d);
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, d));
    }
    if (quad == 0) total[warp][row] = sum, top[warp][row] = largest;
    __syncthreads();
    const int channels = min(64, p.dim - subset * 64);
    for (int i = threadIdx.x; i < group * channels; i += THREADS) {
      const int h = i / channels, c = i % channels;
      float all = 0.f;
      for (int w = 0; w < WARPS; w++) all += sums[w * REST_PART + c * RECALL_HEADS + h];
      to[h * part_row(p) + subset * 64 + c] = all;
    }
    largest = -INFINITY;
    float all = 0.f;
    for (int w = 0; w < WARPS; w++) largest = fmaxf(largest, top[w][row]), all += total[w][row];
    if (subset == 0 && warp == 0 && quad == 0 && row < group) put(to, against, all, largest);
    __syncthreads();
    return largest;
  }

  // What the part of the head of `row` is relative to, the sum of its weights and its largest score.
  __device__ void put(float *to, float against, float all, float largest) const {
    *(float4 *)(to + row * part_row(p) + part_row(p) - 4) = make_float4(against, all, largest, 0.f);
  }

  // The same with the means of blocks. Shared memory: [heads][64 blocks] weights, then [heads][D] sums.
  __device__ float means(float against, float cap, float *to) const {
    constexpr int AT_A_TIME = 64;
    float *weights = (float *)table, *out = weights + RECALL_HEADS * AT_A_TIME;
    __shared__ float base_of[RECALL_HEADS], cap_of[RECALL_HEADS], total[WARPS][RECALL_HEADS], top[WARPS][RECALL_HEADS];
    if (warp == 0 && quad == 0) base_of[row] = against, cap_of[row] = cap;
    if (threadIdx.x < WARPS * RECALL_HEADS) total[0][threadIdx.x] = 0.f, top[0][threadIdx.x] = -INFINITY;
    for (int i = threadIdx.x; i < RECALL_HEADS * p.dim; i += THREADS) out[i] = 0.f;
    __syncthreads();
    const int all = (far.end + p.block - 1) / p.block, each = (all + p.rest_slices - 1) / p.rest_slices;
    const int until = min(all, (slice + 1) * each);
    const uint32_t *bitmap = p.bitmap + (int64_t)g * (p.ctx / WARP);
    const __half *scores = p.scores + (int64_t)(g * group + min(row, group - 1)) * p.ctx + quad * 8;
    for (int from = slice * each; from < until; from += AT_A_TIME) {
      const int here = min(AT_A_TIME, until - from);
      for (int n = warp; n < here; n += WARPS) {
        if (p.block % WARP == 0) {  // whole words of the bitmap; lanes as in `codes`
          const int first = (from + n) * (p.block / WARP), last = min(first + p.block / WARP, (far.end + WARP - 1) / WARP);
          __half2 most = __half2half2(__ushort_as_half(0xfc00));
          float sum = 0.f, unused[8];
#pragma unroll 4
          for (int unit = first; unit < last; unit++)
            weigh(load16_written(scores + unit * WARP), excluded(bitmap, unit), against, cap, most, sum, unused);
          float largest = fmaxf(__low2float(most), __high2float(most)) * LOG2E;
          for (int d = 1; d < 4; d *= 2) {
            sum += __shfl_xor_sync(~0u, sum, d);
            largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, d));
          }
          if (quad == 0) {
            weights[row * AT_A_TIME + n] = sum;
            total[warp][row] += sum;
            top[warp][row] = fmaxf(top[warp][row], largest);
          }
        } else {
          const int start = max((from + n) * p.block, far.begin), stop = min((from + n + 1) * p.block, far.end);
          for (int h = 0; h < group; h++) {
            float sum = 0.f, largest = -INFINITY;
            for (int i = start + lane; i < stop; i += WARP) {
              if (bitmap[i / WARP] >> (i % WARP) & 1) continue;
              const float s = __half2float(p.scores[(int64_t)(g * group + h) * p.ctx + i]) * LOG2E;
              largest = fmaxf(largest, s);
              sum += exp2f(fminf(s, cap_of[h]) - base_of[h]);
            }
            sum = warp_sum(sum);
            for (int d = 16; d > 0; d >>= 1) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, d));
            if (lane == 0) {
              weights[h * AT_A_TIME + n] = sum;
              total[warp][h] += sum;
              top[warp][h] = fmaxf(top[warp][h], largest);
            }
          }
        }
      }
      __syncthreads();
      for (int i = threadIdx.x; i < group * p.dim; i += THREADS) {
        const int h = i / p.dim, c = i % p.dim;
        float x = 0.f;
#pragma unroll 8
        for (int n = 0; n < here; n++)
          x = fmaf(weights[h * AT_A_TIME + n], element(p.means, ((int64_t)g * p.blocks + from + n) * p.dim + c, p.means_type), x);
        out[i] += x;
      }
      __syncthreads();
    }
    for (int i = threadIdx.x; i < group * p.dim; i += THREADS) to[i / p.dim * part_row(p) + i % p.dim] = out[i];
    float most = -INFINITY, sum = 0.f;
    for (int w = 0; w < WARPS; w++) most = fmaxf(most, top[w][row]), sum += total[w][row];
    if (warp == 0 && quad == 0 && row < group) put(to, against, sum, most);
    __syncthreads();
    return most;
  }

  // The slice without a cap; returns the largest score of the head of `row`.
  __device__ float run(float *to) const {
    if (far.count() <= p.counts[g]) {
      for (int i = threadIdx.x; i < group * part_row(p); i += THREADS) {
        const int c = i % part_row(p);
        if (p.value_codes ? c / 64 == subset || (subset == 0 && c >= p.dim) : true) to[i] = c == part_row(p) - 2 ? -INFINITY : 0.f;
      }
      return -INFINITY;
    }
    return pass(row < group ? base(row) : INFINITY, INFINITY, to);
  }

  // The slice again where its largest score exceeds the cap, a head's largest exact logit. Relative to the cap where it is lower,
  // as the weights of a head are at most that now. All subsets of a slice see the same scores, and so decide alike. Returns whether.
  __device__ bool cap(float largest, float *to) const {
    float most = -INFINITY;
    for (int f = 0; f < p.fetchers; f++) most = fmaxf(most, __ldcg(part_of(p, g, f) + min(row, group - 1) * part_row(p) + part_row(p) - 4));
    if (!__syncthreads_or(row < group && largest > most)) return false;
    if (threadIdx.x == 0) atomicAdd(p.redone, 1);
    pass(fminf(row < group ? base(row) : INFINITY, most), most, to);
    return true;
  }

  __device__ float pass(float against, float cap, float *to) const {
    return p.value_codes ? codes(against, cap, to) : means(against, cap, to);
  }
};

// The sum of the slices of the rest, all relative to the same, as a part of its own.
template <int THREADS> __device__ void sum_slices(const RecallParams &p, int g) {
  const int row = part_row(p), quads = row / 4, group = p.heads / p.kv_heads;
  for (int i = threadIdx.x; i < group * quads; i += THREADS) {
    const float *from = part_of(p, g, p.fetchers) + 4 * i;
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    float most = -INFINITY, against = 0.f;
#pragma unroll 8
    for (int slice = 0; slice < p.rest_slices; slice++) {
      const float4 v = __ldcg((const float4 *)(from + (int64_t)slice * RECALL_HEADS * row));
      against = v.x;
      most = fmaxf(most, v.z);
      sum = make_float4(sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w);
    }
    if (i % quads == quads - 1) sum = make_float4(against, sum.y, most, 0.f);
    *(float4 *)(part_of(p, g, p.fetchers + p.rest_slices) + 4 * i) = sum;
  }
}
