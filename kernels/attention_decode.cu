// attention_decode: attention of one token, split over its keys, one launch for all heads.
//
//   as attention.cuh says, for the position in `state` (or `position`, where `state` is null).
//
// Shapes  q [H, D] in 16 bits; ring [capacity, G, D]; out [H, D] f32, or 16 bits at out16; D a multiple of 8, up to DIM; at most
//         16 query heads of a group to a block: grid z covers more.
// Launch  grid (splits, G, ceil(group / 16)), 128 threads, shared memory 4 * 16 * (DIM + 2) * 4 bytes.
//
// The heads of a group are the rows of one tensor-core tile, so that a key is read once for all of them. Each warp streams keys
// and values from memory into registers, 16 at a time, in the layout of the products' operands: a thread's 16 bytes of a key are
// taken as whatever columns of the tile it must supply, and the query's columns are permuted alike; a value's 16 bytes are
// spread over eight tiles, which permutes the output's columns. Nothing is staged in shared memory. The last block to finish a
// group merges all (m, l, o).
#include "decode.cuh"
#include "attention.cuh"

// Mirrors `DecodeAttention` in src/ops/attention/cuda.rs.
struct DecodeAttentionParams {
  const void *q;
  const void *ring_k, *ring_v;  // position x in row x % capacity
  const void *own_k, *own_v;    // the token's own key and value, or null where the ring holds them
  const void *sink_k, *sink_v;  // [sinks, G, D]
  const void *mean_k, *mean_v;  // [mean_rows, G, D]: block n in row n % mean_rows
  const int *routes;            // [blocks, route_width]: a block read, or -1
  const float *route_bias;      // of each
  const Extra *extras;          // or a list of rows, instead of sinks and routes
  const DecodeState *state;
  float *partial;               // [G z, splits, 16, DIM + 2]
  int *counters;                // [G z], zero between launches
  float *out;
  void *out16;
  int extra_count, position, capacity, sinks, mean_rows, route_width, block;
  int heads, kv_heads, dim;
  int window_kind, window_size, window_count;
  float scale;
};

template <typename T, int DIM> struct Decode {
  static constexpr int STEPS = DIM / 32, GROUPS = (DIM + 63) / 64, WIDE = DIM + 2, WARPS = 4;
  const DecodeAttentionParams &p;
  const int lane, warp, quad, row, kv, kv_row;
  int group, heads_here, first_head, position, left;
  uint4 q[2][STEPS];
  float o[GROUPS][8][4], m[2], l[2];

  __device__ Decode(const DecodeAttentionParams &params)
      : p(params), lane(threadIdx.x % WARP), warp(threadIdx.x / WARP), quad(lane % 4), row(lane / 4), kv(blockIdx.y),
        kv_row(params.kv_heads * params.dim), group(params.heads / params.kv_heads) {
    position = p.state ? p.state->position : p.position;
    if (p.window_kind == 0) left = 0;
    else if (p.window_kind == 1) left = max(0, position + 1 - p.window_size);
    else left = max(0, (position / p.window_size - p.window_count) * p.window_size);
    heads_here = min(16, group - (int)blockIdx.z * 16);
    first_head = kv * group + blockIdx.z * 16;
    m[0] = m[1] = -INFINITY;
    l[0] = l[1] = 0.f;
    for (int g = 0; g < GROUPS; g++)
      for (int t = 0; t < 8; t++)
        for (int c = 0; c < 4; c++) o[g][t][c] = 0.f;
    for (int half = 0; half < 2; half++)
      for (int s = 0; s < STEPS; s++) {
        const int h = row + half * 8, d = s * 32 + quad * 8;
        q[half][s] = h < heads_here && d < p.dim ? load16((const T *)p.q + (first_head + h) * p.dim + d) : make_uint4(0, 0, 0, 0);
      }
  }

  // Sixteen keys: `k` are the rows of keys row and row + 8, `v` of keys 2 quad, 2 quad + 1, + 8, + 9; bias of those four.
  __device__ void tile(const T *const (&k)[2], const T *const (&v)[4], const float (&bias)[4]) {
    uint4 key[2][STEPS], value[4][GROUPS];
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
      for (int s = 0; s < STEPS; s++) {
        const int d = s * 32 + quad * 8;
        key[n][s] = d < p.dim ? load16_written(k[n] + d) : make_uint4(0, 0, 0, 0);
      }
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int g = 0; g < GROUPS; g++) {
        const int d = g * 64 + row * 8;
        value[i][g] = d < p.dim ? load16_written(v[i] + d) : make_uint4(0, 0, 0, 0);
      }
    float s[2][4] = {};
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      const uint32_t a[4] = {q[0][step].x, q[1][step].x, q[0][step].y, q[1][step].y};
      const uint32_t b[4] = {q[0][step].z, q[1][step].z, q[0][step].w, q[1][step].w};
#pragma unroll
      for (int n = 0; n < 2; n++) {
        mma<T>(s[n], a, key[n][step].x, key[n][step].y);
        mma<T>(s[n], b, key[n][step].z, key[n][step].w);
      }
    }
    const float scale = p.scale * LOG2E;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float top = m[half];
