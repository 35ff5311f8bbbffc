// recall_weigh, recall_choose: the k far tokens of each KV head with the largest weight over its heads.
//
//   w_i = sum_h exp(scores[h, i] - ln(1 + e^far_h)), far_h the log-sum-exp of all scores of head h, which are relative to
//   the near zone's;
//   chosen: the k largest in rising order, of equal weights the earlier tokens; all where there are no more than k.
//
// Launch  recall_weigh: grid (any, G), 512 threads; mass, weights and their histogram.
//         recall_choose: grid (any, G), 1024 threads; dynamic shared memory 8 LISTED bytes, and ctx / 8 more where
//         that fits: the map is then selected in shared memory. About as many blocks as multiprocessors for all KV
//         heads together.
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

__device__ inline uint32_t dynamic_shared() {
  uint32_t bytes;
  asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(bytes));
  return bytes;
}

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
  int bin, rest, count;  // the bin with the `left`-th highest, how many are wanted in it, and how many it has
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
    found.count = first ? upper : lower;
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
  uint32_t *map = (uint32_t *)(list + LISTED);  // the KV head's words of the bitmap, where they fit (`mapped`)
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
  int *histogram = p.histogram + g * 2 * BINS, *counters = p.counters + RECALL_COUNTERS * g + COUNTED;
  const int start = (blockIdx.x * CHOOSE_WARPS + warp) * 8;
  uint32_t w[8];
  // Eight words of the map at a time, so that their loads are in flight together; the first while the bin is searched.
  auto load = [&](int word) {
#pragma unroll
    for (int i = 0; i < 8; i++) w[i] = word + i < words ? __ldcg(weights + (word + i) * WARP + lane) : NO_TOKEN;
  };
  if (n > 0) load(start);
  if (!all) {
    const int2 two = __ldcg((const int2 *)histogram + (BINS / 2 - 1 - threadIdx.x));
    find(two.y, two.x, p.k, sums[0], found[0]);
  }
  uint32_t bin = all ? 0 : found[0].bin;
  const bool crowded = !all && found[0].count > LISTED;
  const int shift = crowded ? 9 : 20;
  if (crowded) {
    count_crowded(weights, words, bin, histogram + BINS, counters + 2, bins);
    const int2 two = __ldcg((const int2 *)(histogram + BINS) + (BINS / 2 - 1 - threadIdx.x));
    find(two.y, two.x, found[0].rest, sums[1], found[1]);
    bin = bin << 11 | found[1].bin;
  }
  for (int word = start; word < words && n > 0; word += gridDim.x * CHOOSE_WARPS * 8) {
    uint32_t own = 0, in[8];
    int many = 0;
    if (word != start) load(word);
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
  // One round of loads: the map, the length of the list and its first entries, which may be of an earlier step.
  const bool mapped = dynamic_shared() >= 8 * LISTED + p.ctx / 8;
  const int pairs = mapped ? (words + 1) / 2 : 0;
#pragma unroll 4
  for (int i = threadIdx.x; i < pairs; i += CHOOSE_THREADS) ((uint2 *)map)[i] = __ldcg((const uint2 *)bitmap + i);
  if (!all) {
    const uint2 early = __ldcg(listed + threadIdx.x);
    const int many = __ldcg(counters);
    const bool fits = many <= LISTED;
    if ((int)threadIdx.x < many && fits) list[threadIdx.x] = early;
    for (int i = threadIdx.x + CHOOSE_THREADS; i < many && fits; i += CHOOSE_THREADS) list[i] = __ldcg(listed + i);
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
      if (w > lowest || (w == lowest && (int)i < until)) atomicOr((mapped ? map : bitmap) + i / WARP, 1u << (i % WARP));
    });
    if (!mapped) __threadfence();
  }
  __syncthreads();
  // Places of the bits, in order: up to eight words of a thread at a time. A row of the map is a multiple of two words.
  // Neighbouring threads write places apart, so that they meet in shared memory first.
  int *chosen = p.chosen + (int64_t)g * p.k;
  const bool staged = p.k <= 2 * LISTED;
  int *places = staged ? (int *)list : chosen;
  __shared__ int whole[WARP];
  const int each = min(8, (words + 2 * CHOOSE_THREADS - 1) / (2 * CHOOSE_THREADS) * 2);
  int before = 0;
  for (int from = 0; from < words && n > 0; from += CHOOSE_THREADS * each) {
    uint2 word[4];
    int count = 0;
    const int own = from + (int)threadIdx.x * each;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      word[i] = make_uint2(0, 0);
      if (2 * i < each && own + 2 * i < words) {
        word[i] = mapped ? ((const uint2 *)(map + own))[i] : __ldcg((const uint2 *)(bitmap + own) + i);
        if (mapped && !all) ((uint2 *)(bitmap + own))[i] = word[i];
      }
      if (own + 2 * i + 1 >= words) word[i].y = 0;  // left of an earlier step
      count += __popc(word[i].x) + __popc(word[i].y);
    }
    __syncthreads();
    const int upto = sum_upto(count, whole);
    int place = before + upto - count;
#pragma unroll
    for (int i = 0; i < 8; i++)
      for (uint32_t left = i % 2 ? word[i / 2].y : word[i / 2].x; left; left &= left - 1)
        places[place++] = (own + i) * WARP + __ffs(left) - 1;
    if (from + CHOOSE_THREADS * each < words)
      for (int i = 0; i < CHOOSE_WARPS; i++) before += whole[i];
  }
  __syncthreads();
  if (staged)
    for (int i = threadIdx.x; i < min(p.k, n); i += CHOOSE_THREADS) chosen[i] = places[i];
  if (threadIdx.x == 0) {
    p.counts[g] = min(p.k, n);
    p.lowest[g] = log2f(__uint_as_float(lowest));
    counters[0] = counters[1] = counters[2] = counters[3] = 0;
  }
  if (all)
    for (int i = threadIdx.x; i < BINS; i += CHOOSE_THREADS) histogram[i] = 0;
}
