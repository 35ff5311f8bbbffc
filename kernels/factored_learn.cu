// Learning of products of butterflies and permutations (src/transforms): gradients of many products at once, and Adam.
//
// A product is a row of parameters, its modules in order of application: butterflies `[pair, 4, C]` a factor, logits
// `[level, 3]`; C is 2 where factors are complex. src/ops/factored/tile.rs has the formulas and the CPU's loops.
//
//   factored_gradient_{real,complex}   gradient of half the sum of squared errors, and that sum, over some vectors
//   factored_adam                      one step of Adam on every product; keeps the best parameters of a fit
//
// Launch  gradient: grid (slices, products), max(32, N / 2) threads, `gradient_shared` bytes. A thread has one pair of
//         each factor and keeps what it read there; tied gradients are summed over a block in a fixed order.
//         adam: grid (any, products), 256 threads.
#include "common.cuh"
#include <curand_kernel.h>

constexpr int MODULES = 4, KEPT = 80;
enum Kind { BUTTERFLY = 0, RELAXED = 1, PERMUTATION = 2 };

struct Program {
  int n, levels, modules, tied;
  int kinds[MODULES];
  int at[MODULES];      // a module's parameters in the row
  int index[MODULES];   // a permutation's place among permutations
  int stride;           // floats of a row of parameters
  int permutations;     // of a product
};
MIRRORED(Program, 72);
FIELD(Program, kinds, 16);
FIELD(Program, at, 32);
FIELD(Program, index, 48);
FIELD(Program, stride, 64);

// Vectors that products are compared on.
struct Vectors {
  const float *input, *target;  // [rows, C, N]
  const int *rows;              // [products, count]: those of a product
  int count;
  int real;                     // whether imaginary parts of results do not count
};
MIRRORED(Vectors, 32);
FIELD(Vectors, rows, 16);
FIELD(Vectors, count, 24);

__device__ inline float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }
__device__ inline int even_odd(int block, int j) { return j < block / 2 ? 2 * j : 2 * (j - block / 2) + 1; }
__device__ inline int even_odd_inverse(int block, int j) { return (j & 1) * (block / 2) + j / 2; }
__device__ inline int reversed(int block, int j) {
  const int half = block / 2;
  return j < half ? half - 1 - j : block + half - 1 - j;
}

// The sum of `x` over a block, in thread 0; `red` has a float a warp.
__device__ inline float block_sum(float x, float *red) {
  const int warps = blockDim.x / WARP;
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % WARP == 0) red[threadIdx.x / WARP] = x;
  __syncthreads();
  float all = 0.f;
  if (threadIdx.x == 0)
    for (int i = 0; i < warps; i++) all += red[i];
  return all;
}

// A factor's 2 x 2 matrices `w [pair, 4, C]`.
template <int C> struct Weights {
  float w[4 * C];
  __device__ void load(const float *p) {
#pragma unroll
    for (int i = 0; i < C; i++) {
      const float4 v = ((const float4 *)p)[i];
      w[4 * i] = v.x, w[4 * i + 1] = v.y, w[4 * i + 2] = v.z, w[4 * i + 3] = v.w;
    }
  }
};

