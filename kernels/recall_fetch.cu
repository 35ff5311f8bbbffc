// recall_fetch: attention to the chosen tokens' exact rows, the estimate of the rest, and the merge with the near zone.
//
//   out_h = (Σ_near e^s v + Σ_chosen e^s v + Σ_rest e^min(score, cap_h) v^) / (the same with v = 1); see src/ops/recall/mod.rs.
//
// Shapes  HEADS (4, 8) heads of a group at most; D up to DIM, a multiple of 16 bytes of the store's type; `_any`: any even D.
// Launch  grid G (fetchers + rest_slices subsets), subsets = ceil(D / 64) where value codes are the rest, else 1; THREADS (512;
//         256 for DIM = 256 and _any); dynamic shared memory the larger of 4 THREADS / LANES (group (D + 3) + 8)
//         bytes (LANES 16 for 16-bit rows at DIM = 64, else 32) and, with value codes, 131072 + 64 THREADS; with means 16 KiB.
//         fetchers + rest_slices at most 256. All blocks should be resident at once: those of the rest wait for the
//         fetchers of their KV head, which come first in the grid.
//
// Fetchers: half a warp or a warp reads one row (key and value adjacent, in rising order), whose lanes hold either queries or
// the output of their channels in the same registers. Bound by the host link.
// Value codes: the weights of 32 tokens for 8 heads are the tensor cores' second operand, decoded values the first. A word
// of shared memory is channels (g, g + 8) of a codeword, and four copies lie in separate banks for the four tokens that a
// warp decodes at a time, so that no load conflicts: 64 channels to a block.
// Weights are relative to the lowest chosen weight: at most 1, as half. The cap is unknown until the fetchers end, so the
// rest is computed without one, and its slices summed by the block that is last with its own. The last fetcher merges where
// that sum is made and no score exceeds its head's cap. Else the blocks whose largest score does compute their slices again,
// and the last block of the rest merges all parts. A block waits for fetchers alone. Every sum has a fixed order.
#include "recall_rest.cuh"

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
    bool is_key[UNITS], is_value[UNITS];
#pragma unroll
    for (int j = 0; j < UNITS; j++) {
      const int c = lane + j * LANES;
      is_key[j] = c < half;
      is_value[j] = c >= half && c < 2 * half;
    }
    const T *rows = (const T *)p.store + (int64_t)g * p.rows * 2 * p.dim;
    const int *chosen = p.chosen + (int64_t)g * p.k;
    const int stride = p.fetchers * TEAMS * ROWS, from = part * TEAMS * ROWS, until = count;
    // Whole warps stay together: shuffles name all lanes.
    const int first = from + team * ROWS, warp_first = from + team / (WARP / LANES) * (WARP / LANES) * ROWS;
    Unit<T, UNIT> ahead[ROWS][UNITS];
    int tokens[ROWS];  // of the rows to load next
    auto find = [&](int at) {
#pragma unroll
      for (int u = 0; u < ROWS; u++) tokens[u] = chosen[min(at + u, p.k - 1)];
    };
    auto load = [&](int at) {
#pragma unroll
      for (int u = 0; u < ROWS; u++) {
        const bool any = at + u < until;
        const T *row = rows + (any ? (int64_t)tokens[u] * 2 * p.dim : 0);
#pragma unroll
        for (int j = 0; j < UNITS; j++) {
          if (any && (is_key[j] || is_value[j])) ahead[u][j].load(row + (lane + j * LANES) * UNIT);
          else ahead[u][j].clear();
        }
      }
    };
    find(first);
    load(first);
    find(first + stride);
    float held[UNITS][UNIT][HEADS];  // a lane's queries where its unit is of the key, its output where it is of the value
#pragma unroll
    for (int j = 0; j < UNITS; j++)
#pragma unroll
      for (int e = 0; e < UNIT; e++)
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
          const int c = lane + j * LANES;
          held[j][e][h] = is_key[j] && h < group ? p.q[(int64_t)(g * group + h) * p.dim + c * UNIT + e] * (p.factor * LOG2E) : 0.f;
        }
    float m[HEADS], l[HEADS];
