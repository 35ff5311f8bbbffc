// recall_choose: the k far tokens of each KV head with the largest weight over its heads.
//
//   w_i = sum_h exp(scores[h, i] - ln(e^near_h + e^far_h)), far_h the log-sum-exp of all scores of head h;
//   chosen: the k largest in rising order, of equal weights the earlier tokens; all where there are no more than k.
//
// Launch  grid (CLUSTER, G), 1024 threads, dynamic shared memory 4 `cached` bytes. `cached` a multiple of 8, at most
//         51200; weights beyond it go to `weights` in memory. Sixteen blocks to a cluster take three times as long: not all
//         clusters fit at once.
//
// Radix selection on the bits of f32 weights, which are in the order of the weights as none is negative: 11, 11 and 9 bits.
// The blocks of a cluster split the tokens; each sums all histograms through distributed shared memory, in the same
// way, so that all find the same bin behind one barrier. Two passes of votes then give every chosen token its place:
// the result does not depend on scheduling.
#include "recall.cuh"
#include <cooperative_groups.h>
namespace cg = cooperative_groups;

constexpr int CHOOSE_THREADS = 1024, CHOOSE_WARPS = CHOOSE_THREADS / WARP, BINS = 2048;
constexpr uint32_t NO_TOKEN = 0xffffffffu;

struct Choice {
  int bins[3][BINS];
  int2 sums[2][CHOOSE_WARPS];
  int above[CHOOSE_WARPS], equal[CHOOSE_WARPS];
  int found[3], rest[3], above_before[3], equal_before;
  float base[RECALL_HEADS];
};

