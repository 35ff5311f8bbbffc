// attention_decode: attention of one token, split over its keys, one launch for all heads.
//
//   Formula in attention.cuh, for the position in `state` (or `position`, where `state` is null).
//   With `qkv`, the kernel first computes the token's heads: norm and rotation as `heads` in pointwise.cu. Key and value go
//   to their row of the ring and to the sinks, and are added to the block in progress, whose mean is stored once the block
//   is complete (summaries.cu). Without `qkv` they come in `q`, `own_k` and `own_v`; without `own_k` the token does not
//   read itself.
//   With `table`, each KV head also reads the rows of a store that the table lists for it; the store may be in any memory
//   that the device can read, pinned host memory included.
//
// Shapes  q [H, D] in 16 bits, or qkv [H + 2 G, D] f32; ring [capacity, G, D]; out [H, D] f32, or 16 bits at out16; D a multiple
//         of 8, up to DIM; at most 16 query heads of a group to a block: grid z covers more (without `qkv`).
// Launch  grid (2 <= splits <= 128, G, ceil(group / 16)), 128 threads, shared memory (4 * 16 * (DIM + 2)) * 4 + 18 * DIM * 2 bytes.
//
// The heads of a group are the rows of one tensor-core tile, so that a key is read once for all of them. Each warp
// streams keys and values from memory into registers, 16 at a time, in the layout of the products' operands: a thread's
// 16 bytes of a key are taken as whatever columns of the tile it must supply, and the query's columns are permuted
// alike; a value's 16 bytes are spread over eight tiles, which permutes the output's columns. Nothing is staged in
// shared memory. The first block of a group takes the sinks, the summaries and the token itself, the others the ring
// (all blocks split a list of `extras`); the last to finish merges all (m, l, o).
#include "decode.cuh"
#include "attention.cuh"

// Mirrors `DecodeAttention` in src/ops/attention/decode.rs.
struct DecodeAttentionParams {
  const void *q;
  void *ring_k, *ring_v;        // position x in row x % capacity; the token itself is not read from it
  const void *own_k, *own_v;    // [G, D]
  void *sink_k, *sink_v;        // [sinks, G, D]
  void *mean_k, *mean_v;        // [mean_rows, G, D]: block n in row n % mean_rows
  const int *routes;            // [blocks, route_width]: a block read, or -1
  const float *route_bias;      // of each
  const Extra *extras;          // or a list of rows, instead of sinks and routes
  const void *store_k, *store_v;  // [.., G, D], on the device or in pinned host memory
  const uint32_t *table;        // [G, table_places]: rows of the store that each KV head reads, 0xffffffff for none
  const float *qkv;
  const float *q_norm, *k_norm; // [D] or null
  const float *cos, *sin;       // [D / 2]
  float *running;               // [2, G D], or null where nothing is pooled
  const DecodeState *state;
  float *partial;               // [G z, splits, 16, DIM + 4]: o, m, l, two of padding
  int *counters;                // [G z], zero between launches
  float *out;
  void *out16;
  float *lse;                   // [H]: ln of the sum of exp(logit), or null
  float *q_out;                 // [H, D]: the rotated queries, rounded as they were scored, or null; with `qkv` alone
  int extra_count, position;
  int shift;                    // positions that have no row: row x of the ring is position x + shift, and windows count rows
  int capacity, sinks, mean_rows, route_width, block, readable, table_places;
  int heads, kv_heads, dim;
  int window_kind, window_size, window_count;
  float scale, eps;
};
MIRRORED(DecodeAttentionParams, 296);
FIELD(DecodeAttentionParams, q, 0); FIELD(DecodeAttentionParams, ring_k, 8);
FIELD(DecodeAttentionParams, ring_v, 16); FIELD(DecodeAttentionParams, own_k, 24);
FIELD(DecodeAttentionParams, own_v, 32); FIELD(DecodeAttentionParams, sink_k, 40);
FIELD(DecodeAttentionParams, sink_v, 48); FIELD(DecodeAttentionParams, mean_k, 56);
FIELD(DecodeAttentionParams, mean_v, 64); FIELD(DecodeAttentionParams, routes, 72);
FIELD(DecodeAttentionParams, route_bias, 80); FIELD(DecodeAttentionParams, extras, 88);
FIELD(DecodeAttentionParams, store_k, 96); FIELD(DecodeAttentionParams, store_v, 104);
FIELD(DecodeAttentionParams, table, 112); FIELD(DecodeAttentionParams, qkv, 120);
FIELD(DecodeAttentionParams, q_norm, 128); FIELD(DecodeAttentionParams, k_norm, 136);
FIELD(DecodeAttentionParams, cos, 144); FIELD(DecodeAttentionParams, sin, 152);
FIELD(DecodeAttentionParams, running, 160); FIELD(DecodeAttentionParams, state, 168);
FIELD(DecodeAttentionParams, partial, 176); FIELD(DecodeAttentionParams, counters, 184);
FIELD(DecodeAttentionParams, out, 192); FIELD(DecodeAttentionParams, out16, 200);
FIELD(DecodeAttentionParams, lse, 208); FIELD(DecodeAttentionParams, q_out, 216);
FIELD(DecodeAttentionParams, extra_count, 224);
FIELD(DecodeAttentionParams, position, 228); FIELD(DecodeAttentionParams, shift, 232);
FIELD(DecodeAttentionParams, capacity, 236); FIELD(DecodeAttentionParams, sinks, 240);
FIELD(DecodeAttentionParams, mean_rows, 244); FIELD(DecodeAttentionParams, route_width, 248);
FIELD(DecodeAttentionParams, block, 252); FIELD(DecodeAttentionParams, readable, 256);
FIELD(DecodeAttentionParams, table_places, 260); FIELD(DecodeAttentionParams, heads, 264);
FIELD(DecodeAttentionParams, kv_heads, 268); FIELD(DecodeAttentionParams, dim, 272);
FIELD(DecodeAttentionParams, window_kind, 276); FIELD(DecodeAttentionParams, window_size, 280);
FIELD(DecodeAttentionParams, window_count, 284); FIELD(DecodeAttentionParams, scale, 288);
FIELD(DecodeAttentionParams, eps, 292);