#pragma unroll
      for (int n = 0; n < 2; n++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
          float &x = s[n][half * 2 + c];
          x = fmaf(x, scale, bias[n * 2 + c] * LOG2E);
          top = fmaxf(top, x);
        }
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      const float base = top == -INFINITY ? 0.f : top, keep = exp2f(m[half] - base);
      m[half] = top;
      float sum = 0.f;
#pragma unroll
      for (int n = 0; n < 2; n++)
#pragma unroll
        for (int c = 0; c < 2; c++) sum += s[n][half * 2 + c] = exp2f(s[n][half * 2 + c] - base);
      l[half] = l[half] * keep + sum;
#pragma unroll
      for (int g = 0; g < GROUPS; g++)
#pragma unroll
        for (int t = 0; t < 8; t++) {
          o[g][t][half * 2] *= keep;
          o[g][t][half * 2 + 1] *= keep;
        }
    }
    const uint32_t w[4] = {pack<T>(s[0][0], s[0][1]), pack<T>(s[0][2], s[0][3]), pack<T>(s[1][0], s[1][1]), pack<T>(s[1][2], s[1][3])};
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
      const uint32_t x[4][4] = {{value[0][g].x, value[0][g].y, value[0][g].z, value[0][g].w},
                                {value[1][g].x, value[1][g].y, value[1][g].z, value[1][g].w},
                                {value[2][g].x, value[2][g].y, value[2][g].z, value[2][g].w},
                                {value[3][g].x, value[3][g].y, value[3][g].z, value[3][g].w}};
