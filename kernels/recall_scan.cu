// recall_scan: decoded scores of all far tokens, and the new token's codes and exact row.
//
//   scores[h, i] = factor q_h . k^_i = constant_h + sum_m table[m][code_im][h], for all heads h of the KV head at once;
//   slices[h, s] = the largest score of slice s, and the sum of exp relative to it (base 2).
//
// Shapes  HEADS (2, 4, 8) heads to a thread block; WORDS: key code of 4 WORDS bytes (2, 4, 8), 0: of any length.
//         _nibbles: no field crosses the middle of a byte.
// Launch  grid (slice_count + 1, G, ceil(group / HEADS)), 1024 threads, dynamic shared memory
//         ceil4(bytes) (256, _nibbles: 32) HEADS 2 + D HEADS 4 + 2624 bytes. One multiprocessor holds one block.
//
// A table holds one entry of HEADS halves for each value of a byte, so that one load of shared memory serves all heads:
// 2, 4 or 8 words wide, at random places: about three-fold bank conflicts. With _nibbles it has 16 entries of at most 8
// bytes, which lie in all banks once: no conflict, at twice the loads. A lane has its own token; the tensor cores add up
// its entries in f32: with B = (I I)', A B adds two pairs of halves to a lane's own two sums, and its other two rows the same.
// The last block of each KV head appends the new token instead.
#include "recall.cuh"

constexpr int SCAN_THREADS = 1024, SCAN_WARPS = SCAN_THREADS / WARP;

// One thread block: key code, value code and exact row of the token at `position`.
__device__ void append(const RecallParams &p, const Far &far, char *shared) {
  if (far.stopped || far.position >= p.ctx || far.position >= p.rows) return;
  const int g = blockIdx.y, subs = (p.dim + RECALL_SUB - 1) / RECALL_SUB;
  float *key = (float *)shared, *value = key + p.dim;
  unsigned long long *best = (unsigned long long *)(value + subs * RECALL_SUB + (subs * RECALL_SUB + p.dim) % 2);
  const int64_t from = ((int64_t)(far.position % p.own_rows) * p.kv_heads + g) * p.dim;
  const int64_t to = ((int64_t)g * p.rows + far.position) * 2 * p.dim;
  for (int i = threadIdx.x; i < p.dim; i += SCAN_THREADS) {
    key[i] = element(p.own_k, from + i, p.store_type);
    value[i] = element(p.own_v, from + i, p.store_type);
    if (p.store_type == 0) {
      ((float *)p.store)[to + i] = ((const float *)p.own_k)[from + i];
      ((float *)p.store)[to + p.dim + i] = ((const float *)p.own_v)[from + i];
    } else {
      ((uint16_t *)p.store)[to + i] = ((const uint16_t *)p.own_k)[from + i];
      ((uint16_t *)p.store)[to + p.dim + i] = ((const uint16_t *)p.own_v)[from + i];
    }
  }
  for (int i = p.dim + threadIdx.x; i < subs * RECALL_SUB; i += SCAN_THREADS) value[i] = 0.f;
  if (threadIdx.x < subs) best[threadIdx.x] = ~0ull;
  __syncthreads();
  if (threadIdx.x < p.bytes) {
    const int *first = p.first + g * (p.bytes + 1) + threadIdx.x;
    p.key_codes[((int64_t)g * p.ctx + far.position) * p.bytes + threadIdx.x] =
        key_byte(key, p.mean + g * p.dim, p.scale + g * p.dim, p.fields + g * p.dim, first[0], first[1], p.levels);
  }
  if (!p.value_codes) return;
  for (int i = threadIdx.x; i < subs * 256; i += SCAN_THREADS) {
    const int m = i / 256;
    const float off = word_distance(value + m * RECALL_SUB, p.codebook + ((int64_t)g * subs * 256 + i) * RECALL_SUB);
    // Distances are not negative, so that their bits are in their order; of equals the first word.
    unsigned long long rank = (unsigned long long)__float_as_uint(off) << 32 | (i % 256);
    for (int d = 16; d > 0; d >>= 1) {
      const unsigned long long other = __shfl_xor_sync(~0u, rank, d);
      rank = other < rank ? other : rank;
    }
    if (i % WARP == 0) atomicMin(best + m, rank);
  }
  __syncthreads();
  if (threadIdx.x < subs) p.value_codes[((int64_t)g * p.ctx + far.position) * subs + threadIdx.x] = (uint8_t)best[threadIdx.x];
}

