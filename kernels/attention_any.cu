// attention_any: attention of a chunk in any element type and any head dim up to 256, one warp per query and head.
//
//   Formula in attention.cuh; f32 arithmetic, one pass, online softmax.
//
// Shapes  q [T, H, D], k, v [T, G, D], past [capacity, G, D], out [T, H, D]; D <= 256.
// Launch  grid (ceil(T / 4), H), 128 threads: warp w takes query 4 x + w.
//
// The fallback: f32 runs, head dims that are no multiple of 8, and the device-side check of attention_prefill. It reads
// every key from L2 and reduces every logit over the warp, so it reaches a few percent of what attention_prefill does.
#include "attention.cuh"

constexpr int LANE_DIMS = 8;

template <typename T> struct Row {
  const T *k, *v;
};

template <typename T>
__device__ inline void read(float (&x)[LANE_DIMS], const T *row, int dim, int lane) {
  for (int i = 0; i < LANE_DIMS; i++) x[i] = lane + i * WARP < dim ? to_float(row[lane + i * WARP]) : 0.f;
}

// Adds one key to the running softmax.
template <typename T>
__device__ inline void add(const float (&q)[LANE_DIMS], const T *k, const T *v, float scale, float bias, int dim, int lane,
                           float &m, float &l, float (&o)[LANE_DIMS]) {
  float x[LANE_DIMS], dot = 0.f;
  read(x, k, dim, lane);
  for (int i = 0; i < LANE_DIMS; i++) dot += q[i] * x[i];
  float logit = scale * warp_sum(dot) + bias;
  float m_new = fmaxf(m, logit);
  if (m_new == -INFINITY) return;
  float keep = expf(m - m_new), weight = expf(logit - m_new);
  read(x, v, dim, lane);
  for (int i = 0; i < LANE_DIMS; i++) o[i] = o[i] * keep + weight * x[i];
  l = l * keep + weight;
  m = m_new;
}

template <typename T> __device__ void attention_any(const AttentionParams &p) {
  const int lane = threadIdx.x % WARP, t = blockIdx.x * 4 + threadIdx.x / WARP, head = blockIdx.y;
  if (t >= p.tokens) return;
  const int kv = head / (p.heads / p.kv_heads), position = p.start + t;
  float near[LANE_DIMS], m = -INFINITY, l = 0.f, o[LANE_DIMS] = {};
  read(near, (const T *)p.q + t * p.q_row + head * p.q_head, p.dim, lane);
  // Without a chunk only the ring is read; without a ring only the chunk.
  const int begin = p.past_k ? left_edge(p, position) : max(left_edge(p, position), p.start);
  for (int x = begin; x <= (p.k ? position : p.start - 1); x++) {
    const bool own = x >= p.start;
    const int64_t row = own ? x - p.start : x % p.capacity;
    const T *k = (const T *)(own ? p.k : p.past_k) + row * (own ? p.k_row : p.past_row) + kv * (own ? p.k_head : p.past_head);
    const T *v = (const T *)(own ? p.v : p.past_v) + row * (own ? p.v_row : p.past_row) + kv * (own ? p.v_head : p.past_head);
    add(near, k, v, p.scale, 0.f, p.dim, lane, m, l, o);
  }
  if (p.extras) {
    float far[LANE_DIMS];
    if (p.q_far) read(far, (const T *)p.q_far + t * p.q_row + head * p.q_head, p.dim, lane);
    const int tile = position / EXTRA_TILE - p.start / EXTRA_TILE;
    for (int i = p.extra_offsets[tile]; i < p.extra_offsets[tile + 1]; i++) {
      const Extra e = p.extras[i];
      if (position < e.from || position >= e.until) continue;
      const T *k = (const T *)e.k + kv * p.dim, *v = (const T *)e.v + kv * p.dim;
      if (e.far_query)
        add(far, k, v, p.scale, e.bias, p.dim, lane, m, l, o);
      else
        add(near, k, v, p.scale, e.bias, p.dim, lane, m, l, o);
    }
  }
  if (lane == 0) note_lse(p, t, head, m, l);
  T *out = (T *)p.out + ((int64_t)t * p.heads + head) * p.dim;
  for (int i = 0; i < LANE_DIMS; i++)
    if (lane + i * WARP < p.dim) out[lane + i * WARP] = from_float<T>(l > 0.f ? o[i] / l : 0.f);
}

#define INSTANCE(NAME, T) \
  extern "C" __global__ void NAME(const __grid_constant__ AttentionParams p) { attention_any<T>(p); }
INSTANCE(attention_any_f32, float)
INSTANCE(attention_any_bf16, __nv_bfloat16)
INSTANCE(attention_any_f16, __half)