#pragma unroll
    for (int h = 0; h < HEADS; h++) m[h] = -INFINITY, l[h] = 0.f;
    for (int at = first, whole = warp_first; whole < until; at += stride, whole += stride) {
      Unit<T, UNIT> x[ROWS][UNITS];
#pragma unroll
      for (int u = 0; u < ROWS; u++)
#pragma unroll
        for (int j = 0; j < UNITS; j++) x[u][j] = ahead[u][j];
      load(at + stride);
      find(at + 2 * stride);
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
          if (at + u >= until) s[u][h] = -INFINITY;
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
    // Sums of the teams [team][head][D], teams apart by eight banks; their (m, l) and then what each counts [head][team].
    const int apart = group * p.dim + 8;
    float *sums = shared, *factors = (float *)((float2 *)(sums + TEAMS * apart) + TEAMS * group);
    float2 *relative = (float2 *)(sums + TEAMS * apart);
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
      if (h >= group) break;
#pragma unroll
      for (int j = 0; j < UNITS; j++) {
        float *own = sums + team * apart + h * p.dim + (lane + j * LANES - half) * UNIT;
        if (!is_value[j]) continue;
        if constexpr (UNIT % 4 == 0) {
#pragma unroll
          for (int e = 0; e < UNIT; e += 4)
            *(float4 *)(own + e) = make_float4(held[j][e][h], held[j][e + 1][h], held[j][e + 2][h], held[j][e + 3][h]);
        } else {
#pragma unroll
          for (int e = 0; e < UNIT; e += 2) *(float2 *)(own + e) = make_float2(held[j][e][h], held[j][e + 1][h]);
        }
      }
      if (lane == 0) relative[h * TEAMS + team] = make_float2(m[h], l[h]);
    }
    __syncthreads();
    const int warp = threadIdx.x / WARP, at = threadIdx.x % WARP;
    if (warp < group) {
      const float2 own = at < TEAMS ? relative[warp * TEAMS + at] : make_float2(-INFINITY, 0.f);
      float top = own.x;
      for (int d = 16; d > 0; d >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
      const float factor = exp2f(own.x - (top == -INFINITY ? 0.f : top)), sum = warp_sum(factor * own.y);
      if (at < TEAMS) factors[warp * TEAMS + at] = factor;
      if (at == 0)
        *(float2 *)(to + (warp + 1) * part_row(p) - 4) = make_float2(top - near_of(p, g * group + warp) * LOG2E, sum);
    }
    __syncthreads();
    // Four lanes to two channels, each with every fourth team.
    const int pairs = group * p.dim / 2;
    for (int i = threadIdx.x; i < (4 * pairs + WARP - 1) / WARP * WARP; i += THREADS) {
      const int pair = min(i / 4, pairs - 1), h = 2 * pair / p.dim;
      float2 sum = make_float2(0.f, 0.f);
#pragma unroll
      for (int t = i % 4; t < TEAMS; t += 4) {
        const float2 v = *(const float2 *)(sums + t * apart + 2 * pair);
        const float factor = factors[h * TEAMS + t];
        sum = make_float2(fmaf(factor, v.x, sum.x), fmaf(factor, v.y, sum.y));
      }
      for (int d = 1; d < 4; d *= 2)
        sum = make_float2(sum.x + __shfl_xor_sync(~0u, sum.x, d), sum.y + __shfl_xor_sync(~0u, sum.y, d));
      if (i % 4 == 0 && i / 4 < pairs) *(float2 *)(to + h * part_row(p) + 2 * pair - h * p.dim) = sum;
    }
  }
};

