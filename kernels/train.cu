// Pointwise operators of training, bf16 activations, f32 statistics and gradients of norms' weights.
//
//   norm_forward    y = x r w, r = 1 / sqrt(mean(x^2) + eps); x = a + b where b is given, and then written too
//   norm_backward   dx = r (g - x r^2 mean(g x)) + add, g = dy w; dw partial sums, one row of [blocks, N] a block
//   gated_forward   silu(gate) up of rows [2 I]; gated_backward
//   cross_entropy   losses and the gradient of logits [T, 256], a warp a row
//   one_hot         rows [256] of symbols
//
// Launch  256 threads: norm_forward, cross_entropy and one_hot a warp a row; norm_backward any grid, 32 N bytes of dynamic
//         shared memory; gated_* any grid; sum_partials ceil(N / 256). N and I multiples of 8, N at most 1,024, 16-byte rows.
#include "common.cuh"
using T = __nv_bfloat16;
constexpr int THREADS = 256, HELD = 4;  // units of 8 elements a lane holds: N up to 32 * 8 * HELD

struct Eight {
  float x[8];
  __device__ void load(const T *p) {
    const uint4 v = *(const uint4 *)p;
    const uint32_t w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 two = unpack<T>(w[i]);
      x[2 * i] = two.x, x[2 * i + 1] = two.y;
    }
  }
  __device__ void store(T *p) const {
    *(uint4 *)p = make_uint4(pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(x[4], x[5]), pack<T>(x[6], x[7]));
  }
};

extern "C" __global__ void __launch_bounds__(THREADS) norm_forward(const T *a, const T *b, const float *w, T *sum, T *y, float *r,
                                                                   int n, int rows, float eps) {
  const int lane = threadIdx.x % WARP, row = blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP;
  if (row >= rows) return;
  Eight x[HELD];
  float squares = 0.f;
#pragma unroll
  for (int j = 0; j < HELD; j++) {
    const int c = (j * WARP + lane) * 8;
    if (c >= n) break;
    x[j].load(a + (int64_t)row * n + c);
    if (b) {
      Eight other;
      other.load(b + (int64_t)row * n + c);
#pragma unroll
      for (int e = 0; e < 8; e++) x[j].x[e] = __bfloat162float(__float2bfloat16_rn(x[j].x[e] + other.x[e]));
      x[j].store(sum + (int64_t)row * n + c);
    }
#pragma unroll
    for (int e = 0; e < 8; e++) squares += x[j].x[e] * x[j].x[e];
  }
  const float own = rsqrtf(warp_sum(squares) / n + eps);
  if (lane == 0) r[row] = own;
#pragma unroll
  for (int j = 0; j < HELD; j++) {
    const int c = (j * WARP + lane) * 8;
    if (c >= n) break;
    Eight out;
#pragma unroll
    for (int e = 0; e < 8; e++) out.x[e] = x[j].x[e] * own * w[c + e];
    out.store(y + (int64_t)row * n + c);
  }
}

// A block's rows: blockIdx.x, + gridDim.x ..; `partial [gridDim.x, n]`.
extern "C" __global__ void __launch_bounds__(THREADS) norm_backward(const T *x, const float *w, const float *r, const T *dy,
                                                                    const T *add, T *dx, float *partial, int n, int rows) {
  extern __shared__ float sums[];  // [warps][n]
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = THREADS / WARP;
  float dw[HELD][8] = {};
  for (int row = blockIdx.x * warps + warp; row < rows; row += gridDim.x * warps) {
    Eight xs[HELD], g[HELD];
    const float own = r[row];
    float dot = 0.f;
#pragma unroll
    for (int j = 0; j < HELD; j++) {
      const int c = (j * WARP + lane) * 8;
      if (c >= n) break;
      xs[j].load(x + (int64_t)row * n + c), g[j].load(dy + (int64_t)row * n + c);
#pragma unroll
      for (int e = 0; e < 8; e++) {
        dw[j][e] += g[j].x[e] * xs[j].x[e] * own;
        g[j].x[e] *= w[c + e];
        dot += g[j].x[e] * xs[j].x[e];
      }
    }
    const float mean = warp_sum(dot) * own * own / n;
#pragma unroll
    for (int j = 0; j < HELD; j++) {
      const int c = (j * WARP + lane) * 8;
      if (c >= n) break;
      Eight out = {};
      if (add) out.load(add + (int64_t)row * n + c);
#pragma unroll
      for (int e = 0; e < 8; e++) out.x[e] += own * (g[j].x[e] - xs[j].x[e] * mean);
      out.store(dx + (int64_t)row * n + c);
    }
  }
#pragma unroll
  for (int j = 0; j < HELD; j++) {
    const int c = (j * WARP + lane) * 8;
    if (c < n)
#pragma unroll
      for (int e = 0; e < 8; e++) sums[warp * n + c + e] = dw[j][e];
  }
  __syncthreads();
  for (int c = threadIdx.x; c < n; c += THREADS) {
    float all = 0.f;
    for (int i = 0; i < warps; i++) all += sums[i * n + c];
    partial[(int64_t)blockIdx.x * n + c] = all;
  }
}