template <int C>
__device__ void gradient(const Program &p, const float *all, const uint16_t *indices, const Vectors &v, float *partial,
                         float *errors) {
  extern __shared__ float shared[];
  const int n = p.n, half_n = n / 2, q = threadIdx.x, slice = blockIdx.x, product = blockIdx.y, slices = gridDim.x;
  const bool active = q < half_n;
  float *x = shared;                        // [C][n]
  float *red = x + C * n;                   // [2][4 C][n / 2]
  float *small = red + 2 * 4 * C * half_n;  // [32]
  const float *w = all + (int64_t)product * p.stride;
  const uint16_t *index = indices + (int64_t)product * p.permutations * n;
  float *mine = partial + ((int64_t)product * slices + slice) * p.stride;
  // Gradients of one pair a block stay in device memory, where a thread alone adds to them.
  float *g = p.tied ? small + 32 : mine;
  for (int i = q; i < p.stride; i += blockDim.x) g[i] = 0.f;
  float sum = 0.f;
  float kept[KEPT][2 * C];
  int buffer = 0;
  __syncthreads();
  for (int c = slice; c < v.count; c += slices) {
    const int64_t row = v.rows[(int64_t)product * v.count + c];
    for (int i = q; i < C * n; i += blockDim.x) x[i] = v.input[row * C * n + i];
    __syncthreads();
    int stage = 0;
    for (int m = 0; m < p.modules; m++) {
      if (p.kinds[m] == BUTTERFLY) {
        const float *f = w + p.at[m];
        for (int level = 0; level < p.levels; level++) {
          const int half = 1 << level, j = q & (half - 1), i = 2 * q - j, k = i + half;
          if (active) {
            Weights<C> d;
            d.load(f + (p.tied ? j : q) * 4 * C);
            float own[2 * C];
#pragma unroll
            for (int e = 0; e < C; e++) own[e] = x[e * n + i], own[C + e] = x[e * n + k];
#pragma unroll
            for (int e = 0; e < 2 * C; e++) kept[stage][e] = own[e];
            if (C == 1) {
              x[i] = d.w[0] * own[0] + d.w[1] * own[1];
              x[k] = d.w[2] * own[0] + d.w[3] * own[1];
            } else {
              const float ar = own[0], ai = own[1], br = own[C], bi = own[C + 1 < 2 * C ? C + 1 : 0];
              x[i] = d.w[0] * ar - d.w[1] * ai + d.w[2] * br - d.w[3] * bi;
              x[n + i] = d.w[0] * ai + d.w[1] * ar + d.w[2] * bi + d.w[3] * br;
              x[k] = d.w[4 % (4 * C)] * ar - d.w[5 % (4 * C)] * ai + d.w[6 % (4 * C)] * br - d.w[7 % (4 * C)] * bi;
              x[n + k] = d.w[4 % (4 * C)] * ai + d.w[5 % (4 * C)] * ar + d.w[6 % (4 * C)] * bi + d.w[7 % (4 * C)] * br;
            }
          }
          f += 4 * C * (p.tied ? half : half_n);
          stage++;
          __syncthreads();
        }
      } else {
        const int steps = p.kinds[m] == RELAXED ? 2 * (p.levels - 1) : 1;
        for (int step = 0; step < steps; step++) {
          float next[2 * C];
          if (active) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
              const int e = q + h * half_n;
              int from;
              float t = 1.f;
              if (p.kinds[m] == PERMUTATION) {
                from = index[p.index[m] * n + e];
              } else {
                const int level = step / 2, block = n >> level, j = e & (block - 1);
                from = e - j + (step % 2 ? reversed(block, j) : even_odd(block, j));
                t = sigmoid(w[p.at[m] + 3 * level + (step % 2 ? 1 + (j >= block / 2) : 0)]);
              }
#pragma unroll
              for (int plane = 0; plane < C; plane++) {
                const float a = x[plane * n + e], d = x[plane * n + from] - a;
                if (p.kinds[m] == RELAXED) kept[stage][h * C + plane] = d;
                next[h * C + plane] = a + t * d;
              }
            }
          }
          __syncthreads();
          if (active)
#pragma unroll
            for (int h = 0; h < 2; h++)
#pragma unroll
              for (int plane = 0; plane < C; plane++) x[plane * n + q + h * half_n] = next[h * C + plane];
          if (p.kinds[m] == RELAXED) stage++;
          __syncthreads();
        }
      }
    }
    if (active)