template <int HEADS, int WORDS, bool NIBBLES> struct Scan {
  static constexpr int PLANES = NIBBLES && HEADS == 8 ? 2 : 1;  // tables of entries of at most 8 bytes
  static constexpr int ENTRY = HEADS / PLANES * 2, VALUES = NIBBLES ? 16 : 256;
  static constexpr int PLANE = VALUES * ENTRY, BYTE = (NIBBLES ? 2 : 1) * PLANES * PLANE;  // bytes of a plane, of a code's byte
  static constexpr int ACCS = HEADS == 8 ? 2 : 1, AHEAD = WORDS > 0 && WORDS <= 4;
  const RecallParams &p;
  char *tables;
  const int lane, warp, g, group, head0, heads;
  uint32_t one[2];

  __device__ Scan(const RecallParams &params, char *shared)
      : p(params), tables(shared), lane(threadIdx.x % WARP), warp(threadIdx.x / WARP), g(blockIdx.y), group(p.heads / p.kv_heads),
        head0(blockIdx.z * HEADS), heads(min(HEADS, group - head0)) {
    const int row = lane / 4, column = lane % 4 * 2;
    one[0] = one[1] = (column == row ? 0x3c00u : 0u) | (column + 1 == row ? 0x3c000000u : 0u);
  }

  __device__ int words() const { return WORDS > 0 ? WORDS : (p.bytes + 3) / 4; }

  // The tables of this block's heads, and the constants.
  __device__ void build(float *factors, float *levels, float *constants) {
    const float *q = p.q + (int64_t)(g * group + head0) * p.dim, *mean = p.mean + g * p.dim, *scale = p.scale + g * p.dim;
    const RecallField *fields = p.fields + g * p.dim;
    const int *first = p.first + g * (p.bytes + 1);
    for (int i = threadIdx.x; i < p.dim * HEADS; i += SCAN_THREADS) {
      const int c = i / HEADS, h = i % HEADS;
      factors[i] = h < heads ? q[h * p.dim + c] * p.factor * scale[c] : 0.f;
    }
    for (int i = threadIdx.x; i < RECALL_EDGES; i += SCAN_THREADS) levels[i] = p.levels[i];
    if (warp < HEADS) {
      float sum = 0.f;
      for (int c = lane; c < p.dim && warp < heads; c += WARP) sum += q[warp * p.dim + c] * mean[c];
      sum = warp_sum(sum);
      if (lane == 0) constants[warp] = sum * p.factor;
    }
    __syncthreads();
    const int values = words() * 4 * (NIBBLES ? 32 : 256);
    for (int i = threadIdx.x; i < values; i += SCAN_THREADS) {
      const int byte = i / (NIBBLES ? 32 : 256), part = NIBBLES ? i / 16 % 2 : 0, value = i % VALUES;
      float sums[HEADS] = {};
      const int until = byte < p.bytes ? first[byte + 1] : 0;
      for (int f = byte < p.bytes ? first[byte] : 0; f < until; f++) {
        const RecallField field = fields[f];
        if (NIBBLES && field.shift / 4 != part) continue;
        const int shift = NIBBLES ? field.shift % 4 : field.shift;
        const float level = levels[(1 << field.bits) + (value >> shift & ((1 << field.bits) - 1))];
#pragma unroll
        for (int h = 0; h < HEADS; h++) sums[h] = fmaf(factors[field.channel * HEADS + h], level, sums[h]);
      }
#pragma unroll
      for (int h = 0; h < HEADS; h += 2) {
        const int plane = h * 2 / ENTRY, at = h * 2 % ENTRY;
        const float lo = fminf(fmaxf(sums[h], -65504.f), 65504.f), hi = fminf(fmaxf(sums[h + 1], -65504.f), 65504.f);
        *(uint32_t *)(tables + byte * BYTE + (part * PLANES + plane) * PLANE + value * ENTRY + at) = pack<__half>(lo, hi);
      }
    }
    __syncthreads();
  }

  __device__ void add(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3) const {
    const uint32_t a[4] = {a0, a1, a2, a3};
    mma<__half>(c, a, one[0], one[1]);
  }

  // Adds the entries of four bytes of a code; `at` is the first one's table.
  __device__ void look_up(float (&c)[ACCS][4], uint32_t word, const char *at) const {
    constexpr int SHIFT = ENTRY == 4 ? 2 : ENTRY == 8 ? 3 : 4;
    if constexpr (NIBBLES) {
      // The offsets of four nibbles, one to a byte.
      const uint32_t mask = 0x0f0f0f0fu << SHIFT, offsets[2] = {word << SHIFT & mask, (SHIFT > 3 ? word << (SHIFT - 4) : word >> (4 - SHIFT)) & mask};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const uint32_t lo = __byte_perm(offsets[0], 0, 0x4440 + i), hi = __byte_perm(offsets[1], 0, 0x4440 + i);
        const char *from = at + i * BYTE;
        if constexpr (ENTRY == 4) {
          if (i % 2 == 1) continue;
          const uint32_t lo2 = __byte_perm(offsets[0], 0, 0x4441 + i), hi2 = __byte_perm(offsets[1], 0, 0x4441 + i);
          add(c[0], *(const uint32_t *)(from + lo), *(const uint32_t *)(from + PLANE + hi), *(const uint32_t *)(from + BYTE + lo2),
              *(const uint32_t *)(from + BYTE + PLANE + hi2));
        } else {
#pragma unroll
          for (int plane = 0; plane < PLANES; plane++) {
            const uint2 a = *(const uint2 *)(from + plane * PLANE + lo), b = *(const uint2 *)(from + (PLANES + plane) * PLANE + hi);
            add(c[plane], a.x, a.y, b.x, b.y);
          }
        }
      }
    } else {
      uint32_t offset[4];
#pragma unroll
      for (int i = 0; i < 4; i++) offset[i] = __byte_perm(word, 0, 0x4440 + i) << SHIFT;
      if constexpr (HEADS == 2) {
        add(c[0], *(const uint32_t *)(at + offset[0]), *(const uint32_t *)(at + BYTE + offset[1]),
            *(const uint32_t *)(at + 2 * BYTE + offset[2]), *(const uint32_t *)(at + 3 * BYTE + offset[3]));
      } else {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          const char *one_at = at + i * BYTE + offset[i], *two_at = at + (i + 1) * BYTE + offset[i + 1];
          if constexpr (HEADS == 4) {
            const uint2 a = *(const uint2 *)one_at, b = *(const uint2 *)two_at;
            add(c[0], a.x, a.y, b.x, b.y);
          } else {
            const uint4 a = *(const uint4 *)one_at, b = *(const uint4 *)two_at;
            add(c[0], a.x, a.y, b.x, b.y);
            add(c[1], a.z, a.w, b.z, b.w);
          }
        }
      }
    }
  }

  // The words of a token's code.
  template <int N> __device__ void load(uint32_t (&w)[N], const uint8_t *from, bool valid) const {
    if constexpr (N == 2) {
      const uint2 x = valid ? *(const uint2 *)from : make_uint2(0, 0);
      w[0] = x.x, w[1] = x.y;
    } else {
#pragma unroll
      for (int i = 0; i < N; i += 4) {
        const uint4 x = valid ? load16_written(from + i * 4) : make_uint4(0, 0, 0, 0);
        w[i] = x.x, w[i + 1] = x.y, w[i + 2] = x.z, w[i + 3] = x.w;
      }
    }
  }

  // One word of a code of any length.
  __device__ uint32_t word_of(const uint8_t *from, int i, bool valid) const {
    uint32_t word = 0;
    for (int b = 0; b < 4; b++)
      if (valid && i * 4 + b < p.bytes) word |= (uint32_t)from[i * 4 + b] << (8 * b);
    return word;
  }

  __device__ void run(float *rest) {
    const Far far(p);
    float *levels = rest, *factors = levels + RECALL_EDGES, *constants = factors + p.dim * HEADS;
    float2 *per_warp = (float2 *)(constants + HEADS);
    const int tiles = (far.end + 63) / 64, each = (tiles + p.slice_count - 1) / p.slice_count;
    const int from = blockIdx.x * each, to = min(from + each, tiles);
    float2 *slices = p.slices + (int64_t)(g * group + head0) * p.slice_count + blockIdx.x;
    if (from >= to || far.count() == 0) {
      if (threadIdx.x < heads) slices[threadIdx.x * p.slice_count] = make_float2(-1e30f, 0.f);
      return;
    }
    build(factors, levels, constants);
    float most[HEADS], sum[HEADS], constant[HEADS];
#pragma unroll
    for (int h = 0; h < HEADS; h++) most[h] = -1e30f, sum[h] = 0.f, constant[h] = constants[h];
    const uint8_t *codes = p.key_codes + (int64_t)g * p.ctx * p.bytes;
    __half *scores = p.scores + (int64_t)(g * group + head0) * p.ctx;
    constexpr int N = WORDS > 0 ? WORDS : 4;
    uint32_t ahead[2][N];
    auto fetch = [&](int tile) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int token = tile * 64 + lane * 2 + i;
        load(ahead[i], codes + (int64_t)token * p.bytes, tile < to && token < far.end);
      }
    };
    if constexpr (AHEAD) fetch(from + warp);
    for (int tile = from + warp; tile < to; tile += SCAN_WARPS) {
      const int token = tile * 64 + lane * 2;
      float c[2][ACCS][4] = {};
      if constexpr (WORDS > 0) {
        uint32_t word[2][N];
        if constexpr (!AHEAD) fetch(tile);
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
          for (int w = 0; w < N; w++) word[i][w] = ahead[i][w];
        if constexpr (AHEAD) fetch(tile + SCAN_WARPS);
#pragma unroll
        for (int w = 0; w < N; w++)
#pragma unroll
          for (int i = 0; i < 2; i++) look_up(c[i], word[i][w], tables + w * 4 * BYTE);
      } else {
        for (int w = 0; w < words(); w++)
          for (int i = 0; i < 2; i++)
            look_up(c[i], word_of(codes + (int64_t)(token + i) * p.bytes, w, token + i < far.end), tables + w * 4 * BYTE);
      }
      const bool valid[2] = {token >= far.begin && token < far.end, token + 1 >= far.begin && token + 1 < far.end};
#pragma unroll
      for (int h = 0; h < HEADS; h++) {
        float s[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
          s[i] = HEADS == 2 ? c[i][0][h % 2] + c[i][0][h % 2 + 2] : c[i][h / 4][h % 4];
          s[i] = fminf(fmaxf(s[i] + constant[h], -65504.f), 65504.f);
        }
        const __half2 both = __floats2half2_rn(s[0], s[1]);
        if (h < heads) *(__half2 *)(scores + (int64_t)h * p.ctx + token) = both;
        const float a = valid[0] ? __low2float(both) * LOG2E : -INFINITY, b = valid[1] ? __high2float(both) * LOG2E : -INFINITY;
        const float top = fmaxf(most[h], fmaxf(a, b));
        sum[h] = sum[h] * exp2f(most[h] - top) + exp2f(a - top) + exp2f(b - top);
        most[h] = top;
      }
    }
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
      float top = most[h];
      for (int d = 16; d > 0; d >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
      const float all = warp_sum(sum[h] * exp2f(most[h] - top));
      if (lane == 0) per_warp[h * SCAN_WARPS + warp] = make_float2(top, all);
    }
    __syncthreads();
    if (warp < heads) {
      const float2 own = per_warp[warp * SCAN_WARPS + lane];
      float top = own.x;
      for (int d = 16; d > 0; d >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
      const float all = warp_sum(own.y * exp2f(own.x - top));
      if (lane == 0) slices[warp * p.slice_count] = make_float2(top, all);
    }
  }
};

