// attention_merge: adds attention over more keys to a running sum over disjoint keys, in place.
//
//   out = (e^lse out + e^part_lse part) / (e^lse + e^part_lse);  lse = ln(e^lse + e^part_lse).
//
// Shapes  out f32, part of the kernel's type [rows, D], contiguous; lse, part_lse f32 [rows]; a row is a query of a head.
// Launch  grid ceil(rows / 8), 256 threads: a warp per row. Bound by memory: 8 D bytes of out and the part's.
#include "common.cuh"

template <typename T> __device__ void merge(float *out, float *lse, const T *part, const float *part_lse, int64_t rows, int dim) {
  const int64_t row = (int64_t)blockIdx.x * 8 + threadIdx.x / WARP;
  if (row >= rows) return;
  const int lane = threadIdx.x % WARP;
  const float a = lse[row], b = part_lse[row], top = fmaxf(a, b);
  __syncwarp();
  if (b == -INFINITY) return;
  const float own = expf(a - top), other = expf(b - top), all = own + other;
  float *o = out + row * dim;
  const T *p = part + row * dim;
  for (int c = lane; c < dim; c += WARP) o[c] = (a == -INFINITY ? 0.f : o[c] * (own / all)) + to_float(p[c]) * (other / all);
  if (lane == 0) lse[row] = top + logf(all);
}

#define INSTANCE(NAME, T)                                                                                                  \
  extern "C" __global__ void __launch_bounds__(256)                                                                        \
      attention_merge_##NAME(float *out, float *lse, const T *part, const float *part_lse, int64_t rows, int dim) {        \
    merge<T>(out, lse, part, part_lse, rows, dim);                                                                         \
  }
INSTANCE(f32, float)
INSTANCE(bf16, __nv_bfloat16)
INSTANCE(f16, __half)