#pragma unroll
      for (int plane = 0; plane < C; plane++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int e = plane * n + q + h * half_n;
          const float off = plane && v.real ? 0.f : x[e] - v.target[row * C * n + e];
          x[e] = off;
          sum += off * off;
        }
    __syncthreads();
    for (int m = p.modules - 1; m >= 0; m--) {
      if (p.kinds[m] == BUTTERFLY) {
        int offset = p.at[m] + 4 * C * (p.tied ? n - 1 : half_n * p.levels);
        for (int level = p.levels - 1; level >= 0; level--) {
          const int half = 1 << level, j = q & (half - 1), i = 2 * q - j, k = i + half;
          offset -= 4 * C * (p.tied ? half : half_n);
          stage--;
          float s[4 * C];
#pragma unroll
          for (int e = 0; e < 4 * C; e++) s[e] = 0.f;
          if (active) {
            Weights<C> d;
            d.load(w + offset + (p.tied ? j : q) * 4 * C);
            if (C == 1) {
              const float a = kept[stage][0], b = kept[stage][1], da = x[i], db = x[k];
              s[0] = da * a, s[1] = da * b, s[2] = db * a, s[3] = db * b;
              x[i] = d.w[0] * da + d.w[2] * db;
              x[k] = d.w[1] * da + d.w[3] * db;
            } else {
              const float ar = kept[stage][0], ai = kept[stage][1], br = kept[stage][C], bi = kept[stage][2 * C - 1];
              const float pr = x[i], pi = x[n + i], qr = x[k], qi = x[n + k];
              constexpr int M = 4 * C;
              s[0] = pr * ar + pi * ai, s[1] = pi * ar - pr * ai;
              s[2] = pr * br + pi * bi, s[3] = pi * br - pr * bi;
              s[4 % M] = qr * ar + qi * ai, s[5 % M] = qi * ar - qr * ai;
              s[6 % M] = qr * br + qi * bi, s[7 % M] = qi * br - qr * bi;
              x[i] = d.w[0] * pr + d.w[1] * pi + d.w[4 % M] * qr + d.w[5 % M] * qi;
              x[n + i] = d.w[0] * pi - d.w[1] * pr + d.w[4 % M] * qi - d.w[5 % M] * qr;
              x[k] = d.w[2] * pr + d.w[3] * pi + d.w[6 % M] * qr + d.w[7 % M] * qi;
              x[n + k] = d.w[2] * pi - d.w[3] * pr + d.w[6 % M] * qi - d.w[7 % M] * qr;
            }
          }
          if (!p.tied) {
            if (active)
#pragma unroll
              for (int e = 0; e < 4 * C; e++) g[offset + q * 4 * C + e] += s[e];
            __syncthreads();
            continue;
          }
          // Lanes of a warp that have the same pair, then warps.
          for (int o = half; o < WARP; o <<= 1)
#pragma unroll
            for (int e = 0; e < 4 * C; e++) s[e] += __shfl_xor_sync(~0u, s[e], o);
          const int lanes = min(half, WARP), lane = q % WARP;
          const int slots = half < WARP ? blockDim.x / WARP * half : half_n;
          float *to = red + buffer * 4 * C * half_n;
          // With fewer threads than a warp's, the one warp has one slot a pair.
          if (lane < lanes && (half < WARP || active))
#pragma unroll
            for (int e = 0; e < 4 * C; e++) to[e * slots + (half < WARP ? q / WARP * half + lane : q)] = s[e];
          __syncthreads();
          for (int o = q; o < 4 * C * half; o += blockDim.x) {
            const int e = o / half, at = o % half;
            float all = 0.f;
            for (int i = at; i < slots; i += half) all += to[e * slots + i];
            g[offset + at * 4 * C + e] += all;
          }
          buffer ^= 1;
        }
      } else {
        const int steps = p.kinds[m] == RELAXED ? 2 * (p.levels - 1) : 1;
        for (int step = steps - 1; step >= 0; step--) {
          float next[2 * C], dp[2] = {0.f, 0.f};
          if (p.kinds[m] == RELAXED) stage--;
          if (p.kinds[m] == PERMUTATION) {
            // Scattered: element `e` of the result is element `index[e]`.
            if (active)
#pragma unroll
              for (int h = 0; h < 2; h++)
#pragma unroll
                for (int plane = 0; plane < C; plane++) next[h * C + plane] = x[plane * n + q + h * half_n];
            __syncthreads();
            if (active)
#pragma unroll
              for (int h = 0; h < 2; h++)
#pragma unroll
                for (int plane = 0; plane < C; plane++)
                  x[plane * n + index[p.index[m] * n + q + h * half_n]] = next[h * C + plane];
            __syncthreads();
            continue;
          }
          const int level = step / 2, block = n >> level, turn = step % 2;
          const float *logit = w + p.at[m] + 3 * level + turn;
          const float t[2] = {sigmoid(logit[0]), turn ? sigmoid(logit[1]) : 0.f};
          if (active)
#pragma unroll
            for (int h = 0; h < 2; h++) {
              const int e = q + h * half_n, j = e & (block - 1), second = turn && j >= block / 2;
              // Both halves of a block turn within themselves, so that one `t` is of an element and of its source.
              const int to = e - j + (turn ? reversed(block, j) : even_odd_inverse(block, j));
#pragma unroll
              for (int plane = 0; plane < C; plane++) {
                const float out = x[plane * n + e], moved = out * kept[stage][h * C + plane];
                dp[0] += second ? 0.f : moved;
                dp[1] += second ? moved : 0.f;
                next[h * C + plane] = (1.f - t[second]) * out + t[second] * x[plane * n + to];
              }
            }
          for (int s = 0; s <= turn; s++) {
            const float all = block_sum(dp[s], small);  // Waits for all reads of x.
            if (q == 0) g[p.at[m] + 3 * level + turn + s] += all * t[s] * (1.f - t[s]);
          }
          if (active)
#pragma unroll
            for (int h = 0; h < 2; h++)
#pragma unroll
              for (int plane = 0; plane < C; plane++) x[plane * n + q + h * half_n] = next[h * C + plane];
          __syncthreads();
        }
      }
    }
    __syncthreads();
  }
  sum = block_sum(sum, small);
  if (q == 0) errors[product * slices + slice] = sum;
  __syncthreads();
  if (p.tied)
    for (int i = q; i < p.stride; i += blockDim.x) mine[i] = g[i];
}

