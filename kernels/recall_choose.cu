// recall_weigh, recall_choose: the k far tokens of each KV head with the largest weight over its heads.
//
//   w_i = sum_h exp(scores[h, i] - ln(1 + e^far_h)), far_h the log-sum-exp of all scores of head h, which are relative to
//   the near zone's;
//   chosen: the k largest in rising order, of equal weights the earlier tokens; all where there are no more than k.
//
// Launch  recall_weigh: grid (any, G), 512 threads; mass, weights and their histogram.
//         recall_choose: grid (any, G), 1024 threads; dynamic shared memory 8 LISTED bytes. About as many blocks as
//         multiprocessors for all KV heads together.
//
// Selection on the bits of f32 weights, which are in the order of the weights as none is negative. recall_weigh counts the
// weights by their upper 11 bits. Each block of recall_choose finds in that histogram the bin where the k-th lies, marks
// what is above it and lists what is in it: a ninth of an octave, a few hundred tokens. The last block of a KV head selects
// among those by the other 20 bits, of equals by position, and writes the places of all bits of the map. Where more than
// LISTED tokens are in the bin (nearly uniform attention), the blocks first count them by the next 11 bits, tile by tile,
// and go on with the 22 bits of the k-th. A block waits only for tiles that other blocks have taken, never for a block that
// may not have started. More than LISTED tokens even then (repeated codes) are read from memory again by the last block.
// Only counts and bits meet in atomic operations, so that the result does not depend on scheduling.
#include "recall.cuh"

constexpr int WEIGH_THREADS = 512, CHOOSE_THREADS = 1024, CHOOSE_WARPS = CHOOSE_THREADS / WARP, BINS = RECALL_BINS;
constexpr int LISTED = RECALL_LISTED;
constexpr uint32_t NO_TOKEN = 0xffffffffu;

extern "C" __global__ void __launch_bounds__(WEIGH_THREADS) recall_weigh(const __grid_constant__ RecallParams p) {
  __shared__ int bins[BINS];
  __shared__ float base_of[RECALL_HEADS];
  release_next();
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = blockIdx.y, group = p.heads / p.kv_heads;
  for (int i = threadIdx.x; i < BINS; i += WEIGH_THREADS) bins[i] = 0;
  await_previous();
  const Far far(p);
  if (far.count() == 0) return;
  // log2(1 + e^far) of each head.
  if (warp < group) {
    const int h = g * group + warp;
    const float2 *slices = p.slices + (int64_t)h * p.slice_count;
    float top = -1e30f, sum = 0.f;
    for (int i = lane; i < p.slice_count; i += WARP) top = fmaxf(top, slices[i].x);
    for (int d = 16; d > 0; d >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
    for (int i = lane; i < p.slice_count; i += WARP) sum += slices[i].y * exp2f(slices[i].x - top);
    sum = warp_sum(sum);
    const float all = top + log2f(sum), most = fmaxf(all, 0.f);
    const float base = most + log2f(exp2f(all - most) + exp2f(-most));
    if (lane == 0) base_of[warp] = base;
    if (lane == 0 && blockIdx.x == 0) p.mass[h] = base;
  }
  __syncthreads();
  const int64_t scores = (int64_t)g * group * p.ctx;
  const int until = (far.end + WARP - 1) / WARP * WARP;  // words of the bitmap are whole
  for (int i = (blockIdx.x * WEIGH_THREADS + threadIdx.x) * 8; i < until; i += gridDim.x * WEIGH_THREADS * 8) {
    float w[8] = {};
    uint4 x[RECALL_HEADS];
#pragma unroll
    for (int h = 0; h < RECALL_HEADS; h++)
      if (h < group) x[h] = load16_written(p.scores + scores + (int64_t)h * p.ctx + i);
#pragma unroll
    for (int h = 0; h < RECALL_HEADS; h++) {
      if (h >= group) break;
      const float base = base_of[h];
      const uint32_t part[4] = {x[h].x, x[h].y, x[h].z, x[h].w};
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const float2 score = unpack<__half>(part[j]);
        w[2 * j] += exp2f(fmaf(score.x, LOG2E, -base));
        w[2 * j + 1] += exp2f(fmaf(score.y, LOG2E, -base));
      }
    }
    uint32_t bits[8];
#pragma unroll
    for (int j = 0; j < 8; j++) {
      // No weight is negative; what is not a number (a query that is none) counts as nothing.
      bits[j] = i + j < far.begin || i + j >= far.end ? NO_TOKEN : w[j] >= 0.f ? __float_as_uint(w[j]) : 0u;
      if (bits[j] != NO_TOKEN) atomicAdd(&bins[bits[j] >> 20], 1);
    }
    uint4 *to = (uint4 *)(p.weights + (int64_t)g * p.ctx + i);
    to[0] = make_uint4(bits[0], bits[1], bits[2], bits[3]);
    to[1] = make_uint4(bits[4], bits[5], bits[6], bits[7]);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < BINS; i += WEIGH_THREADS)
    if (bins[i]) atomicAdd(p.histogram + g * 2 * BINS + i, bins[i]);
}

