// recall_fetch: attention to the chosen tokens' exact rows, the estimate of the rest, and the merge with the near zone.
//
//   out_h = (Σ_near e^s v + Σ_chosen e^s v + Σ_rest e^min(score, cap_h) v^) / (the same with v = 1); see src/ops/recall/mod.rs.
//
// Shapes  HEADS (4, 8) heads of a group at most; D up to DIM, a multiple of 16 bytes of the store's type; `_any`: any even D.
// Launch  grid G (fetchers + rest_slices subsets), subsets = ceil(D / 64) where value codes are the rest, else 1; THREADS (512;
//         256 for DIM = 256 and _any); dynamic shared memory the larger of 4 THREADS / LANES group (D + 2) bytes
//         (LANES 16 for 16-bit rows at DIM = 64, else 32) and, with value codes, 131072 + 64 THREADS; with means 16 KiB.
//         fetchers + rest_slices at most 256. All blocks should be resident at once: those of the rest wait for the
//         fetchers of their KV head, which come first in the grid.
//
// Fetchers: half a warp or a warp reads one row (key and value adjacent, in rising order), whose lanes hold either queries or
// the output of their channels in the same registers. Bound by the host link.
// Value codes: the weights of 32 tokens for 8 heads are the tensor cores' second operand, decoded values the first. A word
// of shared memory is channels (g, g + 8) of a codeword, and four copies lie in separate banks for the four tokens that a
// warp decodes at a time, so that no load conflicts: 64 channels to a block.
// Weights are relative to the lowest chosen weight: at most 1, as half. The cap is unknown until the fetchers end; only a
// block whose largest score exceeds it computes its slice again.
// The last block of a KV head merges. Every sum has a fixed order.
#include "recall.cuh"

constexpr int REST_WORDS = 4;                         // sub-vectors of a thread block
constexpr int REST_TABLE = REST_WORDS * 256 * 128;    // bytes: 32 of a codeword, four times
constexpr int REST_PART = 64 * RECALL_HEADS;          // f32 of a warp's sums

__device__ inline int part_row(const RecallParams &p) { return (p.dim + 3) / 4 * 4 + 4; }
__device__ inline float *part_of(const RecallParams &p, int g, int part) {
  return p.parts + ((int64_t)g * (p.fetchers + p.rest_slices) + part) * RECALL_HEADS * part_row(p);
}

// UNIT elements of a row, of 16 bytes or 4.
template <typename T, int UNIT> struct Unit {
  uint32_t x[UNIT * sizeof(T) / 4];
  __device__ void load(const T *from) {
    if constexpr (sizeof(x) == 16) {
      const uint4 v = __ldcs((const uint4 *)from);
      x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
    } else {
      for (int i = 0; i < (int)sizeof(x) / 4; i++) x[i] = __ldcs((const uint32_t *)from + i);
    }
  }
  __device__ void clear() {
    for (auto &v : x) v = 0;
  }
  __device__ float get(int i) const {
    if constexpr (sizeof(T) == 4) return __uint_as_float(x[i]);
    else {
      const float2 two = unpack<T>(x[i / 2]);
      return i % 2 ? two.y : two.x;
    }
  }
};