template <typename T, int DIM> struct Decode {
  static constexpr int STEPS = DIM / 32, GROUPS = (DIM + 63) / 64, WIDE = DIM + 2, PART = DIM + 4, WARPS = 4;
  const DecodeAttentionParams &p;
  float *shared;
  T *q_own, *k_own, *v_own;  // the token's heads, in shared memory
  const int lane, warp, quad, row, kv, kv_row;
  int group, heads_here, first_head, position, left;
  bool stopped;
  uint4 q[2][STEPS];
  float o[GROUPS][8][4], m[2], l[2];

  __device__ Decode(const DecodeAttentionParams &params, float *memory)
      : p(params), shared(memory), q_own((T *)(memory + 4 * 16 * WIDE)), k_own(q_own + 16 * DIM), v_own(k_own + DIM),
        lane(threadIdx.x % WARP), warp(threadIdx.x / WARP), quad(lane % 4), row(lane / 4), kv(blockIdx.y),
        kv_row(params.kv_heads * params.dim), group(params.heads / params.kv_heads) {
    position = (p.state ? p.state->position : p.position) - p.shift;
    stopped = p.state && p.state->stopped;
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
  }

  // The token's heads into shared memory: its queries of this group, its key and its value.
  __device__ void own_heads() {
    if (!p.qkv) {
      for (int i = threadIdx.x; i < (heads_here + 2) * p.dim; i += blockDim.x) {
        const int u = i / p.dim, d = i % p.dim, rest = u - heads_here;
        if (rest < 0) q_own[u * DIM + d] = ((const T *)p.q)[(first_head + u) * p.dim + d];
        else if (rest == 0) k_own[d] = p.own_k ? ((const T *)p.own_k)[kv * p.dim + d] : from_float<T>(0.f);
        else v_own[d] = p.own_k ? ((const T *)p.own_v)[kv * p.dim + d] : from_float<T>(0.f);
      }
      __syncthreads();
      return;
    }
    constexpr int PAIRS = DIM / 64;
    const int half = p.dim / 2;
#pragma unroll 3
    for (int u = warp; u < heads_here + 2; u += WARPS) {
      const int kind = u < heads_here ? 0 : u - heads_here + 1;
      const float *from = p.qkv + (kind == 0 ? first_head + u : p.heads + (kind - 1) * p.kv_heads + kv) * p.dim;
      const float *weight = kind == 0 ? p.q_norm : kind == 1 ? p.k_norm : nullptr;
      T *to = kind == 0 ? q_own + u * DIM : kind == 1 ? k_own : v_own;
      float a[PAIRS], b[PAIRS], squares = 0.f;
#pragma unroll
      for (int j = 0; j < PAIRS; j++) {
        const int i = lane + j * WARP;
        a[j] = i < half ? from[i] : 0.f;
        b[j] = i < half ? from[i + half] : 0.f;
        squares += a[j] * a[j] + b[j] * b[j];
      }
      const float factor = weight ? 1.f / sqrtf(warp_sum(squares) / p.dim + p.eps) : 1.f;
#pragma unroll
      for (int j = 0; j < PAIRS; j++) {
        const int i = lane + j * WARP;
        if (i >= half) break;
        if (weight) {
          a[j] *= factor * weight[i];
          b[j] *= factor * weight[i + half];
        }
        if (kind < 2) {
          const float c = p.cos[i], s = p.sin[i], first = a[j];
          a[j] = first * c - b[j] * s;
          b[j] = b[j] * c + first * s;
        }
        to[i] = from_float<T>(a[j]);
        to[i + half] = from_float<T>(b[j]);
      }
    }
    __syncthreads();
    if (blockIdx.x == 0 && p.q_out)
      for (int i = threadIdx.x; i < heads_here * p.dim; i += blockDim.x)
        p.q_out[first_head * p.dim + i] = to_float(q_own[i / p.dim * DIM + i % p.dim]);
    // No other block reads these rows: the token's own is taken from shared memory.
    if (blockIdx.x == 0 && !stopped)
      for (int i = threadIdx.x; i < 2 * p.dim; i += blockDim.x) {
        const int d = i % p.dim;
        const T x = i < p.dim ? k_own[d] : v_own[d];
        T *ring = (T *)(i < p.dim ? p.ring_k : p.ring_v) + kv * p.dim + d, *sink = (T *)(i < p.dim ? p.sink_k : p.sink_v) + kv * p.dim + d;
        ring[(int64_t)(position % p.capacity) * kv_row] = x;
        if (position < p.sinks) sink[(int64_t)position * kv_row] = x;
      }
  }

  __device__ void load_queries() {
    for (int half = 0; half < 2; half++)
      for (int s = 0; s < STEPS; s++) {
        const int h = row + half * 8, d = s * 32 + quad * 8;
        q[half][s] = h < heads_here && d < p.dim ? load16(q_own + h * DIM + d) : make_uint4(0, 0, 0, 0);
      }
  }

  // Adds the token to the block in progress, and stores the mean of a block that it completes. After the summaries were
  // read: the mean may replace one of them.
  __device__ void pool() {
    if (!p.running || stopped || blockIdx.z > 0) return;
    const int n = position / p.block;
    for (int i = threadIdx.x; i < 2 * p.dim; i += blockDim.x) {
      const bool values = i >= p.dim;
      const int d = i % p.dim, c = kv * p.dim + d;
      float *running = p.running + (values ? kv_row : 0) + c;
      float sum = *running + (position >= p.sinks ? to_float(values ? v_own[d] : k_own[d]) : 0.f);
      if ((position + 1) % p.block == 0) {
        const int count = max(1, position + 1 - max(n * p.block, min(p.sinks, position + 1)));
        T *means = (T *)(values ? p.mean_v : p.mean_k);
        if (means && n < p.readable) means[(int64_t)(n % p.mean_rows) * kv_row + c] = from_float<T>(sum / count);
        sum = 0.f;
      }
      *running = sum;
    }
  }

  // Sixteen keys: `k` are the rows of keys row and row + 8, `v` of keys 2 quad, 2 quad + 1, + 8, + 9; bias of those
  // four. STREAM: from global memory.
  template <bool STREAM> __device__ void tile(const T *const (&k)[2], const T *const (&v)[4], const float (&bias)[4]) {
    uint4 key[2][STEPS], value[4][GROUPS];
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
      for (int s = 0; s < STEPS; s++) {
        const int d = s * 32 + quad * 8;
        key[n][s] = d >= p.dim ? make_uint4(0, 0, 0, 0) : STREAM ? load16_written(k[n] + d) : load16(k[n] + d);
      }
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int g = 0; g < GROUPS; g++) {
        const int d = g * 64 + row * 8;
        value[i][g] = d >= p.dim ? make_uint4(0, 0, 0, 0) : STREAM ? load16_written(v[i] + d) : load16(v[i] + d);
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
    const T *k[2], *v[4];
    float bias[4];
#pragma unroll
    for (int n = 0; n < 2; n++) {
      const int i = at + row + n * 8;
      k[n] = (const T *)p.ring_k + ring_row(i);
    }
#pragma unroll
    for (int c = 0; c < 4; c++) {
      const int i = at + quad * 2 + c % 2 + c / 2 * 8;
      v[c] = (const T *)p.ring_v + ring_row(i);
      bias[c] = i < count ? 0.f : -INFINITY;
    }
    tile<true>(k, v, bias);
  }

  // Sixteen rows that the table names.
  __device__ void listed(int at) {
    const uint32_t *own = p.table + (int64_t)kv * p.table_places;
    auto named = [&](int i) { return i < p.table_places ? own[i] : 0xffffffffu; };
    auto place = [&](uint32_t r) { return (int64_t)(r == 0xffffffffu ? 0 : r) * kv_row + kv * p.dim; };
    const T *k[2], *v[4];
    float bias[4];
#pragma unroll
    for (int n = 0; n < 2; n++) k[n] = (const T *)p.store_k + place(named(at + row + n * 8));
#pragma unroll
    for (int c = 0; c < 4; c++) {
      const uint32_t r = named(at + quad * 2 + c % 2 + c / 2 * 8);
      v[c] = (const T *)p.store_v + place(r);
      bias[c] = r == 0xffffffffu ? -INFINITY : 0.f;
    }
    tile<true>(k, v, bias);
  }

  // Extra row `i`, the token's own being the first; a bias of -inf where there is none or it is not seen.
  __device__ bool extra(int i, int sinks, const T *&k, const T *&v, float &bias) const {
    k = k_own;
    v = v_own;
    bias = i == 0 && (p.qkv || p.own_k) ? 0.f : -INFINITY;
    if (i-- == 0) return true;
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

  __device__ bool shared_out() const { return p.extras && !p.running; }

  __device__ void extras() {
    const int sinks = min(p.sinks, left), count = 1 + (p.extras ? p.extra_count : sinks + p.route_width);
    // All blocks split a long list, unless the step pools: then one block must read every row before a mean is
    // replaced.
    const int first = shared_out() ? blockIdx.x * WARPS + warp : warp, step = shared_out() ? gridDim.x * WARPS : WARPS;
    for (int at = first * 16; at < count; at += step * 16) {
      const T *k[2], *v[4], *other;
      float bias[4], unused;
      for (int n = 0; n < 2; n++) extra(at + row + n * 8, sinks, k[n], other, unused);
      for (int c = 0; c < 4; c++) extra(at + quad * 2 + c % 2 + c / 2 * 8, sinks, other, v[c], bias[c]);
      tile<false>(k, v, bias);
    }
  }

  // Output column of element c of tile t of group g.
  __device__ int column(int g, int t, int c) const { return g * 64 + (quad * 2 + c) * 8 + t; }

  __device__ void run() {
    own_heads();
    load_queries();
    const int count = position - left, tiles = (count + 15) / 16, turn = left % p.capacity;
    // The first block reads the listed rows, the others the ring.
    if (blockIdx.x == 0) {
      extras();
      __syncthreads();
      pool();
    } else {
      if (shared_out()) extras();
      const int all = tiles + (p.table_places + 15) / 16;
      for (int i = (blockIdx.x - 1) * WARPS + warp; i < all; i += (gridDim.x - 1) * WARPS)
        if (i < tiles) raw(i * 16, count, turn);
        else listed((i - tiles) * 16);
    }
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
    float *partial = p.partial + (int64_t)lists * gridDim.x * 16 * PART;
    __shared__ float few[16 * WARPS], top[16], total[16];
    weigh_parts<false>(shared, WARPS, few, top, total);
    // Four columns at a time: the last block of a group reads all parts while the others have ended, so that its loads
    // must be few and many at once.
    const int fours = p.dim / 4;
    for (int e = threadIdx.x; e < heads_here * fours; e += blockDim.x) {
      const int r = e / fours, d = e % fours * 4;
      float x[4] = {};
#pragma unroll
      for (int i = 0; i < WARPS; i++) {
        const float factor = few[r * WARPS + i];
        const float2 *o = (const float2 *)(shared + (i * 16 + r) * WIDE + d);
        x[0] += o[0].x * factor;
        x[1] += o[0].y * factor;
        x[2] += o[1].x * factor;
        x[3] += o[1].y * factor;
      }
      *(float4 *)(partial + ((int64_t)blockIdx.x * 16 + r) * PART + d) = make_float4(x[0], x[1], x[2], x[3]);
    }
    if (threadIdx.x < heads_here)
      *(float2 *)(partial + ((int64_t)blockIdx.x * 16 + threadIdx.x) * PART + DIM) = make_float2(top[threadIdx.x], total[threadIdx.x]);
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
    const int parts = gridDim.x;
    weigh_parts<true>(partial, parts, shared, top, total);
    if (p.lse && threadIdx.x < heads_here) {
      const float sum = total[threadIdx.x];
      p.lse[first_head + threadIdx.x] = sum > 0.f ? (top[threadIdx.x] + log2f(sum)) / LOG2E : -INFINITY;
    }
    for (int e = threadIdx.x; e < heads_here * fours; e += blockDim.x) {
      const int r = e / fours, d = e % fours * 4;
      float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 16
      for (int i = 0; i < parts; i++) {
        const float factor = shared[r * parts + i];
        const float4 o = __ldcg((const float4 *)(partial + ((int64_t)i * 16 + r) * PART + d));
        x.x += o.x * factor;
        x.y += o.y * factor;
        x.z += o.z * factor;
        x.w += o.w * factor;
      }
      const float scale = total[r] > 0.f ? 1.f / total[r] : 0.f;
      put(r, d, x.x * scale);
      put(r, d + 1, x.y * scale);
      put(r, d + 2, x.z * scale);
      put(r, d + 3, x.w * scale);
    }
  }

  __device__ void put(int r, int d, float x) const {
    const int at = (first_head + r) * p.dim + d;
    if (p.out16) ((T *)p.out16)[at] = from_float<T>(x);
    else p.out[at] = x;
  }

  // For each row: the greatest maximum of `parts` partial results, what each part is multiplied by to come to it, and
  // the sum.
  template <bool GLOBAL> __device__ void weigh_parts(const float *from, int parts, float *factors, float *top, float *total) {
    constexpr int ROW = GLOBAL ? PART : WIDE;
    auto read = [](const float *x) { return GLOBAL ? __ldcg((const float2 *)x) : *(const float2 *)x; };
    for (int r = warp; r < heads_here; r += WARPS) {
      float most = -INFINITY, sum = 0.f;
      for (int i = lane; i < parts; i += WARP) most = fmaxf(most, read(from + ((int64_t)i * 16 + r) * ROW + DIM).x);
      for (int d = 16; d > 0; d >>= 1) most = fmaxf(most, __shfl_xor_sync(~0u, most, d));
      for (int i = lane; i < parts; i += WARP) {
        const float2 part = read(from + ((int64_t)i * 16 + r) * ROW + DIM);
        const float factor = most == -INFINITY ? 0.f : exp2f(part.x - most);
        factors[r * parts + i] = factor;
        sum += part.y * factor;
      }
      sum = warp_sum(sum);
      if (lane == 0) {
        top[r] = most;
        total[r] = sum;
      }
    }
    __syncthreads();
  }
};

#define INSTANCE(NAME, T, DIM)                                                                                           \
  extern "C" __global__ void __launch_bounds__(128) NAME(const __grid_constant__ DecodeAttentionParams p) {              \
    extern __shared__ __align__(16) float shared[];                                                                                    \
    release_next();                                                                                                      \
    await_previous();                                                                                                    \
    Decode<T, DIM> decode(p, shared);                                                                                    \
    decode.run();                                                                                                        \
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