struct Found {
  int bin, rest;  // the bin with the `left`-th highest, and how many are wanted in it
};

// Inclusive sums over the block's threads; `sums` [warps] must differ from the previous call's.
__device__ inline int sum_upto(int x, int *sums) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  for (int d = 1; d < WARP; d *= 2) {
    const int other = __shfl_up_sync(~0u, x, d);
    if (lane >= d) x += other;
  }
  if (lane == WARP - 1) sums[warp] = x;
  __syncthreads();
  int before = sums[lane];
  for (int d = 1; d < WARP; d *= 2) {
    const int other = __shfl_up_sync(~0u, before, d);
    if (lane >= d) before += other;
  }
  before = __shfl_sync(~0u, before, max(warp - 1, 0));
  return warp > 0 ? x + before : x;
}

// The first thread has the highest two of 2048 bins.
__device__ inline void find(int upper, int lower, int left, int *sums, Found &found) {
  const int upto = sum_upto(upper + lower, sums), above = upto - upper - lower, high = BINS - 1 - 2 * (int)threadIdx.x;
  if (above < left && left <= upto) {
    const bool first = left <= above + upper;
    found.bin = first ? high : high - 1;
    found.rest = left - above - (first ? 0 : upper);
  }
  __syncthreads();
}

// Counts the weights whose upper 11 bits are `bin` by their next 11 into `histogram`; returns when all blocks of the KV head
// have. `counters`: tiles taken, tiles counted.
__device__ inline void count_crowded(const uint32_t *weights, int words, uint32_t bin, int *histogram, int *counters, int *bins) {
  constexpr int TILE = CHOOSE_WARPS * 8;  // words
  __shared__ int taken;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, tiles = (words + TILE - 1) / TILE;
  for (int i = threadIdx.x; i < BINS; i += CHOOSE_THREADS) bins[i] = 0;
  int counted = 0;
  while (true) {
    __syncthreads();
    if (threadIdx.x == 0) taken = atomicAdd(counters, 1);
    __syncthreads();
    const int first = taken * TILE + warp * 8;
    if (taken >= tiles) break;
    counted++;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const uint32_t w = first + i < words ? __ldcg(weights + (first + i) * WARP + lane) : NO_TOKEN;
      if (w != NO_TOKEN && w >> 20 == bin) atomicAdd(&bins[w >> 9 & 2047], 1);
    }
  }
  for (int i = threadIdx.x; i < BINS; i += CHOOSE_THREADS)
    if (bins[i]) atomicAdd(histogram + i, bins[i]);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    atomicAdd(counters + 1, counted);
    while (*(volatile int *)(counters + 1) < tiles) __nanosleep(100);
  }
  __syncthreads();
  __threadfence();
}