template <typename T, int UNIT, int LANES, int UNITS, int HEADS, int THREADS> struct Fetch {
  static constexpr int TEAMS = THREADS / LANES, ROWS = HEADS * UNITS * UNIT > 64 ? 1 : HEADS * UNITS * UNIT > 32 ? 2 : 4;
  const RecallParams &p;
  float *shared;
  const int lane, team, g, group;

  __device__ Fetch(const RecallParams &params, float *memory, int kv)
      : p(params), shared(memory), lane(threadIdx.x % LANES), team(threadIdx.x / LANES), g(kv), group(p.heads / p.kv_heads) {}

  // Rows part, part + fetchers, .. of ROWS a team; leaves (o, m, l) in `to`. m in base 2, relative to the near zone's.
  __device__ void run(int part, float *to) {
    const int half = p.dim / UNIT, count = p.counts[g];
    float held[UNITS][UNIT][HEADS];  // a lane's queries where its unit is of the key, its output where it is of the value
    bool is_key[UNITS], is_value[UNITS];
#pragma unroll
    for (int j = 0; j < UNITS; j++) {
      const int c = lane + j * LANES;
      is_key[j] = c < half;
      is_value[j] = c >= half && c < 2 * half;
#pragma unroll
      for (int e = 0; e < UNIT; e++)
#pragma unroll
        for (int h = 0; h < HEADS; h++)
          held[j][e][h] = is_key[j] && h < group ? p.q[(int64_t)(g * group + h) * p.dim + c * UNIT + e] * (p.factor * LOG2E) : 0.f;
    }
    float m[HEADS], l[HEADS];
#pragma unroll
    for (int h = 0; h < HEADS; h++) m[h] = -INFINITY, l[h] = 0.f;
    const T *rows = (const T *)p.store + (int64_t)g * p.rows * 2 * p.dim;
    const int *chosen = p.chosen + (int64_t)g * p.k;
    const int stride = p.fetchers * TEAMS * ROWS;
    // Whole warps stay together: shuffles name all lanes.
    const int first = (part * TEAMS + team) * ROWS, warp_first = (part * TEAMS + team / (WARP / LANES) * (WARP / LANES)) * ROWS;
    Unit<T, UNIT> ahead[ROWS][UNITS];
    auto load = [&](int at) {
#pragma unroll
      for (int u = 0; u < ROWS; u++) {
        const bool any = at + u < count;
        const T *row = rows + (any ? (int64_t)chosen[at + u] * 2 * p.dim : 0);
#pragma unroll
        for (int j = 0; j < UNITS; j++) {
          if (any && (is_key[j] || is_value[j])) ahead[u][j].load(row + (lane + j * LANES) * UNIT);
          else ahead[u][j].clear();
        }
      }
    };
    load(first);
    for (int at = first, whole = warp_first; whole < count; at += stride, whole += stride) {
      Unit<T, UNIT> x[ROWS][UNITS];
#pragma unroll
      for (int u = 0; u < ROWS; u++)
#pragma unroll
        for (int j = 0; j < UNITS; j++) x[u][j] = ahead[u][j];
      load(at + stride);
      float s[ROWS][HEADS] = {};
#pragma unroll
      for (int u = 0; u < ROWS; u++)
#pragma unroll
        for (int j = 0; j < UNITS; j++)
#pragma unroll
          for (int e = 0; e < UNIT; e++) {
            const float v = is_key[j] ? x[u][j].get(e) : 0.f;
#pragma unroll
            for (int h = 0; h < HEADS; h++) s[u][h] = fmaf(v, held[j][e][h], s[u][h]);
          }
#pragma unroll
      for (int h = 0; h < HEADS; h++) {
        float top = m[h];
#pragma unroll
        for (int u = 0; u < ROWS; u++) {
          for (int d = LANES / 2; d > 0; d >>= 1) s[u][h] += __shfl_xor_sync(~0u, s[u][h], d);
          if (at + u >= count) s[u][h] = -INFINITY;
          top = fmaxf(top, s[u][h]);
        }
        const float base = top == -INFINITY ? 0.f : top, keep = exp2f(m[h] - base);
        m[h] = top;
        l[h] *= keep;
#pragma unroll
        for (int u = 0; u < ROWS; u++) l[h] += s[u][h] = exp2f(s[u][h] - base);
#pragma unroll
        for (int j = 0; j < UNITS; j++)
#pragma unroll
          for (int e = 0; e < UNIT; e++) held[j][e][h] *= is_value[j] ? keep : 1.f;
      }
#pragma unroll
      for (int u = 0; u < ROWS; u++)
#pragma unroll
        for (int j = 0; j < UNITS; j++)
#pragma unroll
          for (int e = 0; e < UNIT; e++) {
            const float v = is_value[j] ? x[u][j].get(e) : 0.f;
#pragma unroll
            for (int h = 0; h < HEADS; h++) held[j][e][h] = fmaf(v, s[u][h], held[j][e][h]);
          }
    }
    // [team][head][D + 2]
    const int row = p.dim + 2;
    for (int h = 0; h < HEADS; h++) {
      if (h >= group) break;
      float *own = shared + (team * group + h) * row;
#pragma unroll
      for (int j = 0; j < UNITS; j++)
#pragma unroll
        for (int e = 0; e < UNIT; e++)
#pragma unroll
          for (int i = 0; i < HEADS; i++)
            if (i == h && is_value[j]) own[(lane + j * LANES - half) * UNIT + e] = held[j][e][i];
#pragma unroll
      for (int i = 0; i < HEADS; i++)
        if (i == h && lane == 0) own[p.dim] = m[i], own[p.dim + 1] = l[i];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < group * (p.dim + 1); i += THREADS) {
      const int h = i / (p.dim + 1), c = i % (p.dim + 1);
      float top = -INFINITY, sum = 0.f;
      for (int t = 0; t < TEAMS; t++) top = fmaxf(top, shared[(t * group + h) * row + p.dim]);
      const float base = top == -INFINITY ? 0.f : top;
      for (int t = 0; t < TEAMS; t++) {
        const float *own = shared + (t * group + h) * row;
        sum += exp2f(own[p.dim] - base) * own[c == p.dim ? p.dim + 1 : c];
      }
      float *into = to + h * part_row(p);
      if (c < p.dim) into[c] = sum;
      else *(float2 *)(into + part_row(p) - 4) = make_float2(top - near_of(p, g * group + h) * LOG2E, sum);
    }
  }
};

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
  __device__ float codes(float against, float cap, float *to) {
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
    if (subset == 0 && warp == 0 && quad == 0 && row < group) put(to, against, all);
    __syncthreads();
    return largest;
  }

  // What the part of the head of `row` is relative to, and the sum of its weights.
  __device__ void put(float *to, float against, float all) const {
    *(float2 *)(to + row * part_row(p) + part_row(p) - 4) = make_float2(against, all);
  }

  // The same with the means of blocks. Shared memory: [heads][64 blocks] weights, then [heads][D] sums.
  __device__ float means(float against, float cap, float *to) {
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
    if (warp == 0 && quad == 0 && row < group) put(to, against, sum);
    __syncthreads();
    return most;
  }

  __device__ void run(float *to) {
    if (far.count() <= p.counts[g]) {
      for (int i = threadIdx.x; i < group * part_row(p); i += THREADS) {
        const int c = i % part_row(p);
        if (p.value_codes ? c / 64 == subset || (subset == 0 && c >= p.dim) : true) to[i] = 0.f;
      }
      return;
    }
    const float against = row < group ? base(row) : INFINITY;
    const float largest = p.value_codes ? codes(against, INFINITY, to) : means(against, INFINITY, to);
    // The largest exact logit, once the fetchers have come to it.
    if (threadIdx.x == 0)
      while (*(volatile int *)(p.counters + 8 * g) < p.fetchers) __nanosleep(100);
    __syncthreads();
    __threadfence();
    float cap = -INFINITY;
    for (int f = 0; f < p.fetchers; f++) cap = fmaxf(cap, __ldcg(part_of(p, g, f) + min(row, group - 1) * part_row(p) + part_row(p) - 4));
    if (!__syncthreads_or(row < group && largest > cap)) return;
    if (threadIdx.x == 0) atomicAdd(p.redone, 1);
    // Relative to the cap where it is lower, as the weights of a head are at most that now. All subsets of a slice see the same
    // scores, and so come here together.
    if (p.value_codes) codes(fminf(against, cap), cap, to);
    else means(fminf(against, cap), cap, to);
  }
};