#pragma unroll
      for (int t = 0; t < 8; t++) {
        const uint32_t pick = t % 2 ? 0x7632 : 0x5410;
        mma<T>(o[g][t], w, __byte_perm(x[0][t / 2], x[1][t / 2], pick), __byte_perm(x[2][t / 2], x[3][t / 2], pick));
      }
    }
  }

  __device__ void raw(int at, int count, int turn) {
    auto ring_row = [&](int i) {
      int r = turn + min(i, count - 1);
      if (r >= p.capacity) r -= p.capacity;
      return (int64_t)r * kv_row + kv * p.dim;
    };
    auto is_own = [&](int i) { return p.own_k && min(i, count - 1) == count - 1; };
    const T *k[2], *v[4];
    float bias[4];
#pragma unroll
    for (int n = 0; n < 2; n++) {
      const int i = at + row + n * 8;
      k[n] = is_own(i) ? (const T *)p.own_k + kv * p.dim : (const T *)p.ring_k + ring_row(i);
    }
#pragma unroll
    for (int c = 0; c < 4; c++) {
      const int i = at + quad * 2 + c % 2 + c / 2 * 8;
      v[c] = is_own(i) ? (const T *)p.own_v + kv * p.dim : (const T *)p.ring_v + ring_row(i);
      bias[c] = i < count ? 0.f : -INFINITY;
    }
    tile(k, v, bias);
  }

  // Extra row `i`: false where it is not seen.
  __device__ bool extra(int i, int sinks, const T *&k, const T *&v, float &bias) const {
    k = (const T *)p.ring_k;  // Any readable row.
    v = (const T *)p.ring_v;
    bias = -INFINITY;
    if (p.extras) {
      if (i >= p.extra_count || position < p.extras[i].from || position >= p.extras[i].until) return false;
      k = (const T *)p.extras[i].k + kv * p.dim;
      v = (const T *)p.extras[i].v + kv * p.dim;
      bias = p.extras[i].bias;
      return true;
    }
    int64_t at;
    if (i < sinks) {
      at = (int64_t)i * kv_row + kv * p.dim;
      k = (const T *)p.sink_k + at;
      v = (const T *)p.sink_v + at;
      bias = 0.f;
      return true;
    }
    i -= sinks;
    if (i >= p.route_width) return false;
    const int entry = position / p.block * p.route_width + i, n = p.routes[entry];
    if (n < 0) return false;
    at = (int64_t)(n % p.mean_rows) * kv_row + kv * p.dim;
    k = (const T *)p.mean_k + at;
    v = (const T *)p.mean_v + at;
    bias = p.route_bias[entry];
    return true;
  }

  __device__ void extras() {
    const int sinks = min(p.sinks, left), count = p.extras ? p.extra_count : sinks + p.route_width;
    for (int at = warp * 16; at < count; at += WARPS * 16) {
      const T *k[2], *v[4], *other;
      float bias[4], unused;
      for (int n = 0; n < 2; n++) extra(at + row + n * 8, sinks, k[n], other, unused);
      for (int c = 0; c < 4; c++) extra(at + quad * 2 + c % 2 + c / 2 * 8, sinks, other, v[c], bias[c]);
      tile(k, v, bias);
    }
  }

  // Output column of element c of tile t of group g.
  __device__ int column(int g, int t, int c) const { return g * 64 + (quad * 2 + c) * 8 + t; }

  __device__ void run(float *shared) {
    const int count = position - left + 1, tiles = (count + 15) / 16, turn = left % p.capacity;
    if (blockIdx.x == 0) extras();
    for (int i = blockIdx.x * WARPS + warp; i < tiles; i += gridDim.x * WARPS) raw(i * 16, count, turn);
    float *mine = shared + warp * 16 * WIDE;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float sum = l[half];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      float *to = mine + (row + half * 8) * WIDE;
      if (quad == 0) {
        to[DIM] = m[half];
        to[DIM + 1] = sum;
      }
#pragma unroll
      for (int g = 0; g < GROUPS; g++)
#pragma unroll
        for (int t = 0; t < 8; t++)
#pragma unroll
          for (int c = 0; c < 2; c++)
            if (column(g, t, c) < DIM) to[column(g, t, c)] = o[g][t][half * 2 + c];
    }
    __syncthreads();
    const int lists = blockIdx.y * gridDim.z + blockIdx.z;
    float *partial = p.partial + (int64_t)lists * gridDim.x * 16 * WIDE;
    merge<false>(shared, 16 * WIDE, WARPS, [&](int r, int d, float x, float top, float sum) {
      float *to = partial + ((int64_t)blockIdx.x * 16 + r) * WIDE;
      to[d] = x;
      if (d == 0) {
        to[DIM] = top;
        to[DIM + 1] = sum;
      }
    });
    __threadfence();
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
      last = atomicAdd(p.counters + lists, 1) == (int)gridDim.x - 1;
      if (last) p.counters[lists] = 0;
    }
    __syncthreads();
    if (!last) return;
    __threadfence();
    merge<true>(partial, 16 * WIDE, gridDim.x, [&](int r, int d, float x, float, float sum) {
      const int at = (first_head + r) * p.dim + d;
      if (p.out16) ((T *)p.out16)[at] = from_float<T>(x / sum);
      else p.out[at] = x / sum;
    });
  }

  // Merges `parts` partial results that lie `stride` apart; `put` gets each element before division.
  template <bool GLOBAL, typename F> __device__ void merge(const float *from, int stride, int parts, F put) {
    for (int e = threadIdx.x; e < heads_here * p.dim; e += blockDim.x) {
      const int r = e / p.dim, d = e % p.dim;
      const float *at = from + r * WIDE;
      float top = -INFINITY, sum = 0.f, x = 0.f;
      // What other blocks wrote is in L2.
      auto read = [](const float *x) { return GLOBAL ? __ldcg(x) : *x; };
      for (int i = 0; i < parts; i++) top = fmaxf(top, read(at + (int64_t)i * stride + DIM));
      for (int i = 0; i < parts; i++) {
        const float *part = at + (int64_t)i * stride;
        const float scale = top == -INFINITY ? 0.f : exp2f(read(part + DIM) - top);
        sum += read(part + DIM + 1) * scale;
        x += read(part + d) * scale;
      }
      put(r, d, x, top, sum);
    }
  }
};

#define INSTANCE(NAME, T, DIM)                                                                                           \
  extern "C" __global__ void __launch_bounds__(128) NAME(const __grid_constant__ DecodeAttentionParams p) {              \
    extern __shared__ float shared[];                                                                                    \
    release_next();                                                                                                      \
    await_previous();                                                                                                    \
    Decode<T, DIM> decode(p);                                                                                            \
    decode.run(shared);                                                                                                  \
  }
// The build compiles each head dim apart, with ONLY_DIM set.
#define TYPES(DIM)                                                        \
  INSTANCE(attention_decode_bf16_##DIM, __nv_bfloat16, DIM)               \
  INSTANCE(attention_decode_f16_##DIM, __half, DIM)
#if !defined(ONLY_DIM) || ONLY_DIM == 64
TYPES(64)
#endif
#if !defined(ONLY_DIM) || ONLY_DIM == 128
TYPES(128)
#endif
#if !defined(ONLY_DIM) || ONLY_DIM == 256
TYPES(256)
#endif