// Column sums of `partial [blocks, n]`, in order.
extern "C" __global__ void __launch_bounds__(THREADS) sum_partials(const float *partial, float *to, int n, int blocks) {
  const int c = blockIdx.x * THREADS + threadIdx.x;
  if (c >= n) return;
  float all = 0.f;
  for (int i = 0; i < blocks; i++) all += partial[(int64_t)i * n + c];
  to[c] = all;
}

extern "C" __global__ void __launch_bounds__(THREADS) gated_forward(const T *both, T *to, int width, int64_t count) {
  for (int64_t i = blockIdx.x * (int64_t)THREADS + threadIdx.x; i < count / 8; i += gridDim.x * (int64_t)THREADS) {
    const int64_t row = i * 8 / width;
    const T *at = both + row * 2 * width + i * 8 % width;
    Eight gate, up;
    gate.load(at), up.load(at + width);
#pragma unroll
    for (int e = 0; e < 8; e++) up.x[e] *= gate.x[e] / (1.f + __expf(-gate.x[e]));
    up.store(to + i * 8);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) gated_backward(const T *both, const T *grad, T *to, int width, int64_t count) {
  for (int64_t i = blockIdx.x * (int64_t)THREADS + threadIdx.x; i < count / 8; i += gridDim.x * (int64_t)THREADS) {
    const int64_t at = i * 8 / width * 2 * width + i * 8 % width;
    Eight gate, up, g;
    gate.load(both + at), up.load(both + at + width), g.load(grad + i * 8);
#pragma unroll
    for (int e = 0; e < 8; e++) {
      const float sigmoid = 1.f / (1.f + __expf(-gate.x[e])), d = g.x[e];
      const float d_up = d * gate.x[e] * sigmoid;
      gate.x[e] = d * up.x[e] * sigmoid * (1.f + gate.x[e] * (1.f - sigmoid));
      up.x[e] = d_up;
    }
    gate.store(to + at), up.store(to + at + width);
  }
}

// A warp a row of 256 logits. A target of 0xffffffff counts for nothing.
extern "C" __global__ void __launch_bounds__(THREADS) cross_entropy_256(const T *logits, const uint32_t *targets, float *losses,
                                                                        T *grad, int rows, float scale) {
  const int lane = threadIdx.x % WARP, row = blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP;
  if (row >= rows) return;
  const uint32_t target = targets[row];
  Eight z;
  z.load(logits + (int64_t)row * 256 + lane * 8);
  float top = -INFINITY, sum = 0.f, own = 0.f;
#pragma unroll
  for (int e = 0; e < 8; e++) top = fmaxf(top, z.x[e]);
  for (int d = 16; d > 0; d >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
#pragma unroll
  for (int e = 0; e < 8; e++) {
    if (target == lane * 8 + e) own = z.x[e];
    sum += z.x[e] = __expf(z.x[e] - top);
  }
  sum = warp_sum(sum), own = warp_sum(own);
  const bool counts = target != 0xffffffffu;
#pragma unroll
  for (int e = 0; e < 8; e++) z.x[e] = counts ? scale * (z.x[e] / sum - (target == lane * 8 + e ? 1.f : 0.f)) : 0.f;
  if (grad) z.store(grad + (int64_t)row * 256 + lane * 8);
  if (lane == 0) losses[row] = counts ? logf(sum) + top - own : 0.f;
}

// Rows of 256 with a one at the symbol read: the gradient of the embedding is their product with the gradient of its output.
extern "C" __global__ void __launch_bounds__(THREADS) one_hot_256(const uint32_t *symbols, T *to, int rows) {
  const int lane = threadIdx.x % WARP, row = blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP;
  if (row >= rows) return;
  Eight z;
#pragma unroll
  for (int e = 0; e < 8; e++) z.x[e] = symbols[row] == lane * 8 + e ? 1.f : 0.f;
  z.store(to + (int64_t)row * 256 + lane * 8);
}
