// recall_scan: decoded scores of all far tokens, and the new token's codes and exact row.
//
//   scores[h, i] = factor q_h . k^_i - near_h, for all heads h of the KV head at once;
//   slices[h, s] = the largest score of slice s, and the sum of exp relative to it (base 2).
//
// Shapes  recall_scan_HEADS_BYTES: HEADS (4, 8) heads to a thread block, key codes of BYTES (8, 12, 16, 24, 32) bytes,
//         at most 6 bits a channel, levels that are sums over their bits; recall_scan_HEADS_any: codes of any length.
// Launch  grid (slice_count + 1, G, ceil(group / HEADS)), 1024 threads, dynamic shared memory
//         20 KiB; for _any ceil4(bytes) (512 HEADS + 96 HEADS) + 4 D HEADS + 4096 bytes. One multiprocessor holds one block.
//
// A level is a sum over its bits, l = sum_j c_j (2 bit_j - 1): src/recall/lloyd.rs makes them so. So the bits of all codes,
// as bytes of 0 or 1, times factor q_c scale_c 2 c_j, are one integer product on tensor cores: coefficients have 16 bits (of
// the largest of a head), as two columns of 8. No load of shared memory for a code.
// _any looks up every byte in a table of 256 entries of HEADS halves: a load of 8 or 16 bytes at random places has about
// three-fold bank conflicts. A lane has its own token, and with B = (I I)' the product A B adds two pairs of halves to a
// lane's own two sums, and its other two rows the same.
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
    if (!p.store) continue;  // the host stores the row
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
  if (p.means && p.store && (far.position + 1) % p.block == 0) {
    const int first = max(far.position + 1 - p.block, p.sinks);
    const void *rows = p.store;
    block_mean<SCAN_THREADS>(p.dim, first, far.position + 1, (float *)best, [&](int at, int c) {
      return at == far.position ? value[c] : element(rows, (((int64_t)g * p.rows + at) * 2 + 1) * p.dim + c, p.store_type);
    }, [&](int c, float mean) {
      put_element(p.means, ((int64_t)g * p.blocks + far.position / p.block) * p.dim + c, p.means_type, mean);
    });
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

// The largest score of each head and the sum of exp relative to it, over a thread block's tokens; `lists` [HEADS][warps].
__device__ inline void put_slice(float2 *lists, float2 *slices, int heads, int stride) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  __syncthreads();
  if (warp >= heads) return;
  const float2 own = lists[warp * SCAN_WARPS + lane];
  float top = own.x;
  for (int d = 16; d > 0; d >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
  const float all = warp_sum(own.y * exp2f(own.x - top));
  if (lane == 0) slices[warp * stride] = make_float2(top, all);
}

// A thread block's tokens: tiles of 64, and where its result goes.
struct Slice {
  int group, head0, heads, from, to;
  float2 *out;
  __device__ Slice(const RecallParams &p, const Far &far, int most) {
    group = p.heads / p.kv_heads;
    head0 = blockIdx.y * group + blockIdx.z * most;
    heads = min(most, group - (int)blockIdx.z * most);
    const int tiles = (far.end + 63) / 64, each = (tiles + p.slice_count - 1) / p.slice_count;
    from = blockIdx.x * each;
    to = min(from + each, tiles);
    out = p.slices + (int64_t)head0 * p.slice_count + blockIdx.x;
  }
  // Whether there is nothing to do, which is then the result.
  __device__ bool empty(const RecallParams &p, const Far &far) const {
    if (from < to && far.count() > 0) return false;
    if (threadIdx.x < heads) out[threadIdx.x * p.slice_count] = make_float2(-1e30f, 0.f);
    return true;
  }
};

__device__ inline float finite(float x) { return fminf(fmaxf(x, -65504.f), 65504.f); }

// Codes of any length.
template <int HEADS> struct Tables {
  static constexpr int ENTRY = HEADS * 2, BYTE = 256 * ENTRY, ACCS = HEADS / 4;
  const RecallParams &p;
  char *tables;
  const int lane, warp, g;
  uint32_t one;

  __device__ Tables(const RecallParams &params, char *shared)
      : p(params), tables(shared), lane(threadIdx.x % WARP), warp(threadIdx.x / WARP), g(blockIdx.y) {
    const int row = lane / 4, column = lane % 4 * 2;
    one = (column == row ? 0x3c00u : 0u) | (column + 1 == row ? 0x3c000000u : 0u);
  }

  __device__ int words() const { return (p.bytes + 3) / 4; }

  __device__ void build(const Slice &slice, float *factors, float *levels, float *constants) {
    const float *q = p.q + (int64_t)slice.head0 * p.dim, *mean = p.read_mean + g * p.dim, *scale = p.read_scale + g * p.dim;
    const RecallField *fields = p.fields + g * p.dim;
    const int *first = p.first + g * (p.bytes + 1);
    for (int i = threadIdx.x; i < p.dim * HEADS; i += SCAN_THREADS) {
      const int c = i / HEADS, h = i % HEADS;
      factors[i] = h < slice.heads ? q[h * p.dim + c] * p.factor * scale[c] : 0.f;
    }
    for (int i = threadIdx.x; i < RECALL_EDGES; i += SCAN_THREADS) levels[i] = p.levels[i];
    if (warp < HEADS) {
      float sum = 0.f;
      for (int c = lane; c < p.dim && warp < slice.heads; c += WARP) sum += q[warp * p.dim + c] * mean[c];
      sum = warp_sum(sum);
      if (lane == 0) constants[warp] = sum * p.factor - (warp < slice.heads ? near_of(p, slice.head0 + warp) : 0.f);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < words() * 4 * 256; i += SCAN_THREADS) {
      const int byte = i / 256, value = i % 256, until = byte < p.bytes ? first[byte + 1] : 0;
      float sums[HEADS] = {};
      for (int f = byte < p.bytes ? first[byte] : 0; f < until; f++) {
        const RecallField field = fields[f];
        const float level = levels[(1 << field.bits) + (value >> field.shift & ((1 << field.bits) - 1))];
#pragma unroll
        for (int h = 0; h < HEADS; h++) sums[h] = fmaf(factors[field.channel * HEADS + h], level, sums[h]);
      }
#pragma unroll
      for (int h = 0; h < HEADS; h += 2)
        *(uint32_t *)(tables + i * ENTRY + h * 2) = pack<__half>(finite(sums[h]), finite(sums[h + 1]));
    }
    __syncthreads();
  }

  __device__ void add(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3) const {
    const uint32_t a[4] = {a0, a1, a2, a3};
    mma<__half>(c, a, one, one);
  }

  // Adds the entries of four bytes of a code; `at` is the first one's table.
  __device__ void look_up(float (&c)[ACCS][4], uint32_t word, const char *at) const {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const char *first = at + i * BYTE + (word >> (8 * i) & 0xff) * ENTRY, *second = at + (i + 1) * BYTE + (word >> (8 * i + 8) & 0xff) * ENTRY;
      if constexpr (HEADS == 4) {
        const uint2 a = *(const uint2 *)first, b = *(const uint2 *)second;
        add(c[0], a.x, a.y, b.x, b.y);
      } else {
        const uint4 a = *(const uint4 *)first, b = *(const uint4 *)second;
        add(c[0], a.x, a.y, b.x, b.y);
        add(c[1], a.z, a.w, b.z, b.w);
      }
    }
  }

  __device__ uint32_t word_of(const uint8_t *from, int i, bool valid) const {
    if (!valid) return 0;
    if (p.bytes % 4 == 0) return *(const uint32_t *)(from + i * 4);
    uint32_t word = 0;
    for (int b = 0; b < min(4, p.bytes - i * 4); b++) word |= (uint32_t)from[i * 4 + b] << (8 * b);
    return word;
  }

  __device__ void run() {
    await_previous();
    const Far far(p);
    const Slice slice(p, far, HEADS);
    if (slice.empty(p, far)) return;
    float *levels = (float *)(tables + words() * 4 * BYTE), *factors = levels + RECALL_EDGES, *constants = factors + p.dim * HEADS;
    float2 *lists = (float2 *)(constants + HEADS);
    build(slice, factors, levels, constants);
    float most[HEADS], sum[HEADS];
#pragma unroll
    for (int h = 0; h < HEADS; h++) most[h] = -1e30f, sum[h] = 0.f;
    const uint8_t *codes = p.key_codes + (int64_t)g * p.ctx * p.bytes;
    __half *scores = p.scores + (int64_t)slice.head0 * p.ctx;
    for (int tile = slice.from + warp; tile < slice.to; tile += SCAN_WARPS) {
      const int token = tile * 64 + lane * 2;
      float c[2][ACCS][4] = {};
      for (int w = 0; w < words(); w++)
#pragma unroll
        for (int i = 0; i < 2; i++)
          look_up(c[i], word_of(codes + (int64_t)(token + i) * p.bytes, w, token + i < far.end), tables + w * 4 * BYTE);
      const bool valid[2] = {token >= far.begin && token < far.end, token + 1 >= far.begin && token + 1 < far.end};
#pragma unroll
      for (int h = 0; h < HEADS; h++) {
        const __half2 both = __floats2half2_rn(finite(c[0][h / 4][h % 4] + constants[h]), finite(c[1][h / 4][h % 4] + constants[h]));
        if (h < slice.heads) *(__half2 *)(scores + (int64_t)h * p.ctx + token) = both;
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
      if (lane == 0) lists[h * SCAN_WARPS + warp] = make_float2(top, all);
    }
    put_slice(lists, slice.out, slice.heads, p.slice_count);
  }
};

__device__ inline void mma_bytes(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Codes of 4 WORDS bytes. Rows of a product: 16 tokens, two neighbours in rows r and r + 8; columns: heads.
// Of four lanes with a token in common each holds one word or two; of codes of 12 and 24 bytes the fourth holds none.
template <int HEADS, int WORDS> struct Bits {
  static constexpr int OWN = WORDS > 4 ? 2 : 1, PLANES = WORDS == 2 ? 4 : 8;  // words of a lane, bits of each byte it takes
  static constexpr int HOLDERS = WORDS == 2 ? 4 : WORDS / OWN;                 // lanes of four that hold a word
  static constexpr int STEPS = OWN * PLANES / 2, PARTS = HEADS == 8 ? 2 : 1;   // products of 32 bits; high and low apart
  static constexpr int BITS = 32 * WORDS, COLUMNS = 2 * HEADS, GROUPS = WORDS > 4 ? 2 : 4;
  static constexpr int TILE = GROUPS * 16;     // tokens of a warp at a time
  static constexpr int VALUES = HEADS / 4;     // heads of a lane
  struct Shared {
    float terms[8][8];  // c_j of b bits
    float scale[HEADS], constant[HEADS];
    float2 lists[HEADS * SCAN_WARPS];
    float terms_of[BITS][HEADS];
    // Coefficients of four bytes: [high of each head, low of each head][bit, word]; rows apart by four banks.
    uint32_t columns[COLUMNS][8 * WORDS + 4];
  };
  const RecallParams &p;
  Shared &s;
  const int lane, warp, g, quad, row;

  __device__ Bits(const RecallParams &params, char *shared)
      : p(params), s(*(Shared *)shared), lane(threadIdx.x % WARP), warp(threadIdx.x / WARP), g(blockIdx.y), quad(lane % 4), row(lane / 4) {}

  // What does not depend on the token.
  __device__ void constants() {
    if (warp < 21) {
      // Warp: one of the bits of 1 .. 6.
      int bits = 1, j = warp;
      while (j >= bits) j -= bits++;
      float sum = 0.f;
      for (int i = lane; i < 1 << bits; i += WARP) sum += (i >> j & 1 ? 1.f : -1.f) * p.levels[(1 << bits) + i];
      sum = warp_sum(sum);
      if (lane == 0) s.terms[bits][j] = sum / (1 << bits);
    } else {
      for (int i = threadIdx.x - 21 * WARP; i < BITS * HEADS; i += SCAN_THREADS - 21 * WARP) (&s.terms_of[0][0])[i] = 0.f;
    }
    __syncthreads();
  }

  __device__ void build(const Slice &slice) {
    const float *q = p.q + (int64_t)slice.head0 * p.dim, *mean = p.read_mean + g * p.dim, *scale = p.read_scale + g * p.dim;
    const RecallField *fields = p.fields + g * p.dim;
    const int *first = p.first + g * (p.bytes + 1);
    const int count = first[4 * WORDS];
    for (int i = threadIdx.x; i < count * HEADS; i += SCAN_THREADS) {
      const int f = i / HEADS, h = i % HEADS;
      const RecallField field = fields[f];
      int byte = 0;  // the last whose first field is not beyond f
      for (int step = 16; step > 0; step /= 2)
        if (byte + step < 4 * WORDS && first[byte + step] <= f) byte += step;
      const float x = h < slice.heads ? q[h * p.dim + field.channel] * p.factor * scale[field.channel] : 0.f;
      for (int j = 0; j < field.bits; j++) s.terms_of[byte * 8 + field.shift + j][h] = 2.f * x * s.terms[field.bits][j];
    }
    __syncthreads();
    if (warp < HEADS) {
      float most = 0.f, all = 0.f, sum = 0.f;
      for (int i = lane; i < BITS; i += WARP) {
        const float x = s.terms_of[i][warp];
        most = fmaxf(most, fabsf(x));
        all += x;
      }
      for (int c = lane; c < p.dim && warp < slice.heads; c += WARP) sum += q[warp * p.dim + c] * mean[c];
      for (int d = 16; d > 0; d >>= 1) most = fmaxf(most, __shfl_xor_sync(~0u, most, d));
      sum = warp_sum(sum * p.factor - 0.5f * all);
      if (lane == 0) s.scale[warp] = most / 32512.f, s.constant[warp] = sum - (warp < slice.heads ? near_of(p, slice.head0 + warp) : 0.f);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < COLUMNS * BITS / 4; i += SCAN_THREADS) {
      const int plane = i % 8, column = i / 8 % COLUMNS, word = i / 8 / COLUMNS, h = column % HEADS;
      const float inverse = s.scale[h] > 0.f ? 1.f / s.scale[h] : 0.f;
      uint32_t packed = 0;
      for (int e = 0; e < 4; e++) {
        const int x = __float2int_rn(s.terms_of[(word * 4 + e) * 8 + plane][h] * inverse * (1.f / (1 << plane % 4))), high = (x + 128) >> 8;
        packed |= (uint32_t)((column < HEADS ? high : x - high * 256) & 0xff) << (8 * e);
      }
      s.columns[column][plane * WORDS + word] = packed;
    }
    __syncthreads();
  }

  // This lane's words of two neighbours, for a warp's tile from token `at` on.
  // (Rows up to a multiple of 64 are allocated; what lies beyond the far positions is not used.)
  __device__ void load(uint32_t (&words)[GROUPS][2][OWN], const uint8_t *codes, int at, int until) const {
    if (at >= until || quad >= HOLDERS) return;
#pragma unroll
    for (int u = 0; u < GROUPS; u++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const uint8_t *from = codes + (int64_t)at * (4 * WORDS) + (u * 16 + i) * (4 * WORDS);
        if constexpr (OWN == 1) words[u][i][0] = __ldcs((const uint32_t *)from);
        else {
          const uint2 x = __ldcs((const uint2 *)from);
          words[u][i][0] = x.x, words[u][i][1] = x.y;
        }
      }
  }

  __device__ void run() {
    constants();
    await_previous();
    const Far far(p);
    const Slice slice(p, far, HEADS);
    if (slice.empty(p, far)) return;
    const uint8_t *codes = p.key_codes + ((int64_t)g * p.ctx + row * 2) * p.bytes + (WORDS == 2 ? quad % 2 : quad * OWN) * 4;
    const int until = min(slice.to * 64, (far.end + TILE - 1) / TILE * TILE), at = slice.from * 64 + warp * TILE;
    uint32_t ahead[GROUPS][2][OWN] = {};
    load(ahead, codes, at, until);
    build(slice);
    score(slice, far, codes, at, until, ahead);
    put_slice(s.lists, slice.out, slice.heads, p.slice_count);
  }

  __device__ void score(const Slice &slice, const Far &far, const uint8_t *codes, int at, int until, uint32_t (&ahead)[GROUPS][2][OWN]) {
    // Second operands: the coefficients of this lane's bits, and where halves of an entry go.
    uint32_t b[PARTS][STEPS][2];
#pragma unroll
    for (int part = 0; part < PARTS; part++)
#pragma unroll
      for (int step = 0; step < STEPS; step++)
#pragma unroll
        for (int i = 0; i < 2; i++)
          b[part][step][i] = quad >= HOLDERS ? 0
              : s.columns[part * 8 + row][((WORDS == 2 ? quad / 2 * 4 : 0) + step % (PLANES / 2) * 2 + i) * WORDS +
                                          (WORDS == 2 ? quad % 2 : quad * OWN + step / (PLANES / 2))];
    const int half = quad / 2 * 4, mine = HEADS == 4 ? (quad < 2 ? 2 * quad : 2 * quad - 3) : 2 * quad;  // the first of this lane's heads
    const bool high = quad < 2;
    const int of_own = high ? 256 : 1, of_other = high ? 1 : 256;
    const __half2 largest = __float2half2_rn(65504.f);
    float most[VALUES], sum[VALUES], scale[VALUES], constant[VALUES];
#pragma unroll
    for (int v = 0; v < VALUES; v++) most[v] = -1e30f, sum[v] = 0.f, scale[v] = s.scale[mine + v], constant[v] = s.constant[mine + v];
    __half *scores = p.scores + (int64_t)(slice.head0 + mine) * p.ctx + row * 2;
    for (; at < until; at += SCAN_WARPS * TILE) {
      uint32_t code[GROUPS][2][OWN];
#pragma unroll
      for (int u = 0; u < GROUPS; u++)
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
          for (int w = 0; w < OWN; w++) code[u][i][w] = ahead[u][i][w];
      load(ahead, codes, at + SCAN_WARPS * TILE, until);
      __half2 both[GROUPS][VALUES];
#pragma unroll
      for (int u = 0; u < GROUPS; u++) {
        int c[PARTS][4] = {};
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
          uint32_t a[4];
#pragma unroll
          for (int i = 0; i < 4; i++) {
            // Bits 0 .. 3 of a half byte stay where they are: as 1, 2, 4, 8, by which their coefficients are divided.
            const int plane = step % (PLANES / 2) * 2 + i / 2;
            const uint32_t word = code[u][i % 2][step / (PLANES / 2)];
            a[i] = (WORDS == 2 ? word >> half : plane < 4 ? word : word >> 4) & 0x01010101u << plane % 4;
          }
#pragma unroll
          for (int part = 0; part < PARTS; part++) mma_bytes(c[part], a, b[part][step][0], b[part][step][1]);
        }
        if constexpr (HEADS == 4) {
          // High halves are in lanes 0 and 1 of four, low ones in 2 and 3: each lane takes one head.
          const int x = __shfl_xor_sync(~0u, high ? c[0][1] : c[0][0], 2), y = __shfl_xor_sync(~0u, high ? c[0][3] : c[0][2], 2);
          const int first = (high ? c[0][0] : c[0][1]) * of_own + x * of_other, second = (high ? c[0][2] : c[0][3]) * of_own + y * of_other;
          float lo = fmaf((float)first, scale[0], constant[0]), hi = fmaf((float)second, scale[0], constant[0]);
          both[u][0] = __floats2half2_rn(lo, hi);
        } else {
#pragma unroll
          for (int v = 0; v < VALUES; v++)
            both[u][v] = __floats2half2_rn(fmaf((float)(c[0][v] * 256 + c[PARTS - 1][v]), scale[v], constant[v]),
                                           fmaf((float)(c[0][v + 2] * 256 + c[PARTS - 1][v + 2]), scale[v], constant[v]));
        }
#pragma unroll
        for (int v = 0; v < VALUES; v++) {
          both[u][v] = __hmin2(__hmax2(both[u][v], __hneg2(largest)), largest);  // a NaN becomes the lowest
          if (mine + v < slice.heads) *(__half2 *)(scores + (int64_t)v * p.ctx + at + u * 16) = both[u][v];
        }
      }
      if (at < far.begin || at + TILE > far.end) {
        asm volatile("" ::: "memory");  // a branch, as it is seldom taken
#pragma unroll
        for (int u = 0; u < GROUPS; u++) {
          const int token = at + u * 16 + row * 2;
          const uint32_t drop = (token >= far.begin && token < far.end ? 0u : 0xfc00u) | (token + 1 >= far.begin && token + 1 < far.end ? 0u : 0xfc000000u);
#pragma unroll
          for (int v = 0; v < VALUES; v++) {
            uint32_t x = *(uint32_t *)&both[u][v];
            if (drop & 0xffffu) x = (x & 0xffff0000u) | 0xfc00u;
            if (drop >> 16) x = (x & 0xffffu) | 0xfc000000u;
            both[u][v] = *(__half2 *)&x;
          }
        }
      }
#pragma unroll
      for (int v = 0; v < VALUES; v++) {
        __half2 tops = both[0][v];
#pragma unroll
        for (int u = 1; u < GROUPS; u++) tops = __hmax2(tops, both[u][v]);
        const float top = fmaxf(most[v], fmaxf(__low2float(tops), __high2float(tops)) * LOG2E);
        sum[v] *= exp2f(most[v] - top);
#pragma unroll
        for (int u = 0; u < GROUPS; u++) {
          const float2 x = __half22float2(both[u][v]);
          sum[v] += exp2f(fmaf(x.x, LOG2E, -top)) + exp2f(fmaf(x.y, LOG2E, -top));
        }
        most[v] = top;
      }
    }
#pragma unroll
    for (int v = 0; v < VALUES; v++) {
      float top = most[v];
      for (int d = 4; d < WARP; d *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
      float all = sum[v] * exp2f(most[v] - top);
      for (int d = 4; d < WARP; d *= 2) all += __shfl_xor_sync(~0u, all, d);
      if (row == 0) s.lists[(mine + v) * SCAN_WARPS + warp] = make_float2(top, all);
    }
  }
};

#define INSTANCE(NAME, KIND)                                                                                \
  extern "C" __global__ void __launch_bounds__(SCAN_THREADS) NAME(const __grid_constant__ RecallParams p) { \
    extern __shared__ __align__(16) char shared[];                                                          \
    release_next();                                                                                         \
    if ((int)blockIdx.x == p.slice_count) {                                                                 \
      await_previous();                                                                                     \
      if (blockIdx.z == 0) append(p, Far(p), shared);                                                       \
      return;                                                                                               \
    }                                                                                                       \
    KIND scan(p, shared);                                                                                   \
    scan.run();                                                                                             \
  }
#define TABLES(HEADS) Tables<HEADS>
#define BITS(HEADS, WORDS) Bits<HEADS, WORDS>
#define LENGTHS(HEADS)                                   \
  INSTANCE(recall_scan_##HEADS##_any, TABLES(HEADS))     \
  INSTANCE(recall_scan_##HEADS##_8, BITS(HEADS, 2))      \
  INSTANCE(recall_scan_##HEADS##_12, BITS(HEADS, 3))     \
  INSTANCE(recall_scan_##HEADS##_16, BITS(HEADS, 4))     \
  INSTANCE(recall_scan_##HEADS##_24, BITS(HEADS, 6))     \
  INSTANCE(recall_scan_##HEADS##_32, BITS(HEADS, 8))
LENGTHS(4)
LENGTHS(8)
