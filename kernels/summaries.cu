// summaries: sums and means of blocks of keys and values, in f32.
//
//   mean[n] = (1 / count) sum of x[p] over the positions p >= S of block n, for every block that ends inside the chunk;
//   the block in progress keeps its sum and count in `running` for the next chunk.
//
// Shapes  k, v [T, W] with W = G D and their own row strides; mean_k, mean_v [blocks finished, W]; running f32 [2, W], keys
//         then values.
// Launch  finish: grid (blocks finished, ceil(W / 128), 2), 128 threads; reads `running` for the first block.
//         carry: grid (ceil(W / 128), 2), 128 threads; afterwards, since it overwrites `running`.
// One thread owns a column, so sums run in the order of the positions whatever the chunks: the same means bit for bit.
#include "common.cuh"

struct SummaryParams {
  const void *k, *v;
  void *mean_k, *mean_v;
  float *running;
  int64_t k_row, v_row;
  int tokens, start, block, sinks, width;
};

// Adds positions [from, to) of column `c`.
template <typename T> __device__ inline float sum(const T *x, int64_t row, int c, int from, int to, const SummaryParams &p, float s) {
  from = max(from, p.sinks);
#pragma unroll 8
  for (int i = from; i < to; i++) s += to_float(x[(i - p.start) * row + c]);
  return s;
}

template <typename T> __device__ void finish(const SummaryParams &p) {
  const int c = blockIdx.y * blockDim.x + threadIdx.x;
  if (c >= p.width) return;
  const bool values = blockIdx.z == 1;
  const int first = p.start / p.block, n = first + blockIdx.x;
  const T *x = (const T *)(values ? p.v : p.k);
  const int end = (n + 1) * p.block, count = max(1, end - max(n * p.block, p.sinks));
  float s = n == first ? p.running[(values ? p.width : 0) + c] : 0.f;
  s = sum(x, values ? p.v_row : p.k_row, c, max(n * p.block, p.start), end, p, s);
  ((T *)(values ? p.mean_v : p.mean_k))[(int64_t)blockIdx.x * p.width + c] = from_float<T>(s / count);
}

template <typename T> __device__ void carry(const SummaryParams &p) {
  const int c = blockIdx.x * blockDim.x + threadIdx.x;
  if (c >= p.width) return;
  const bool values = blockIdx.y == 1;
  const int end = p.start + p.tokens, begin = end / p.block * p.block;
  float *running = p.running + (values ? p.width : 0) + c;
  // The block in progress began before this chunk, or in it.
  const float s = begin <= p.start && p.start % p.block != 0 ? *running : 0.f;
  *running = sum((const T *)(values ? p.v : p.k), values ? p.v_row : p.k_row, c, max(begin, p.start), end, p, s);
}

#define INSTANCE(NAME, T)                                                                          \
  extern "C" __global__ void finish_##NAME(const __grid_constant__ SummaryParams p) { finish<T>(p); } \
  extern "C" __global__ void carry_##NAME(const __grid_constant__ SummaryParams p) { carry<T>(p); }
INSTANCE(f32, float)
INSTANCE(bf16, __nv_bfloat16)
INSTANCE(f16, __half)