#define INSTANCE(NAME, HEADS, WORDS, NIBBLES)                                                               \
  extern "C" __global__ void __launch_bounds__(SCAN_THREADS) NAME(const __grid_constant__ RecallParams p) { \
    extern __shared__ __align__(16) char shared[];                                                          \
    release_next();                                                                                         \
    await_previous();                                                                                       \
    if ((int)blockIdx.x == p.slice_count) {                                                                 \
      if (blockIdx.z == 0) append(p, Far(p), shared);                                                       \
      return;                                                                                               \
    }                                                                                                       \
    Scan<HEADS, WORDS, NIBBLES> scan(p, shared);                                                            \
    scan.run((float *)(shared + scan.words() * 4 * scan.BYTE));                                             \
  }
#define LENGTHS(HEADS, SUFFIX, NIBBLES)                           \
  INSTANCE(recall_scan_##HEADS##_any##SUFFIX, HEADS, 0, NIBBLES)  \
  INSTANCE(recall_scan_##HEADS##_8##SUFFIX, HEADS, 2, NIBBLES)    \
  INSTANCE(recall_scan_##HEADS##_16##SUFFIX, HEADS, 4, NIBBLES)   \
  INSTANCE(recall_scan_##HEADS##_32##SUFFIX, HEADS, 8, NIBBLES)
#define ALL(HEADS)            \
  LENGTHS(HEADS, , false)     \
  LENGTHS(HEADS, _nibbles, true)
ALL(2)
ALL(4)
ALL(8)
