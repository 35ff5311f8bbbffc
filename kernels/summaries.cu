// summaries: sums and means of blocks of keys and values, in f32.
//
//   mean[n] = (1 / count) sum of x[p] over the positions p >= S of block n, for every block that ends inside the chunk;
//   the block in progress keeps its sum and count in `running` for the next chunk.
//
// Shapes  k, v [T, W] with W = G D and their own row strides; mean_k, mean_v [blocks finished, W]; running f32 [2, W], keys
//         then values.
// Launch  pool: grid (max(1, blocks finished), ceil(W / 128), 2), 128 threads. The first thread block of a column reads `running`
//         for the block that it finishes, then overwrites it with the block in progress.
// One thread owns a column of a block, so sums run in the order of the positions whatever the chunks: the same means
// bit for bit.
#include "common.cuh"

struct SummaryParams {
  const void *k, *v;
  void *mean_k, *mean_v;
  float *running;
  int64_t k_row, v_row;
  int tokens, start, block, sinks, width;
};
MIRRORED(SummaryParams, 80);
FIELD(SummaryParams, k, 0); FIELD(SummaryParams, v, 8); FIELD(SummaryParams, mean_k, 16);
FIELD(SummaryParams, mean_v, 24); FIELD(SummaryParams, running, 32); FIELD(SummaryParams, k_row, 40);
FIELD(SummaryParams, v_row, 48); FIELD(SummaryParams, tokens, 56); FIELD(SummaryParams, start, 60);
FIELD(SummaryParams, block, 64); FIELD(SummaryParams, sinks, 68); FIELD(SummaryParams, width, 72);

// Adds positions [from, to) of column `c`.
template <typename T> __device__ inline float sum(const T *x, int64_t row, int c, int from, int to, const SummaryParams &p, float s) {
  from = max(from, p.sinks);
#pragma unroll 8
  for (int i = from; i < to; i++) s += to_float(x[(i - p.start) * row + c]);
  return s;
}

template <typename T> __device__ void pool(const SummaryParams &p) {
  const int c = blockIdx.y * blockDim.x + threadIdx.x;
  if (c >= p.width) return;
  const bool values = blockIdx.z == 1;
  const T *x = (const T *)(values ? p.v : p.k);
  const int64_t row = values ? p.v_row : p.k_row;
  const int first = p.start / p.block, end = p.start + p.tokens, n = first + blockIdx.x;
  float *running = p.running + (values ? p.width : 0) + c;
  // Of the block that began before this chunk, if one did.
  const float before = p.start % p.block != 0 ? *running : 0.f;
  if ((n + 1) * p.block <= end) {
    const int count = max(1, (n + 1) * p.block - max(n * p.block, p.sinks));
    const float s = sum(x, row, c, max(n * p.block, p.start), (n + 1) * p.block, p, n == first ? before : 0.f);
    ((T *)(values ? p.mean_v : p.mean_k))[(int64_t)blockIdx.x * p.width + c] = from_float<T>(s / count);
  }
  if (blockIdx.x > 0) return;
  const int begin = end / p.block * p.block;
  *running = sum(x, row, c, max(begin, p.start), end, p, begin <= p.start ? before : 0.f);
}

#define INSTANCE(NAME, T) \
  extern "C" __global__ void pool_##NAME(const __grid_constant__ SummaryParams p) { pool<T>(p); }
INSTANCE(f32, float)
INSTANCE(bf16, __nv_bfloat16)
INSTANCE(f16, __half)
