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
#include "factored.cuh"
#include <curand_kernel.h>

constexpr int MODULES = 4, KEPT = 64;
constexpr int V = 4;  // vectors at a time: a weight is read, and a gradient summed over a block, once for all
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

template <int C>
__device__ void gradient(const Program &p, const float *all, const uint16_t *indices, const Vectors &v, float *partial,
                         float *errors) {
  extern __shared__ float shared[];
  const int n = p.n, half_n = n / 2, q = threadIdx.x, slice = blockIdx.x, product = blockIdx.y, slices = gridDim.x;
  const bool active = q < half_n;
  float *x = shared;                        // [V][C][n]
  float *red = x + V * C * n;               // [2][4 C][n / 2]
  float *small = red + 2 * 4 * C * half_n;  // [32]
  const float *w = all + (int64_t)product * p.stride;
  const uint16_t *index = indices + (int64_t)product * p.permutations * n;
  float *mine = partial + ((int64_t)product * slices + slice) * p.stride;
  // Gradients of one pair a block stay in device memory, where a thread alone adds to them.
  float *g = p.tied ? small + 32 : mine;
  for (int i = q; i < p.stride; i += blockDim.x) g[i] = 0.f;
  float sum = 0.f;
  float kept[KEPT][V][2 * C];
  int buffer = 0;
  __syncthreads();
  for (int first = slice * V; first < v.count; first += slices * V) {
    const int *rows = v.rows + (int64_t)product * v.count + first;
    const int own = min(V, v.count - first);
    for (int c = 0; c < V; c++)
      for (int i = q; i < C * n; i += blockDim.x) x[c * C * n + i] = c < own ? v.input[(int64_t)rows[c] * C * n + i] : 0.f;
    __syncthreads();
    int stage = 0;
    for (int m = 0; m < p.modules; m++) {
      if (p.kinds[m] == BUTTERFLY) {
        const float *f = w + p.at[m];
        for (int level = 0; level < p.levels; level++) {
          const int half = 1 << level, j = q & (half - 1), i = 2 * q - j;
          if (active) {
            Four<C> d;
            d.load(f + (p.tied ? j : q) * 4 * C);
#pragma unroll
            for (int c = 0; c < V; c++) {
              float a[C], b[C];
#pragma unroll
              for (int e = 0; e < C; e++) {
                kept[stage][c][e] = a[e] = x[(c * C + e) * n + i];
                kept[stage][c][C + e] = b[e] = x[(c * C + e) * n + i + half];
              }
              d.apply(a, b);
#pragma unroll
              for (int e = 0; e < C; e++) x[(c * C + e) * n + i] = a[e], x[(c * C + e) * n + i + half] = b[e];
            }
          }
          f += 4 * C * (p.tied ? half : half_n);
          stage++;
          __syncthreads();
        }
      } else {
        const int steps = p.kinds[m] == RELAXED ? 2 * (p.levels - 1) : 1;
        for (int step = 0; step < steps; step++) {
          float next[2][V * C];
          if (active)
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
              for (int plane = 0; plane < V * C; plane++) {
                const float a = x[plane * n + e], d = x[plane * n + from] - a;
                if (p.kinds[m] == RELAXED) kept[stage][plane / C][h * C + plane % C] = d;
                next[h][plane] = p.kinds[m] == RELAXED ? a + t * d : a + d;
              }
            }
          __syncthreads();
          if (active)
#pragma unroll
            for (int h = 0; h < 2; h++)
#pragma unroll
              for (int plane = 0; plane < V * C; plane++) x[plane * n + q + h * half_n] = next[h][plane];
          if (p.kinds[m] == RELAXED) stage++;
          __syncthreads();
        }
      }
    }
    if (active)
      for (int c = 0; c < V; c++)
#pragma unroll
        for (int plane = 0; plane < C; plane++)
#pragma unroll
          for (int h = 0; h < 2; h++) {
            const int e = plane * n + q + h * half_n;
            const bool counts = c < own && !(plane && v.real);
            const float off = counts ? x[c * C * n + e] - v.target[(int64_t)rows[c] * C * n + e] : 0.f;
            x[c * C * n + e] = off;
            sum += off * off;
          }
    __syncthreads();
    for (int m = p.modules - 1; m >= 0; m--) {
      if (p.kinds[m] == BUTTERFLY) {
        int offset = p.at[m] + 4 * C * (p.tied ? n - 1 : half_n * p.levels);
        for (int level = p.levels - 1; level >= 0; level--) {
          const int half = 1 << level, j = q & (half - 1), i = 2 * q - j;
          offset -= 4 * C * (p.tied ? half : half_n);
          stage--;
          float s[4 * C] = {};
          if (active) {
            Four<C> d;
            d.load(w + offset + (p.tied ? j : q) * 4 * C);
#pragma unroll
            for (int c = 0; c < V; c++) {
              float a[C], b[C], da[C], db[C];
#pragma unroll
              for (int e = 0; e < C; e++) {
                a[e] = kept[stage][c][e], b[e] = kept[stage][c][C + e];
                da[e] = x[(c * C + e) * n + i], db[e] = x[(c * C + e) * n + i + half];
              }
              d.back(a, b, da, db, s);
#pragma unroll
              for (int e = 0; e < C; e++) x[(c * C + e) * n + i] = da[e], x[(c * C + e) * n + i + half] = db[e];
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
          const int lane = q % WARP;
          const int slots = half < WARP ? blockDim.x / WARP << level : half_n;
          float *to = red + buffer * 4 * C * half_n;
          // With fewer threads than a warp's, the one warp has one slot a pair.
          if (lane < half && (half < WARP || active))
#pragma unroll
            for (int e = 0; e < 4 * C; e++) to[e * slots + (half < WARP ? (q / WARP << level) + lane : q)] = s[e];
          __syncthreads();
          for (int o = q; o < 4 * C << level; o += blockDim.x) {
            const int e = o >> level, at = o & (half - 1);
            float total = 0.f;
            for (int i = at; i < slots; i += half) total += to[e * slots + i];
            g[offset + at * 4 * C + e] += total;
          }
          buffer ^= 1;
        }
      } else {
        const int steps = p.kinds[m] == RELAXED ? 2 * (p.levels - 1) : 1;
        for (int step = steps - 1; step >= 0; step--) {
          float next[2][V * C], dp[2] = {0.f, 0.f};
          if (p.kinds[m] == PERMUTATION) {
            // Scattered: element `e` of the result is element `index[e]`.
            if (active)
#pragma unroll
              for (int h = 0; h < 2; h++)
#pragma unroll
                for (int plane = 0; plane < V * C; plane++) next[h][plane] = x[plane * n + q + h * half_n];
            __syncthreads();
            if (active)
#pragma unroll
              for (int h = 0; h < 2; h++) {
                const int to = index[p.index[m] * n + q + h * half_n];
#pragma unroll
                for (int plane = 0; plane < V * C; plane++) x[plane * n + to] = next[h][plane];
              }
            __syncthreads();
            continue;
          }
          stage--;
          const int level = step / 2, block = n >> level, turn = step % 2;
          const float *logit = w + p.at[m] + 3 * level + turn;
          const float t[2] = {sigmoid(logit[0]), turn ? sigmoid(logit[1]) : 0.f};
          if (active)
#pragma unroll
            for (int h = 0; h < 2; h++) {
              const int e = q + h * half_n, j = e & (block - 1);
              const bool second = turn && j >= block / 2;
              // Both halves of a block turn within themselves, so that one `t` is of an element and of its source.
              const int to = e - j + (turn ? reversed(block, j) : even_odd_inverse(block, j));
              const float own_t = second ? t[1] : t[0];
#pragma unroll
              for (int plane = 0; plane < V * C; plane++) {
                const float out = x[plane * n + e], moved = out * kept[stage][plane / C][h * C + plane % C];
                dp[0] += second ? 0.f : moved;
                dp[1] += second ? moved : 0.f;
                next[h][plane] = (1.f - own_t) * out + own_t * x[plane * n + to];
              }
            }
          for (int s = 0; s <= turn; s++) {
            const float total = block_sum(dp[s], small);  // Waits for all reads of x.
            if (q == 0) g[p.at[m] + 3 * level + turn + s] += total * t[s] * (1.f - t[s]);
          }
          if (active)
#pragma unroll
            for (int h = 0; h < 2; h++)
#pragma unroll
              for (int plane = 0; plane < V * C; plane++) x[plane * n + q + h * half_n] = next[h][plane];
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