// Counts the rows that the layer's step before fetched too, and keeps the list for the step after. By one block of a KV head.
template <int THREADS> __device__ void count_again(const RecallParams &p, int g) {
  if (!p.previous || Far(p).stopped) return;
  int *previous = p.previous + (int64_t)g * (p.k + 1), again = 0;
  const uint32_t *bitmap = p.bitmap + (int64_t)g * (p.ctx / WARP);
  for (int i = threadIdx.x; i < previous[p.k]; i += THREADS) again += bitmap[previous[i] / WARP] >> (previous[i] % WARP) & 1;
  again = __reduce_add_sync(~0u, again);
  if (threadIdx.x % WARP == 0 && again) atomicAdd(p.fetched + 1, (unsigned long long)again);
  __syncthreads();
  const int count = p.counts[g];
  for (int i = threadIdx.x; i < count; i += THREADS) previous[i] = p.chosen[(int64_t)g * p.k + i];
  if (threadIdx.x == 0) {
    previous[p.k] = count;
    atomicAdd(p.fetched, (unsigned long long)count);
  }
}

// Near zone, chosen and rest of a KV head; of the rest the sum of its slices (`summed`) or each of them.
template <int THREADS> __device__ void merge(const RecallParams &p, int g, float *shared, bool summed) {
  constexpr int HELD = 10;  // parts whose loads are in flight while factors are made
  const int group = p.heads / p.kv_heads, row = part_row(p), parts = p.fetchers + (summed ? min(p.rest_slices, 1) : p.rest_slices);
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  auto part = [&](int i) { return part_of(p, g, summed && i == p.fetchers ? p.fetchers + p.rest_slices : i); };
  auto output = [&](int part_, int i) { return __ldcg(part(part_) + i / p.dim * row + i % p.dim); };
  float held[HELD];
#pragma unroll
  for (int j = 0; j < HELD; j++) held[j] = j < parts && (int)threadIdx.x < group * p.dim ? output(j, threadIdx.x) : 0.f;
  float *factors = shared, *total = factors + RECALL_HEADS * (parts + 1);
  for (int h = warp; h < group; h += THREADS / WARP) {
    // What a part is relative to, in base 2, and the sum of its weights.
    auto relative = [&](int i) {
      if (i > parts) return make_float2(-INFINITY, 0.f);
      if (i == parts) return make_float2(p.near_lse[g * group + h] > -INFINITY ? 0.f : -INFINITY, 1.f);
      const float2 ml = __ldcg((const float2 *)(part(i) + h * row + row - 4));
      return make_float2(ml.y > 0.f ? ml.x : -INFINITY, ml.y);
    };
    const float2 first = relative(lane);
    float top = first.x, sum = 0.f;
    for (int i = lane + WARP; i <= parts; i += WARP) top = fmaxf(top, relative(i).x);
    for (int d = 16; d > 0; d >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
    for (int i = lane; i <= parts; i += WARP) {
      const float2 ml = i == lane ? first : relative(i);
      const float factor = top == -INFINITY ? 0.f : exp2f(ml.x - top);
      factors[h * (parts + 1) + i] = factor;
      sum += factor * ml.y;
    }
    sum = warp_sum(sum);
    if (lane == 0) total[h] = sum > 0.f ? 1.f / sum : 0.f;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < group * p.dim; i += THREADS) {
    const int h = i / p.dim;
    const int64_t at = (int64_t)g * group * p.dim + i;
    const float *factor = factors + h * (parts + 1);
    float x = factor[parts] > 0.f ? factor[parts] * p.near_out[at] : 0.f;
    auto add = [&](int j, float o) { x += factor[j] > 0.f ? factor[j] * o : 0.f; };
    int from = 0;
    if (i == (int)threadIdx.x) {
#pragma unroll
      for (int j = 0; j < HELD; j++)
        if (j < parts) add(j, held[j]);
      from = HELD;
    }
#pragma unroll 8
    for (int j = from; j < parts; j++) add(j, output(j, i));
    p.out[at] = x * total[h];
  }
}

// Counts this block in, once all that it has written can be read; returns how many came before.
__device__ inline int arrive(int *counter) {
  __shared__ int before;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) before = atomicAdd(counter, 1);
  __syncthreads();
  __threadfence();
  return before;
}