extern "C" __global__ void __launch_bounds__(512) factored_gradient_real(Program p, const float *w, const uint16_t *index,
                                                                         Vectors v, float *partial, float *errors,
                                                                         const int *ended) {
  if (!ended[blockIdx.y]) gradient<1>(p, w, index, v, partial, errors);
}
extern "C" __global__ void __launch_bounds__(512) factored_gradient_complex(Program p, const float *w, const uint16_t *index,
                                                                            Vectors v, float *partial, float *errors,
                                                                            const int *ended) {
  if (!ended[blockIdx.y]) gradient<2>(p, w, index, v, partial, errors);
}

struct Adam {
  float *weights, *mean, *square;  // [products, stride]
  float *used;                     // weights with noise on the logits, for the next gradient; may be `weights`
  float *best;                     // [products, stride], or null
  const float *partial, *errors;   // [products, slices, ..]
  float *least;                    // [2][products]: least error, before and after this step
  int *ended;                      // [2][products]
  const float *hopeless;           // [products]
  uint64_t seed;
  int stride, trained, first_logit, slices, products, step, steps;
  float elements, tolerance, rate, unbias_mean, unbias_square, logit_noise, weight_noise;
};
MIRRORED(Adam, 144);
FIELD(Adam, seed, 80);
FIELD(Adam, stride, 88);
FIELD(Adam, elements, 116);
FIELD(Adam, weight_noise, 140);

extern "C" __global__ void __launch_bounds__(256) factored_adam(Adam a) {
  const int product = blockIdx.y, now = a.step % 2, next = 1 - now;
  const bool first = blockIdx.x == 0 && threadIdx.x == 0;
  const float least = a.least[now * a.products + product];
  if (a.ended[now * a.products + product]) {
    if (first) a.ended[next * a.products + product] = 1, a.least[next * a.products + product] = least;
    return;
  }
  float sum = 0.f;
  for (int i = 0; i < a.slices; i++) sum += a.errors[product * a.slices + i];
  const float error = sqrtf(sum / a.elements);
  const bool better = error < least;
  const float lower = better ? error : least;
  const bool end = a.best && (error < a.tolerance || (a.step == a.steps / 3 && lower > a.hopeless[product]));
  if (first) a.least[next * a.products + product] = lower, a.ended[next * a.products + product] = end;
  const int64_t row = (int64_t)product * a.stride;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < a.trained; i += gridDim.x * blockDim.x) {
    float w = a.weights[row + i], g = 0.f;
    if (better && a.best) a.best[row + i] = w;
    if (end) continue;
    for (int s = 0; s < a.slices; s++) g += a.partial[((int64_t)product * a.slices + s) * a.stride + i];
    const float mean = 0.9f * a.mean[row + i] + 0.1f * g, square = 0.99f * a.square[row + i] + 0.01f * g * g;
    a.mean[row + i] = mean, a.square[row + i] = square;
    w -= a.rate * mean * a.unbias_mean / (sqrtf(square * a.unbias_square) + 1e-12f);
    const bool logit = i >= a.first_logit;
    float noisy = w;
    if (a.weight_noise > 0.f || (logit && a.logit_noise > 0.f)) {
      curandStatePhilox4_32_10_t random;
      curand_init(a.seed, (uint64_t)row + i, 4 * (uint64_t)a.step, &random);
      const float4 u = curand_uniform4(&random);
      w += a.weight_noise * sqrtf(-2.f * logf(u.x)) * cospif(2.f * u.y);
      noisy = w;
      if (logit) {
        const float at = fminf(fmaxf(u.z, 1e-6f), 1.f - 1e-6f);
        noisy += a.logit_noise * logf(at / (1.f - at));
      }
    }
    a.weights[row + i] = w;
    a.used[row + i] = noisy;
  }
}
