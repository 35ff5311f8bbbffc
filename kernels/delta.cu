// Gated DeltaNet step by step (src/ops/delta.rs): the definition on a GPU, for any number of positions.
//
//   delta_convolve   u = silu(causal convolution of x)
//   delta_keep       the last inputs of the convolution, for the next chunk
//   delta_unit       queries and keys of u to length 1, queries divided by sqrt(D_k), in place
//   delta_scan       the recurrence; then the norm and the gate of the output
//
// Shapes  x, u f32 [T, C]; ring f32 [n, C], position x in row x mod n; z f32 [T, V D_v]; beta, decay f32 [T, V]; state f32 [V, D_k, D_v];
//         out f32 [T, V D_v]; D_k and D_v at most 128; C = 2 K D_k + V D_v.
// Launch  delta_convolve: grid (ceil(C / 256), ceil(T / POSITIONS)), 256 threads. delta_keep: ceil(C / 256), 256 threads.
//         delta_unit: grid ceil(2 K T / 8), 256 threads, a warp a head. delta_scan: grid V, 1,024 threads.
//
// delta_scan: a thread holds 16 rows of one column of its head's state in registers, so that the state is read and written
// once for all positions.
#include "common.cuh"
constexpr int POSITIONS = 64, MOST = 128, GROUPS = 8, ROWS = MOST / GROUPS;

struct DeltaParams {
  const float *x, *z, *beta, *decay, *conv, *rate, *bias, *norm;
  float *u, *ring, *state, *out;
  int tokens, position, key_heads, value_heads, key_dim, value_dim, kernel, tiled;
  float eps;
  int pad;
};
MIRRORED(DeltaParams, 136);
FIELD(DeltaParams, x, 0); FIELD(DeltaParams, z, 8); FIELD(DeltaParams, beta, 16); FIELD(DeltaParams, decay, 24);
FIELD(DeltaParams, conv, 32); FIELD(DeltaParams, rate, 40); FIELD(DeltaParams, bias, 48); FIELD(DeltaParams, norm, 56);
FIELD(DeltaParams, u, 64); FIELD(DeltaParams, ring, 72); FIELD(DeltaParams, state, 80); FIELD(DeltaParams, out, 88);
FIELD(DeltaParams, tokens, 96); FIELD(DeltaParams, position, 100); FIELD(DeltaParams, key_heads, 104);
FIELD(DeltaParams, value_heads, 108); FIELD(DeltaParams, key_dim, 112); FIELD(DeltaParams, value_dim, 116);
FIELD(DeltaParams, kernel, 120); FIELD(DeltaParams, tiled, 124); FIELD(DeltaParams, eps, 128); FIELD(DeltaParams, pad, 132);

__device__ inline int channels(const DeltaParams &p) { return 2 * p.key_heads * p.key_dim + p.value_heads * p.value_dim; }
__device__ inline float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

extern "C" __global__ void __launch_bounds__(256) delta_convolve(const __grid_constant__ DeltaParams p) {
  const int all = channels(p), c = blockIdx.x * 256 + threadIdx.x, n = p.kernel;
  if (c >= all) return;
  const int first = blockIdx.y * POSITIONS, last = min(first + POSITIONS, p.tokens);
  for (int t = first; t < last; t++) {
    float sum = 0.f;
    for (int j = 0; j < n; j++) {
      const int at = t - n + 1 + j;  // before the chunk: a row of the ring
      const float x = at < 0 ? p.ring[(int64_t)((p.position + at + n) % n) * all + c] : p.x[(int64_t)at * all + c];
      sum = fmaf(p.conv[c * n + j], x, sum);
    }
    p.u[(int64_t)t * all + c] = sum * sigmoid(sum);
  }
}

extern "C" __global__ void __launch_bounds__(256) delta_keep(const __grid_constant__ DeltaParams p) {
  const int all = channels(p), c = blockIdx.x * 256 + threadIdx.x;
  if (c >= all) return;
  for (int at = max(p.tokens - p.kernel + 1, 0); at < p.tokens; at++)
    p.ring[(int64_t)((p.position + at) % p.kernel) * all + c] = p.x[(int64_t)at * all + c];
}

