// Gated DeltaNet for one position of a captured decode step (src/ops/delta.rs), one launch a layer: the convolution, the
// step of the recurrence, the norm and the gate of the output.
//
//   m = S^T k, o' = S^T q;  step = beta (v - g m);  S <- g S + k step;  o = g o' + (k . q) step
//
// Shapes  x f32 [C], z f32 [V D_v], beta, decay f32 [V]; ring f32 [n, C], position x in row x mod n; state f32 [V, D_k, D_v];
//         out f32 [V D_v]. n at most 4, D_k and D_v at most 128, D_v a multiple of 4. Further states, each with inputs,
//         ring and output of its own, follow each other.
// Launch  grid (V, states), 512 threads.
//
// Both products with the state take one pass over it: 8 rows of 4 columns to a thread, in registers, loaded before the
// launch ahead has ended (only this kernel writes a layer's state and ring). Bound by the bytes of the states where they
// are many, by latency where there is one.
#include "decode.cuh"
constexpr int MOST = 128, THREADS = 512, WARPS = THREADS / WARP, ROWS = MOST / WARPS, TAPS = 4;
constexpr float UNIT_EPS = 1e-6f;

struct StepParams {
  const float *x, *z, *beta, *decay, *conv, *rate, *bias, *norm;
  float *ring, *state, *out;
  const DecodeState *at;
  int key_heads, value_heads, key_dim, value_dim, kernel, tiled;
  float eps;
  int pad;
};
MIRRORED(StepParams, 128);
FIELD(StepParams, x, 0); FIELD(StepParams, z, 8); FIELD(StepParams, beta, 16); FIELD(StepParams, decay, 24);
FIELD(StepParams, conv, 32); FIELD(StepParams, rate, 40); FIELD(StepParams, bias, 48); FIELD(StepParams, norm, 56);
FIELD(StepParams, ring, 64); FIELD(StepParams, state, 72); FIELD(StepParams, out, 80); FIELD(StepParams, at, 88);
FIELD(StepParams, key_heads, 96); FIELD(StepParams, value_heads, 100); FIELD(StepParams, key_dim, 104);
FIELD(StepParams, value_dim, 108); FIELD(StepParams, kernel, 112); FIELD(StepParams, tiled, 116);
FIELD(StepParams, eps, 120); FIELD(StepParams, pad, 124);

__device__ inline float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

extern "C" __global__ void __launch_bounds__(THREADS, 2) delta_step(const __grid_constant__ StepParams p) {
  __shared__ float unit[3][MOST], squares[3 * MOST / WARP], parts[2][WARPS][MOST], steps[MOST], norms[MOST / WARP], dot;
  const int head = blockIdx.x, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, dk = p.key_dim, dv = p.value_dim;
  const int group = p.value_heads / p.key_heads, key_head = p.tiled ? head % p.key_heads : head / group;
  const int64_t one = blockIdx.y, all = 2 * p.key_heads * dk + p.value_heads * dv;
  float *own = p.state + (one * p.value_heads + head) * dk * dv + warp * ROWS * dv + 4 * lane;
  float4 s[ROWS];
  auto held = [&](int r) { return warp * ROWS + r < dk && 4 * lane < dv; };
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const uint4 raw = held(r) ? load16_written(own + r * dv) : make_uint4(0, 0, 0, 0);
    s[r] = make_float4(__uint_as_float(raw.x), __uint_as_float(raw.y), __uint_as_float(raw.z), __uint_as_float(raw.w));
  }
  // Queries, keys and values: a channel to a thread.
  const int part = threadIdx.x / MOST, c = threadIdx.x % MOST, n = p.kernel, position = p.at->position;
  const bool active = part < 3 && c < (part < 2 ? dk : dv);
  const int channel = part == 2 ? 2 * p.key_heads * dk + head * dv + c : (part * p.key_heads + key_head) * dk + c;
  float *ring = p.ring + one * n * all + channel, u = 0.f, last = 0.f;
  if (active) {
#pragma unroll
    for (int j = 0; j < TAPS - 1; j++)
      if (j < n - 1) u = fmaf(p.conv[channel * n + j], ring[(position + 1 + j) % n * all], u);
    last = p.conv[channel * n + n - 1];
  }
  const float rate = p.rate[head], bias = p.bias[head], weight = part == 0 && c < dv ? p.norm[c] : 0.f;
  const bool stopped = p.at->stopped;
  release_next();
  await_previous();
  if (stopped) return;  // steps after the last token leave the state as it is
  if (active) {
    const float x = p.x[one * all + channel];
    u = fmaf(last, x, u);
    u *= sigmoid(u);
    // The row of the position n back, which no thread reads any more; heads that share keys hold the same numbers.
    if (part == 2 || (p.tiled ? head < p.key_heads : head % group == 0)) ring[position % n * all] = x;
  }
  const int64_t scalar = one * p.value_heads + head;
  const float d = p.decay[scalar] + bias, kept = expf(rate * (d > 20.f ? d : log1pf(expf(d)))), beta = sigmoid(p.beta[scalar]);
  const float z = part == 0 && c < dv ? p.z[scalar * dv + c] : 0.f, square = warp_sum(u * u);
  if (part < 3) {
    unit[part][c] = u;
    if (lane == 0) squares[warp] = square;
  }
  __syncthreads();
  auto length = [&](int part) { return squares[4 * part] + squares[4 * part + 1] + squares[4 * part + 2] + squares[4 * part + 3]; };
  const float of_q = rsqrtf(length(0) + UNIT_EPS) * rsqrtf((float)dk), of_k = rsqrtf(length(1) + UNIT_EPS);
  const float *q = unit[0], *k = unit[1];
  float4 m = make_float4(0.f, 0.f, 0.f, 0.f), o = m;
  auto add = [](float4 &to, float a, float4 b) {
    to.x = fmaf(a, b.x, to.x), to.y = fmaf(a, b.y, to.y), to.z = fmaf(a, b.z, to.z), to.w = fmaf(a, b.w, to.w);
  };
#pragma unroll
  for (int r = 0; r < ROWS; r++) add(m, k[warp * ROWS + r], s[r]), add(o, q[warp * ROWS + r], s[r]);
  *(float4 *)&parts[0][warp][4 * lane] = m;
  *(float4 *)&parts[1][warp][4 * lane] = o;
  if (warp == WARPS - 1) {
    float sum = 0.f;
    for (int i = lane; i < MOST; i += WARP) sum = fmaf(q[i], k[i], sum);
    sum = warp_sum(sum);
    if (lane == 0) dot = sum;
  }
  __syncthreads();
  float out = 0.f;
  if (part == 0) {
    float m = 0.f, o = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) m += parts[0][w][c], o += parts[1][w][c];
    const float step = (unit[2][c] - kept * of_k * m) * beta;
    out = of_q * (kept * o + dot * of_k * step);
    steps[c] = of_k * step;
    const float square = warp_sum(out * out);
    if (lane == 0) norms[warp] = square;
  }
  __syncthreads();
  const float4 step = *(const float4 *)&steps[4 * lane];
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const float f = k[warp * ROWS + r];
    const float4 old = s[r];
    if (held(r))
      __stcs((float4 *)(own + r * dv), make_float4(fmaf(f, step.x, kept * old.x), fmaf(f, step.y, kept * old.y),
                                                   fmaf(f, step.z, kept * old.z), fmaf(f, step.w, kept * old.w)));
  }
  if (part == 0 && c < dv)
    p.out[scalar * dv + c] = out * rsqrtf((norms[0] + norms[1] + norms[2] + norms[3]) / dv + p.eps) * weight * z * sigmoid(z);
}