// What the first thread reads, for all.
template <typename Read> __device__ inline int told(Read read) {
  __shared__ int value;
  __syncthreads();
  if (threadIdx.x == 0) value = read();
  __syncthreads();
  __threadfence();
  return value;
}

enum { MERGED = 1, CAPPED = 2 };  // what the last fetcher decides; CAPPED also where it cannot tell yet

// The last fetcher of a KV head.
template <int THREADS> __device__ void decide(const RecallParams &p, int g, float *shared) {
  int *counters = counters_of(p, g);
  if (p.rest_slices == 0) {
    if (threadIdx.x == 0) counters[FETCHED] = 0;
    return merge<THREADS>(p, g, shared, true);
  }
  bool merged = told([&] { return *(volatile int *)(counters + SUMMED); });
  if (merged) {
    const int lane = threadIdx.x % WARP, h = threadIdx.x / WARP, row = part_row(p);
    bool over = false;
    if (h < p.heads / p.kv_heads) {
      float cap = -INFINITY;
      for (int f = lane; f < p.fetchers; f += WARP) cap = fmaxf(cap, __ldcg(part_of(p, g, f) + h * row + row - 4));
      for (int d = 16; d > 0; d >>= 1) cap = fmaxf(cap, __shfl_xor_sync(~0u, cap, d));
      over = __ldcg(part_of(p, g, p.fetchers + p.rest_slices) + h * row + row - 2) > cap;
    }
    merged = !__syncthreads_or(over);
  }
  if (threadIdx.x == 0) *(volatile int *)(counters + DECIDED) = merged ? MERGED : CAPPED;
  if (merged) merge<THREADS>(p, g, shared, true);
}

template <typename T, int UNIT, int LANES, int UNITS, int HEADS, int THREADS> __device__ void fetch(const RecallParams &p, char *shared) {
  release_next();
  const int fetching = p.fetchers * p.kv_heads, id = (int)blockIdx.x - fetching;
  const int subsets = p.value_codes ? (p.dim + 63) / 64 : 1, resting = p.rest_slices * subsets;
  const int g = id < 0 ? blockIdx.x % p.kv_heads : id % p.kv_heads, turn = id < 0 ? blockIdx.x / p.kv_heads : id / p.kv_heads;
  int *counters = counters_of(p, g);
  if (id >= 0 && p.value_codes) Rest<THREADS>::build(p, shared, g, turn % subsets);
  await_previous();
  if (id < 0) {
    Fetch<T, UNIT, LANES, UNITS, HEADS, THREADS>(p, (float *)shared, g).run(turn, part_of(p, g, turn));
    if (arrive(counters + FETCHED) == p.fetchers - 1) decide<THREADS>(p, g, (float *)shared);
    if (turn == 0 && p.rest_slices == 0) count_again<THREADS>(p, g);
    return;
  }
  __syncthreads();
  const int slice = turn / subsets;
  float *part = part_of(p, g, p.fetchers + slice);
  const Rest<THREADS> rest(p, shared, g, slice, turn % subsets);
  const float largest = rest.run(part);
  if (arrive(counters + SLICED) == resting - 1) {
    sum_slices<THREADS>(p, g);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) *(volatile int *)(counters + SUMMED) = 1;
  }
  if (turn == 0) count_again<THREADS>(p, g);
  const bool capped = told([&] {
    int decided;
    while ((decided = *(volatile int *)(counters + DECIDED)) == 0) __nanosleep(100);
    return decided;
  }) == CAPPED;
  if (capped && rest.cap(largest, part) && threadIdx.x == 0) *(volatile int *)(counters + AGAIN) = 1;
  if (arrive(counters + ENDED) != resting - 1) return;
  const bool again = told([&] { return *(volatile int *)(counters + AGAIN); });
  if (threadIdx.x == 0)
    counters[FETCHED] = counters[SLICED] = counters[ENDED] = counters[SUMMED] = counters[DECIDED] = counters[AGAIN] = 0;
  // Capped without a slice computed again: the sum was late for the last fetcher. The same sum is merged, as if it had not been.
  if (capped) merge<THREADS>(p, g, (float *)shared, !again);
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