extern "C" __global__ void __launch_bounds__(CHOOSE_THREADS) recall_choose(const __grid_constant__ RecallParams p) {
  extern __shared__ __align__(16) uint2 list[];
  __shared__ int bins[BINS], sums[3][WARP];
  __shared__ Found found[3];
  __shared__ bool last;
  release_next();
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = blockIdx.y;
  await_previous();
  const Far far(p);
  const int n = far.count(), words = (far.end + WARP - 1) / WARP;
  const bool all = p.k >= n;
  const uint32_t *weights = (const uint32_t *)p.weights + (int64_t)g * p.ctx;
  uint32_t *bitmap = p.bitmap + (int64_t)g * (p.ctx / WARP);
  uint2 *listed = p.listed + (int64_t)g * LISTED;
  int *histogram = p.histogram + g * 2 * BINS, *counters = p.counters + 8 * g + 2;
  if (!all) {
    const int2 two = __ldcg((const int2 *)histogram + (BINS / 2 - 1 - threadIdx.x));
    find(two.y, two.x, p.k, sums[0], found[0]);
  }
  uint32_t bin = all ? 0 : found[0].bin;
  const bool crowded = !all && __ldcg(histogram + bin) > LISTED;
  const int shift = crowded ? 9 : 20;
  if (crowded) {
    count_crowded(weights, words, bin, histogram + BINS, counters + 2, bins);
    const int2 two = __ldcg((const int2 *)(histogram + BINS) + (BINS / 2 - 1 - threadIdx.x));
    find(two.y, two.x, found[0].rest, sums[1], found[1]);
    bin = bin << 11 | found[1].bin;
  }
  // Eight words of the map at a time, so that their loads are in flight together.
  for (int word = (blockIdx.x * CHOOSE_WARPS + warp) * 8; word < words && n > 0; word += gridDim.x * CHOOSE_WARPS * 8) {
    uint32_t w[8], own = 0, in[8];
    int many = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) w[i] = word + i < words ? __ldcg(weights + (word + i) * WARP + lane) : NO_TOKEN;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const uint32_t upper = w[i] >> shift, above = __ballot_sync(~0u, w[i] != NO_TOKEN && (all || upper > bin));
      in[i] = __ballot_sync(~0u, !all && upper == bin);
      many += __popc(in[i]);
      if (lane == i) own = above;
    }
    if (lane < 8 && word + lane < words) bitmap[word + lane] = own;
    if (many == 0) continue;
    int place = lane == 0 ? atomicAdd(counters, many) : 0;
    place = __shfl_sync(~0u, place, 0);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int at = place + __popc(in[i] & ((1u << lane) - 1));
      if (in[i] >> lane & 1 && at < LISTED) listed[at] = make_uint2(w[i], (word + i) * WARP + lane);
      place += __popc(in[i]);
    }
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(counters + 1, 1) == (int)gridDim.x - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  uint32_t lowest = 0;
  if (!all) {
    const int many = __ldcg(counters);
    const bool fits = many <= LISTED;
    for (int i = threadIdx.x; i < many && fits; i += CHOOSE_THREADS) list[i] = __ldcg(listed + i);
    // Calls `f` with the weight and position of every token in the bin.
    auto each = [&](auto f) {
      if (fits) {
        for (int i = threadIdx.x; i < many; i += CHOOSE_THREADS) f(list[i].x, list[i].y);
      } else {
        for (int i = threadIdx.x; i < far.end; i += CHOOSE_THREADS) {
          const uint32_t w = __ldcg(weights + i);
          if (w != NO_TOKEN && w >> shift == bin) f(w, (uint32_t)i);
        }
      }
    };
    for (int i = threadIdx.x; i < BINS; i += CHOOSE_THREADS) bins[i] = histogram[i] = histogram[BINS + i] = 0;
    __syncthreads();
    const int two = 2 * (CHOOSE_THREADS - 1 - (int)threadIdx.x);
    if (!crowded) {
      each([&](uint32_t w, uint32_t) { atomicAdd(&bins[w >> 9 & 2047], 1); });
      __syncthreads();
      find(bins[two + 1], bins[two], found[0].rest, sums[1], found[1]);
    }
    for (int i = threadIdx.x; i < BINS; i += CHOOSE_THREADS) bins[i] = 0;
    __syncthreads();
    const uint32_t prefix = crowded ? bin : bin << 11 | found[1].bin;
    each([&](uint32_t w, uint32_t) {
      if (w >> 9 == prefix) atomicAdd(&bins[w & 511], 1);
    });
    __syncthreads();
    find(bins[two + 1], bins[two], found[1].rest, sums[2], found[2]);
    lowest = prefix << 9 | found[2].bin;
    const int wanted = found[2].rest, equal = bins[found[2].bin];
    // The position up to which equals are chosen: as many as are wanted, by halving.
    int until = far.end;
    if (wanted < equal) {
      int low = far.begin, high = far.end;  // fewer than wanted lie before low, enough before high
      while (high - low > 1) {
        const int middle = (low + high) / 2;
        __shared__ int before;
        if (threadIdx.x == 0) before = 0;
        __syncthreads();
        int own = 0;
        each([&](uint32_t w, uint32_t i) { own += w == lowest && (int)i < middle; });
        if (own) atomicAdd(&before, own);
        __syncthreads();
        if (before >= wanted) high = middle;
        else low = middle;
        __syncthreads();
      }
      until = high;
    }
    each([&](uint32_t w, uint32_t i) {
      if (w > lowest || (w == lowest && (int)i < until)) atomicOr(bitmap + i / WARP, 1u << (i % WARP));
    });
    __threadfence();
    __syncthreads();
  }
  // Places of the bits, in order: eight words of a thread at a time. A row of the map is a multiple of two words.
  int *chosen = p.chosen + (int64_t)g * p.k;
  __shared__ int whole[WARP];
  int *previous = p.previous && !far.stopped ? p.previous + (int64_t)g * (p.k + 1) : nullptr;
  if (previous) {
    int again = 0;
    for (int i = threadIdx.x; i < previous[p.k]; i += CHOOSE_THREADS) again += __ldcg(bitmap + previous[i] / WARP) >> (previous[i] % WARP) & 1;
    again = __reduce_add_sync(~0u, again);
    if (lane == 0 && again) atomicAdd(p.fetched + 1, (unsigned long long)again);
    __syncthreads();
  }
  int before = 0;
  for (int from = 0; from < words && n > 0; from += CHOOSE_THREADS * 8) {
    uint2 word[4];
    int count = 0;
    const int own = from + (int)threadIdx.x * 8;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      word[i] = own + 2 * i < words ? __ldcg((const uint2 *)(bitmap + own) + i) : make_uint2(0, 0);
      if (own + 2 * i + 1 >= words) word[i].y = 0;  // left of an earlier step
      count += __popc(word[i].x) + __popc(word[i].y);
    }
    __syncthreads();
    const int upto = sum_upto(count, whole);
    int place = before + upto - count;
#pragma unroll
    for (int i = 0; i < 8; i++)
      for (uint32_t left = i % 2 ? word[i / 2].y : word[i / 2].x; left; left &= left - 1)
        chosen[place++] = (own + i) * WARP + __ffs(left) - 1;
    for (int i = 0; i < CHOOSE_WARPS; i++) before += whole[i];
  }
  if (previous) {
    const int count = min(p.k, n);
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += CHOOSE_THREADS) previous[i] = chosen[i];
    if (threadIdx.x == 0) {
      previous[p.k] = count;
      atomicAdd(p.fetched, (unsigned long long)count);
    }
  }
  if (threadIdx.x == 0) {
    p.counts[g] = min(p.k, n);
    p.lowest[g] = log2f(__uint_as_float(lowest));
    counters[0] = counters[1] = counters[2] = counters[3] = 0;
  }
  if (all)
    for (int i = threadIdx.x; i < BINS; i += CHOOSE_THREADS) histogram[i] = 0;
}
