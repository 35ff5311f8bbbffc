// select: the tokens with the highest scores of each head, in order.
//
//   index[i, g] = s_i G + g, where s_0 < s_1 < .. are the `keep` tokens with the highest scores[g, :]; of equal scores the later ones.
//
// Shapes  scores f32 [G, N]; 1 <= keep <= N; index u32 [keep, G]: rows of [N, G, D] seen as [N G, D].
// Launch  grid G, 1024 threads.
//
// Radix selection: four passes find the lowest score that stays, eight bits at a time from the highest, each by a
// histogram of the scores that agree with the bits found so far. A last pass counts who stays before whom and writes:
// the same order whatever the scheduling. Bound by the latency of one thread block's passes over N, not by bandwidth;
// there is no host synchronisation.
#include "decode.cuh"

constexpr int THREADS = 1024, BINS = 256;

// Number of threads with the flag before this one, and in all. `counts` must differ from the previous call's.
__device__ inline int before(bool flag, int *counts, int &all) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const uint32_t votes = __ballot_sync(~0u, flag);
  if (lane == 0) counts[warp] = __popc(votes);
  __syncthreads();
  int sum = counts[lane];
  for (int d = 1; d < WARP; d *= 2) {
    const int other = __shfl_up_sync(~0u, sum, d);
    if (lane >= d) sum += other;
  }
  all = __shfl_sync(~0u, sum, WARP - 1);
  const int earlier = __shfl_sync(~0u, sum, max(warp - 1, 0));
  return (warp > 0 ? earlier : 0) + __popc(votes & ((1u << lane) - 1));
}

extern "C" __global__ void __launch_bounds__(THREADS) highest(const float *scores, uint32_t *index, int n, int keep, int heads) {
  __shared__ int bins[BINS], counts[2][WARP], found, rest;
  const float *own = scores + (int64_t)blockIdx.x * n;
  uint32_t lowest = 0;  // of the scores that stay, as far as its bits are known
  int left = keep;      // how many of those that agree with it stay
  for (int shift = 24; shift >= 0; shift -= 8) {
    if (threadIdx.x < BINS) bins[threadIdx.x] = 0;
    __syncthreads();
    const uint32_t known = shift == 24 ? 0u : ~0u << (shift + 8);
    for (int i = threadIdx.x; i < n; i += THREADS) {
      const uint32_t x = ordered(own[i]);
      if ((x & known) == lowest) atomicAdd(&bins[x >> shift & (BINS - 1)], 1);
    }
    __syncthreads();
    // The highest bin with `left` scores in it and above. Each lane of the first warp takes eight bins, from the top.
    if (threadIdx.x < WARP) {
      const int top = BINS - 1 - 8 * (int)threadIdx.x;
      int sum = 0;
      for (int j = 0; j < 8; j++) sum += bins[top - j];
      int upto = sum;
      for (int d = 1; d < WARP; d *= 2) {
        const int other = __shfl_up_sync(~0u, upto, d);
        if ((int)threadIdx.x >= d) upto += other;
      }
      int above = upto - sum;
      if (above < left && left <= upto) {
        int bin = top;
        while (above + bins[bin] < left) above += bins[bin--];
        found = bin;
        rest = left - above;
      }
    }
    __syncthreads();
    lowest |= (uint32_t)found << shift;
    left = rest;
  }
  // The first `skip` of the scores equal to the lowest are dropped.
  const int skip = bins[lowest & (BINS - 1)] - left;
  int written = 0, equals = 0;
  for (int from = 0; from < n; from += THREADS) {
    const int i = from + threadIdx.x;
    const uint32_t x = i < n ? ordered(own[i]) : 0;
    const bool equal = i < n && x == lowest;
    int here;
    const int rank = equals + before(equal, counts[0], here);
    equals += here;
    const bool stays = i < n && (x > lowest || (equal && rank >= skip));
    const int row = written + before(stays, counts[1], here);
    written += here;
    if (stays) index[(int64_t)row * heads + blockIdx.x] = i * heads + blockIdx.x;
  }
}