template <int CLUSTER> struct Choose {
  const RecallParams &p;
  Choice &s;
  uint32_t *cache, *spilt;
  cg::cluster_group cluster;
  const int lane, warp, rank, g, group;
  int from, count;  // this block's tokens
  Far far;

  __device__ Choose(const RecallParams &params, Choice &state, uint32_t *shared)
      : p(params), s(state), cache(shared), cluster(cg::this_cluster()), lane(threadIdx.x % WARP), warp(threadIdx.x / WARP),
        rank(cluster.block_rank()), g(blockIdx.y), group(params.heads / params.kv_heads), far(params) {
    // Whole rounds of a block's votes.
    const int each = ((far.end + CLUSTER - 1) / CLUSTER + CHOOSE_THREADS - 1) / CHOOSE_THREADS * CHOOSE_THREADS;
    from = min(rank * each, p.ctx);
    count = max(0, min(each, (far.end + WARP - 1) / WARP * WARP - from));
    spilt = (uint32_t *)p.weights + (int64_t)g * p.ctx + from;
  }

  __device__ uint32_t weight(int i) const { return i < p.cached ? cache[i] : spilt[i]; }

  // log2(e^near + e^far) of each head.
  __device__ void bases() {
    if (warp >= group) return;
    const int h = g * group + warp;
    const float2 *slices = p.slices + (int64_t)h * p.slice_count;
    float top = -1e30f, sum = 0.f;
    for (int i = lane; i < p.slice_count; i += WARP) top = fmaxf(top, slices[i].x);
    for (int d = 16; d > 0; d >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
    for (int i = lane; i < p.slice_count; i += WARP) sum += slices[i].y * exp2f(slices[i].x - top);
    sum = warp_sum(sum);
    const float all = top + log2f(sum), near = p.near_lse[h] * LOG2E, most = fmaxf(all, near);
    const float base = most + log2f(exp2f(all - most) + exp2f(near - most));
    if (lane == 0) s.base[warp] = base;
    if (lane == 0 && rank == 0) p.mass[h] = base;
  }

  __device__ void weigh() {
    for (int i = threadIdx.x * 8; i < count; i += CHOOSE_THREADS * 8) {
      float w[8] = {};
      for (int h = 0; h < group; h++) {
        const uint4 x = __ldcg((const uint4 *)(p.scores + (int64_t)(g * group + h) * p.ctx + from + i));
        const float base = s.base[h];
        const uint32_t part[4] = {x.x, x.y, x.z, x.w};
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
        const int token = from + i + j;
        // No weight is negative; what is not a number (a query that is none) counts as nothing.
        bits[j] = token < far.begin || token >= far.end ? NO_TOKEN : w[j] >= 0.f ? __float_as_uint(w[j]) : 0u;
        if (bits[j] != NO_TOKEN) atomicAdd(&s.bins[0][bits[j] >> 20], 1);
      }
      uint4 *to = (uint4 *)((i < p.cached ? cache : spilt) + i);
      to[0] = make_uint4(bits[0], bits[1], bits[2], bits[3]);
      to[1] = make_uint4(bits[4], bits[5], bits[6], bits[7]);
    }
  }

  // The bin of histogram `pass` that holds the `left`-th highest weight of the cluster, how many are wanted in it, and how many
  // weights of the blocks before this one lie above it and in it.
  __device__ void find(int pass, int left) {
    const int high = BINS - 1 - 2 * (int)threadIdx.x;  // this thread's two bins: the first thread has the highest
    int2 upper = make_int2(0, 0), lower = make_int2(0, 0);  // x: of all blocks; y: of those before this one
#pragma unroll
    for (int r = 0; r < CLUSTER; r++) {
      const int2 two = *(const int2 *)cluster.map_shared_rank(&s.bins[pass][high - 1], r);
      lower.x += two.x;
      upper.x += two.y;
      if (r < rank) lower.y += two.x, upper.y += two.y;
    }
    int2 upto = make_int2(upper.x + lower.x, upper.y + lower.y);
    for (int d = 1; d < WARP; d *= 2) {
      const int x = __shfl_up_sync(~0u, upto.x, d), y = __shfl_up_sync(~0u, upto.y, d);
      if (lane >= d) upto.x += x, upto.y += y;
    }
    if (lane == WARP - 1) s.sums[pass % 2][warp] = upto;
    __syncthreads();
    int2 before = s.sums[pass % 2][lane];
    for (int d = 1; d < WARP; d *= 2) {
      const int x = __shfl_up_sync(~0u, before.x, d), y = __shfl_up_sync(~0u, before.y, d);
      if (lane >= d) before.x += x, before.y += y;
    }
    before.x = __shfl_sync(~0u, before.x, max(warp - 1, 0));
    before.y = __shfl_sync(~0u, before.y, max(warp - 1, 0));
    if (warp > 0) upto.x += before.x, upto.y += before.y;
    const int above = upto.x - upper.x - lower.x;
    if (above < left && left <= upto.x) {
      const bool first = left <= above + upper.x;
      s.found[pass] = first ? high : high - 1;
      s.rest[pass] = left - above - (first ? 0 : upper.x);
      s.above_before[pass] = upto.y - lower.y - (first ? upper.y : 0);
      s.equal_before = first ? upper.y : lower.y;
    }
    __syncthreads();
  }

  __device__ void run() {
    const int n = far.count();
    if (n == 0) {
      if (rank == 0 && threadIdx.x == 0) {
        p.counts[g] = 0;
        p.lowest[g] = -INFINITY;
      }
      return;
    }
    for (int i = threadIdx.x; i < 3 * BINS; i += CHOOSE_THREADS) (&s.bins[0][0])[i] = 0;
    bases();
    __syncthreads();
    weigh();
    uint32_t lowest = 0;
    int wanted = n;  // of those equal to the lowest
    // Chosen tokens, and those equal to the lowest, of the blocks before this one.
    int above_before = 0, equal_before = 0;
    if (p.k < n) {
      cluster.sync();
      find(0, p.k);
      const uint32_t first = s.found[0];
      for (int i = threadIdx.x; i < count; i += CHOOSE_THREADS) {
        const uint32_t w = weight(i);
        if (w >> 20 == first) atomicAdd(&s.bins[1][w >> 9 & (BINS - 1)], 1);
      }
      cluster.sync();
      find(1, s.rest[0]);
      const uint32_t second = first << 11 | s.found[1];
      for (int i = threadIdx.x; i < count; i += CHOOSE_THREADS) {
        const uint32_t w = weight(i);
        if (w >> 9 == second) atomicAdd(&s.bins[2][w & 511], 1);
      }
      cluster.sync();
      find(2, s.rest[1]);
      cluster.barrier_arrive();  // no block ends while another may read its histograms
      lowest = second << 9 | s.found[2];
      wanted = s.rest[2];
      above_before = s.above_before[0] + s.above_before[1] + s.above_before[2];
      equal_before = s.equal_before;
    } else {
      __syncthreads();
      // All are chosen; all count as equals, which the places below take in.
      equal_before = max(from - far.begin, 0);
    }
    // Above the lowest weight, and equal to it.
    auto is_above = [&](uint32_t w) { return p.k < n && w != NO_TOKEN && w > lowest; };
    auto is_equal = [&](uint32_t w) { return p.k < n ? w == lowest : w != NO_TOKEN; };
    // Each warp counts its own run of tokens.
    const int each = (count / WARP + CHOOSE_WARPS - 1) / CHOOSE_WARPS * WARP;
    const int start = min(warp * each, count), stop = min(start + each, count);
    int above = 0, equal = 0;
    for (int i = start + lane; i < stop; i += WARP) {
      const uint32_t w = weight(i);
      above += __popc(__ballot_sync(~0u, is_above(w)));
      equal += __popc(__ballot_sync(~0u, is_equal(w)));
    }
    if (lane == 0) s.above[warp] = above, s.equal[warp] = equal;
    __syncthreads();
    auto before = [&](const int *sums) {
      int sum = sums[lane];
      for (int d = 1; d < WARP; d *= 2) {
        const int other = __shfl_up_sync(~0u, sum, d);
        if (lane >= d) sum += other;
      }
      const int earlier = __shfl_sync(~0u, sum, max(warp - 1, 0));
      return warp > 0 ? earlier : 0;
    };
    above_before += before(s.above);
    equal_before += before(s.equal);
    int *chosen = p.chosen + (int64_t)g * p.k;
    uint32_t *bitmap = p.bitmap + (int64_t)g * (p.ctx / WARP) + from / WARP;
    const uint32_t earlier = (1u << lane) - 1;
    for (int i = start + lane; i < stop; i += WARP) {
      const uint32_t w = weight(i);
      const uint32_t equals = __ballot_sync(~0u, is_equal(w)), aboves = __ballot_sync(~0u, is_above(w));
      const bool stays = is_above(w) || (is_equal(w) && equal_before + __popc(equals & earlier) < wanted);
      const uint32_t votes = __ballot_sync(~0u, stays);
      if (stays) chosen[above_before + min(equal_before, wanted) + __popc(votes & earlier)] = from + i;
      if (lane == 0) bitmap[i / WARP] = votes;
      above_before += __popc(aboves);
      equal_before += __popc(equals);
    }
    if (rank == 0 && threadIdx.x == 0) {
      p.counts[g] = min(p.k, n);
      p.lowest[g] = log2f(__uint_as_float(lowest));
    }
    if (p.k < n) cluster.barrier_wait();
  }
};

#define INSTANCE(CLUSTER)                                                                                                   \
  extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(CHOOSE_THREADS)                             \
      recall_choose_##CLUSTER(const __grid_constant__ RecallParams p) {                                                     \
    extern __shared__ __align__(16) uint32_t shared[];                                                                      \
    __shared__ __align__(16) Choice state;                                                                                  \
    release_next();                                                                                                         \
    await_previous();                                                                                                       \
    Choose<CLUSTER> choose(p, state, shared);                                                                               \
    choose.run();                                                                                                           \
  }
#if __CUDA_ARCH__ >= 900 || !defined(__CUDA_ARCH__)
INSTANCE(8)
#endif