// The last block of a KV head: near zone, chosen and rest.
template <int THREADS> __device__ void merge(const RecallParams &p, int g, float *shared) {
  const int group = p.heads / p.kv_heads, parts = p.fetchers + p.rest_slices, row = part_row(p);
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  float *factors = shared, *total = factors + RECALL_HEADS * (parts + 1);
  for (int h = warp; h < group; h += THREADS / WARP) {
    const float near = p.near_lse[g * group + h] > -INFINITY ? 0.f : -INFINITY;
    // What a part is relative to, in base 2.
    auto logit = [&](int i) {
      if (i == parts) return near;
      const float2 ml = __ldcg((const float2 *)(part_of(p, g, i) + h * row + row - 4));
      return ml.y > 0.f ? ml.x : -INFINITY;
    };
    float top = -INFINITY, sum = 0.f;
    for (int i = lane; i <= parts; i += WARP) top = fmaxf(top, logit(i));
    for (int d = 16; d > 0; d >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
    for (int i = lane; i <= parts; i += WARP) {
      const float factor = top == -INFINITY ? 0.f : exp2f(logit(i) - top);
      factors[h * (parts + 1) + i] = factor;
      sum += factor * (i == parts ? 1.f : __ldcg(part_of(p, g, i) + h * row + row - 3));
    }
    sum = warp_sum(sum);
    if (lane == 0) total[h] = sum > 0.f ? 1.f / sum : 0.f;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < group * p.dim; i += THREADS) {
    const int h = i / p.dim, c = i % p.dim;
    const int64_t at = (int64_t)g * group * p.dim + i;
    const float *factor = factors + h * (parts + 1);
    float x = factor[parts] > 0.f ? factor[parts] * p.near_out[at] : 0.f;
#pragma unroll 8
    for (int part = 0; part < parts; part++) {
      const float o = __ldcg(part_of(p, g, part) + h * row + c);
      x += factor[part] > 0.f ? factor[part] * o : 0.f;
    }
    p.out[at] = x * total[h];
  }
}

template <typename T, int UNIT, int LANES, int UNITS, int HEADS, int THREADS> __device__ void fetch(const RecallParams &p, char *shared) {
  release_next();
  const int fetching = p.fetchers * p.kv_heads, id = (int)blockIdx.x - fetching;
  const int subsets = p.value_codes ? (p.dim + 63) / 64 : 1, resting = p.rest_slices * subsets;
  const int g = id < 0 ? blockIdx.x % p.kv_heads : id % p.kv_heads, turn = id < 0 ? blockIdx.x / p.kv_heads : id / p.kv_heads;
  __shared__ bool last;
  if (id >= 0 && p.value_codes) Rest<THREADS>::build(p, shared, g, turn % subsets);
  await_previous();
  if (id < 0) {
    Fetch<T, UNIT, LANES, UNITS, HEADS, THREADS>(p, (float *)shared, g).run(turn, part_of(p, g, turn));
  } else {
    __syncthreads();
    const int slice = turn / subsets;
    Rest<THREADS>(p, shared, g, slice, turn % subsets).run(part_of(p, g, p.fetchers + slice));
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    if (id < 0) atomicAdd(p.counters + 8 * g, 1);
    last = atomicAdd(p.counters + 8 * g + 1, 1) == p.fetchers + resting - 1;
    if (last) p.counters[8 * g] = p.counters[8 * g + 1] = 0;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  merge<THREADS>(p, g, (float *)shared);
}

#define INSTANCE(NAME, T, UNIT, LANES, UNITS, HEADS, THREADS)                                                       \
  extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME(const __grid_constant__ RecallParams p) {           \
    extern __shared__ __align__(128) char shared[];                                                                 \
    fetch<T, UNIT, LANES, UNITS, HEADS, THREADS>(p, shared);                                                        \
  }
#define HALVES(DIM, LANES, UNITS, THREADS)                                                       \
  INSTANCE(recall_fetch_bf16_##DIM##_4, __nv_bfloat16, 8, LANES, UNITS, 4, THREADS)              \
  INSTANCE(recall_fetch_bf16_##DIM##_8, __nv_bfloat16, 8, LANES, UNITS, 8, THREADS)              \
  INSTANCE(recall_fetch_f16_##DIM##_4, __half, 8, LANES, UNITS, 4, THREADS)                      \
  INSTANCE(recall_fetch_f16_##DIM##_8, __half, 8, LANES, UNITS, 8, THREADS)
#define WHOLES(DIM, LANES, UNITS, THREADS)                                                       \
  INSTANCE(recall_fetch_f32_##DIM##_4, float, 4, LANES, UNITS, 4, THREADS)                       \
  INSTANCE(recall_fetch_f32_##DIM##_8, float, 4, LANES, UNITS, 8, THREADS)
// The build compiles each head dim apart, with ONLY_DIM set.
#if !defined(ONLY_DIM) || ONLY_DIM == 64
HALVES(64, 16, 1, 512)
WHOLES(64, 32, 1, 512)
#endif
#if !defined(ONLY_DIM) || ONLY_DIM == 128
HALVES(128, 32, 1, 512)
WHOLES(128, 32, 2, 512)
#endif
#if !defined(ONLY_DIM) || ONLY_DIM == 256
HALVES(256, 32, 2, 256)
WHOLES(256, 32, 4, 256)
INSTANCE(recall_fetch_bf16_any_8, __nv_bfloat16, 2, 32, 8, 8, 256)
INSTANCE(recall_fetch_f16_any_8, __half, 2, 32, 8, 8, 256)
INSTANCE(recall_fetch_f32_any_8, float, 2, 32, 8, 8, 256)
#endif