extern "C" __global__ void __launch_bounds__(256) delta_unit(const __grid_constant__ DeltaParams p) {
  const int heads = 2 * p.key_heads, lane = threadIdx.x % WARP;
  const int64_t i = blockIdx.x * 8ll + threadIdx.x / WARP;
  if (i >= (int64_t)heads * p.tokens) return;
  const int head = i % heads;
  float *row = p.u + i / heads * channels(p) + head * p.key_dim, sum = 0.f;
  for (int c = lane; c < p.key_dim; c += WARP) sum += row[c] * row[c];
  const float r = rsqrtf(warp_sum(sum) + 1e-6f) * (head < p.key_heads ? rsqrtf((float)p.key_dim) : 1.f);
  for (int c = lane; c < p.key_dim; c += WARP) row[c] *= r;
}

extern "C" __global__ void __launch_bounds__(1024) delta_scan(const __grid_constant__ DeltaParams p) {
  __shared__ float keys[2][MOST], queries[2][MOST], parts[GROUPS][MOST], sums[2][MOST / WARP];
  const int head = blockIdx.x, column = threadIdx.x % MOST, group = threadIdx.x / MOST, dk = p.key_dim, dv = p.value_dim;
  const int key_head = p.tiled ? head % p.key_heads : head / (p.value_heads / p.key_heads), all = channels(p);
  const int keys_at = p.key_heads * dk + key_head * dk, values_at = 2 * p.key_heads * dk + head * dv;
  float *own = p.state + (int64_t)head * dk * dv;
  float s[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const int row = group * ROWS + r;
    s[r] = row < dk && column < dv ? own[row * dv + column] : 0.f;
  }
  // Keys and queries of the next position are loaded while this one is computed.
  auto load = [&](int t) {
    if (t >= p.tokens || group > 1) return;
    const float *from = p.u + (int64_t)t * all;
    if (group == 0) keys[t % 2][column] = column < dk ? from[keys_at + column] : 0.f;
    else queries[t % 2][column] = column < dk ? from[key_head * dk + column] : 0.f;
  };
  load(0);
  __syncthreads();
  for (int t = 0; t < p.tokens; t++) {
    const float *k = keys[t % 2] + group * ROWS, *q = queries[t % 2] + group * ROWS;
    const float d = p.decay[(int64_t)t * p.value_heads + head] + p.bias[head];
    const float kept = expf(p.rate[head] * (d > 20.f ? d : log1pf(expf(d))));
    const float strength = sigmoid(p.beta[(int64_t)t * p.value_heads + head]);
    float m = 0.f;
#pragma unroll
    for (int r = 0; r < ROWS; r++) s[r] *= kept, m = fmaf(s[r], k[r], m);
    parts[group][column] = m;
    load(t + 1);
    __syncthreads();
    m = 0.f;
#pragma unroll
    for (int g = 0; g < GROUPS; g++) m += parts[g][column];
    const float v = column < dv ? p.u[(int64_t)t * all + values_at + column] : 0.f, step = (v - m) * strength;
    float o = 0.f;
#pragma unroll
    for (int r = 0; r < ROWS; r++) s[r] = fmaf(k[r], step, s[r]), o = fmaf(s[r], q[r], o);
    __syncthreads();
    parts[group][column] = o;
    __syncthreads();
    if (group == 0) {
      o = 0.f;
#pragma unroll
      for (int g = 0; g < GROUPS; g++) o += parts[g][column];
      if (column >= dv) o = 0.f;
      const float square = warp_sum(o * o);
      if (column % WARP == 0) sums[t % 2][column / WARP] = square;
      // The four warps of the first group alone.
      asm volatile("bar.sync 1, 128;");
      float mean = 0.f;
#pragma unroll
      for (int w = 0; w < MOST / WARP; w++) mean += sums[t % 2][w];
      if (column < dv) {
        const int64_t to = ((int64_t)t * p.value_heads + head) * dv + column;
        const float z = p.z[to];
        p.out[to] = o * rsqrtf(mean / dv + p.eps) * p.norm[column] * z * sigmoid(z);
      }
    }
    // `parts` is written again only after all have read it.
    __syncthreads();
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const int row = group * ROWS + r;
    if (row < dk && column < dv) own[row * dv + column] = s[r];
  }
}
