// pair_forward, pair_backward, pair_finish: attention of the character model, bf16, D = 64 (src/ops/pair/mod.rs).
//
//   near:  s = (R_i q_i . R_j k_j) / 8        j <= i of the chunk itself (all j where both read in full)
//   far:   s = (R_{i+B} q_i . R_j k_j) / 8    all j of the partner chunk; _mean: one key and value, the means of its R_j k_j and v_j
//
// Shapes  qkv, dqkv [N, 3 H 64]; out, grad [N, H 64]; lse [N, H] f32, natural; far [N, H 64] f32: gradients of queries as
//         rotated for the partner; rope [2, 2 B, 32] f32. B = 128 or 16 (CHUNK), N = sequences * chunks * B.
// Launch  pair_forward_CHUNK, pair_backward_CHUNK, with or without _mean: grid (chunks, H, sequences), 2 CHUNK threads, dynamic shared memory as
//         Shared / BackShared below. pair_finish: grid any, 256 threads.
//
// Forward: a warp has 16 queries; keys of the chunk, then of the partner, pass through one set of tiles.
// Backward: a block owns a chunk as keys. It meets the chunk's own queries, then those of the chunk that it is the partner
// of, so that every gradient has one writer and no sum depends on scheduling. A warp has 16 keys: scores are computed
// transposed, keys by queries, and are as they lie the first operands of dV = P' dO and dK = dS' Q. dQ = dS K sums over
// all keys, so dS goes through shared memory.
#include "common.cuh"

constexpr int DIM = 64, HALF = DIM / 2;
using T = __nv_bfloat16;

struct PairParams {
  const T *qkv, *out, *grad;
  float *lse;
  T *to;          // forward: the output; backward: dqkv
  float *far;     // backward: [N, H, 64]
  const float *rope;
  int heads, chunks;
  int distance;   // of the partner
  int kind;       // 0: shift, 1: shift, read as means, 2: xor
};
MIRRORED(PairParams, 72);
FIELD(PairParams, qkv, 0); FIELD(PairParams, out, 8); FIELD(PairParams, grad, 16); FIELD(PairParams, lse, 24);
FIELD(PairParams, to, 32); FIELD(PairParams, far, 40); FIELD(PairParams, rope, 48); FIELD(PairParams, heads, 56);
FIELD(PairParams, chunks, 60); FIELD(PairParams, distance, 64); FIELD(PairParams, kind, 68);

// Rows of 64 elements of 16 bits, units of 16 bytes swizzled by row: rows at one unit lie in different banks.
__device__ inline int place(int row, int unit) { return row * DIM + ((unit ^ (row & 7)) << 3); }

// A chunk's rows of one part of qkv (or of grad), rotated by positions from `position` on where that is not negative.
template <int CHUNK> __device__ inline void stage(T *to, const T *from, int64_t stride, const float *rope, int position) {
  // A thread: four channels and their four partners of one row.
  for (int i = threadIdx.x; i < CHUNK * 8; i += 2 * CHUNK) {
    const int row = i / 8, c = i % 8 * 4;
    const uint2 low = *(const uint2 *)(from + row * stride + c), high = *(const uint2 *)(from + row * stride + HALF + c);
    float2 a = unpack<T>(low.x), b = unpack<T>(low.y), x = unpack<T>(high.x), y = unpack<T>(high.y);
    if (position >= 0) {
      const float4 cos = *(const float4 *)(rope + (position + row) * HALF + c);
      const float4 sin = *(const float4 *)(rope + (2 * CHUNK + position + row) * HALF + c);
      const float2 a0 = a, b0 = b;
      a = make_float2(a.x * cos.x - x.x * sin.x, a.y * cos.y - x.y * sin.y);
      b = make_float2(b.x * cos.z - y.x * sin.z, b.y * cos.w - y.y * sin.w);
      x = make_float2(x.x * cos.x + a0.x * sin.x, x.y * cos.y + a0.y * sin.y);
      y = make_float2(y.x * cos.z + b0.x * sin.z, y.y * cos.w + b0.y * sin.w);
    }
    *(uint2 *)(to + place(row, c / 8) + c % 8) = make_uint2(pack<T>(a.x, a.y), pack<T>(b.x, b.y));
    *(uint2 *)(to + place(row, 4 + c / 8) + c % 8) = make_uint2(pack<T>(x.x, x.y), pack<T>(y.x, y.y));
  }
}

// First operands: 16 rows from `row` on, 16 channels from 8 `unit` on.
__device__ inline void rows_of(uint32_t (&a)[4], const T *tile, int row, int unit) {
  const int lane = threadIdx.x % WARP;
  load_matrices(a, shared_address(tile + place(row + lane % 16, unit + lane / 16)));
}
// Second operands of x . tile': columns are 16 rows of the tile; {0, 1} the first eight, {2, 3} the others.
__device__ inline void columns_of(uint32_t (&b)[4], const T *tile, int row, int unit) {
  const int lane = threadIdx.x % WARP;
  load_matrices(b, shared_address(tile + place(row + lane % 8 + lane / 16 * 8, unit + lane / 8 % 2)));
}
// Second operands of x . tile: 16 rows from `row` on are summed over; columns 8 `unit` .. + 16.
__device__ inline void summed_of(uint32_t (&b)[4], const T *tile, int row, int unit) {
  const int lane = threadIdx.x % WARP;
  load_matrices_transposed(b, shared_address(tile + place(row + lane % 16, unit + lane / 16)));
}

// Puts the means over a chunk's rows into row 0 of the tiles; the other rows stay, and weigh nothing.
template <int CHUNK> __device__ inline void to_means(T *keys, T *values) {
  for (int i = threadIdx.x; i < 2 * DIM; i += 2 * CHUNK) {
    T *tile = i < DIM ? keys : values;
    const int unit = i % DIM / 8, c = i % 8;
    float sum = 0.f;
    for (int row = 0; row < CHUNK; row++) sum += __bfloat162float(tile[place(row, unit) + c]);
    tile[place(0, unit) + c] = __float2bfloat16_rn(sum / CHUNK);
  }
}

__device__ inline int partner_of(const PairParams &p, int c) {
  const int partner = p.kind == 2 ? c ^ p.distance : c - p.distance;
  return partner < p.chunks ? partner : -1;
}
// The chunk whose partner `c` is.
__device__ inline int reader_of(const PairParams &p, int c) {
  const int reader = p.kind == 2 ? c ^ p.distance : c + p.distance;
  return reader < p.chunks ? reader : -1;
}

template <int CHUNK> struct Shared {
  T near[CHUNK * DIM], far[CHUNK * DIM], keys[CHUNK * DIM], values[CHUNK * DIM];
};

template <int CHUNK, bool MEAN> __device__ void forward(const PairParams &p, char *memory) {
  Shared<CHUNK> &s = *(Shared<CHUNK> *)memory;
  const int c = blockIdx.x, head = blockIdx.y, sequence = blockIdx.z, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int width = p.heads * DIM;
  const int64_t stride = 3 * width;
  auto rows = [&](int chunk, int part) { return p.qkv + ((int64_t)(sequence * p.chunks + chunk) * CHUNK) * stride + part * width + head * DIM; };
  const int partner = partner_of(p, c);
  stage<CHUNK>(s.near, rows(c, 0), stride, p.rope, 0);
  stage<CHUNK>(s.far, rows(c, 0), stride, p.rope, CHUNK);
  float o[DIM / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, sum[2] = {};
  const float scale = LOG2E / 8.f;
  for (int part = 0; part < 2; part++) {
    const int from = part == 0 ? c : partner;
    if (from < 0) break;
    if (part) __syncthreads();
    stage<CHUNK>(s.keys, rows(from, 1), stride, p.rope, 0);
    stage<CHUNK>(s.values, rows(from, 2), stride, p.rope, -1);
    __syncthreads();
    const bool mean = MEAN && part;
    if (mean) {
      to_means<CHUNK>(s.keys, s.values);
      __syncthreads();
    }
    const T *queries = part == 0 ? s.near : s.far;
    const bool causal = part == 0 && p.kind != 2;
    const int until = mean ? 16 : causal ? (warp + 1) * 16 : CHUNK;
    for (int key = 0; key < until; key += 16) {
      float x[2][4] = {};
#pragma unroll
      for (int unit = 0; unit < 8; unit += 2) {
        uint32_t a[4], b[4];
        rows_of(a, queries, warp * 16, unit);
        columns_of(b, s.keys, key, unit);
        mma<T>(x[0], a, b[0], b[1]);
        mma<T>(x[1], a, b[2], b[3]);
      }
#pragma unroll
      for (int h = 0; h < 2; h++) {  // rows lane / 4 and lane / 4 + 8
        float most = top[h];
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
          for (int e = 0; e < 2; e++) {
            float &v = x[j][2 * h + e];
            v *= scale;
            const int of = key + j * 8 + lane % 4 * 2 + e;
            if (mean ? of > 0 : causal && of > warp * 16 + lane / 4 + h * 8) v = -INFINITY;
            most = fmaxf(most, v);
          }
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
        const float keep = exp2f(top[h] - most);  // the first tile holds a key for every query
        top[h] = most;
        sum[h] *= keep;
#pragma unroll
        for (int d = 0; d < DIM / 8; d++) o[d][2 * h] *= keep, o[d][2 * h + 1] *= keep;
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
          for (int e = 0; e < 2; e++) sum[h] += x[j][2 * h + e] = exp2f(x[j][2 * h + e] - most);
      }
      const uint32_t a[4] = {pack<T>(x[0][0], x[0][1]), pack<T>(x[0][2], x[0][3]), pack<T>(x[1][0], x[1][1]), pack<T>(x[1][2], x[1][3])};
#pragma unroll
      for (int d = 0; d < DIM / 8; d += 2) {
        uint32_t b[4];
        summed_of(b, s.values, key, d);
        mma<T>(o[d], a, b[0], b[1]);
        mma<T>(o[d + 1], a, b[2], b[3]);
      }
    }
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
    sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
    const int64_t row = (int64_t)(sequence * p.chunks + c) * CHUNK + warp * 16 + lane / 4 + h * 8;
    const float inverse = 1.f / sum[h];
#pragma unroll
    for (int d = 0; d < DIM / 8; d++)
      *(uint32_t *)(p.to + row * width + head * DIM + d * 8 + lane % 4 * 2) = pack<T>(o[d][2 * h] * inverse, o[d][2 * h + 1] * inverse);
    if (lane % 4 == 0) p.lse[row * p.heads + head] = top[h] / LOG2E + logf(sum[h]);
  }
}

template <int CHUNK> struct BackShared {
  T keys[CHUNK * DIM], values[CHUNK * DIM], queries[CHUNK * DIM], grads[CHUNK * DIM];
  T ds[CHUNK * (CHUNK + 8)];  // [query][key]; rows of CHUNK + 8: 16 bytes apart modulo the banks
  float lse[CHUNK], dots[CHUNK];
  float means[2 * DIM];  // of keys, then of values: what row 0 had before them, then a row's share of their gradients
};

template <int CHUNK, bool MEAN> __device__ void backward(const PairParams &p, char *memory) {
  constexpr int ROW = CHUNK + 8, AT_ONCE = CHUNK < 64 ? CHUNK : 64;  // queries of a warp's tiles
  BackShared<CHUNK> &s = *(BackShared<CHUNK> *)memory;
  const int c = blockIdx.x, head = blockIdx.y, sequence = blockIdx.z, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int width = p.heads * DIM;
  const int64_t stride = 3 * width;
  auto first_row = [&](int chunk) { return (int64_t)(sequence * p.chunks + chunk) * CHUNK; };
  auto rows = [&](int chunk, int part) { return p.qkv + first_row(chunk) * stride + part * width + head * DIM; };
  stage<CHUNK>(s.keys, rows(c, 1), stride, p.rope, 0);
  stage<CHUNK>(s.values, rows(c, 2), stride, p.rope, -1);
  float dk[DIM / 8][4] = {}, dv[DIM / 8][4] = {};
  const float scale = LOG2E / 8.f;
  for (int part = 0; part < 2; part++) {
    const int reader = part == 0 ? c : reader_of(p, c);
    if (reader < 0) break;
    if (part) __syncthreads();
    const bool mean = MEAN && part;
    if (mean) {
      to_means<CHUNK>(s.keys, s.values);
      // Row 0 of the sums, which four lanes hold, takes the gradients of the means; its own are put aside.
      if (threadIdx.x < 4)
#pragma unroll
        for (int n = 0; n < DIM / 8; n++)
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const int channel = n * 8 + lane * 2 + e;
            s.means[channel] = dk[n][e], s.means[DIM + channel] = dv[n][e];
            dk[n][e] = dv[n][e] = 0.f;
          }
    }
    stage<CHUNK>(s.queries, rows(reader, 0), stride, p.rope, part * CHUNK);
    stage<CHUNK>(s.grads, p.grad + first_row(reader) * width + head * DIM, width, p.rope, -1);
    for (int i = threadIdx.x / 2; i < CHUNK; i += CHUNK) {  // two threads a row
      const int64_t at = (first_row(reader) + i) * width + head * DIM + threadIdx.x % 2 * 32;
      float dot = 0.f;
#pragma unroll
      for (int e = 0; e < 32; e += 8) {
        const uint4 g = *(const uint4 *)(p.grad + at + e), o = *(const uint4 *)(p.out + at + e);
        const uint32_t gs[4] = {g.x, g.y, g.z, g.w}, os[4] = {o.x, o.y, o.z, o.w};
#pragma unroll
        for (int k = 0; k < 4; k++) {
          const float2 a = unpack<T>(gs[k]), b = unpack<T>(os[k]);
          dot += a.x * b.x + a.y * b.y;
        }
      }
      dot += __shfl_xor_sync(~0u, dot, 1);
      if (threadIdx.x % 2 == 0) s.dots[i] = dot, s.lse[i] = p.lse[(first_row(reader) + i) * p.heads + head] * LOG2E;
    }
    __syncthreads();
    const bool causal = part == 0 && p.kind != 2;
    for (int from = causal ? warp * 16 / AT_ONCE * AT_ONCE : 0; from < CHUNK && !(mean && warp); from += AT_ONCE) {
      float x[AT_ONCE / 8][4] = {}, y[AT_ONCE / 8][4] = {};
#pragma unroll
      for (int unit = 0; unit < 8; unit += 2) {
        uint32_t k[4], v[4];
        rows_of(k, s.keys, warp * 16, unit);
        rows_of(v, s.values, warp * 16, unit);
#pragma unroll
        for (int j = 0; j < AT_ONCE / 8; j += 2) {
          uint32_t b[4];
          columns_of(b, s.queries, from + j * 8, unit);
          mma<T>(x[j], k, b[0], b[1]);
          mma<T>(x[j + 1], k, b[2], b[3]);
          columns_of(b, s.grads, from + j * 8, unit);
          mma<T>(y[j], v, b[0], b[1]);
          mma<T>(y[j + 1], v, b[2], b[3]);
        }
      }
      // x: P', y: dS' / scale, keys by queries.
#pragma unroll
      for (int j = 0; j < AT_ONCE / 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const int query = from + j * 8 + lane % 4 * 2 + e % 2, key = warp * 16 + lane / 4 + e / 2 * 8;
          const float w = (mean ? key > 0 : causal && key > query) ? 0.f : exp2f(x[j][e] * scale - s.lse[query]);
          x[j][e] = w;
          y[j][e] = w * (y[j][e] - s.dots[query]) * 0.125f;
          s.ds[query * ROW + key] = __float2bfloat16_rn(y[j][e]);
        }
#pragma unroll
      for (int j = 0; j < AT_ONCE / 8; j += 2) {
        const uint32_t a[4] = {pack<T>(x[j][0], x[j][1]), pack<T>(x[j][2], x[j][3]), pack<T>(x[j + 1][0], x[j + 1][1]), pack<T>(x[j + 1][2], x[j + 1][3])};
        const uint32_t d[4] = {pack<T>(y[j][0], y[j][1]), pack<T>(y[j][2], y[j][3]), pack<T>(y[j + 1][0], y[j + 1][1]), pack<T>(y[j + 1][2], y[j + 1][3])};
#pragma unroll
        for (int n = 0; n < DIM / 8; n += 2) {
          uint32_t b[4];
          summed_of(b, s.grads, from + j * 8, n);
          mma<T>(dv[n], a, b[0], b[1]);
          mma<T>(dv[n + 1], a, b[2], b[3]);
          summed_of(b, s.queries, from + j * 8, n);
          mma<T>(dk[n], d, b[0], b[1]);
          mma<T>(dk[n + 1], d, b[2], b[3]);
        }
      }
    }
    __syncthreads();
    // dQ of 16 queries a warp: over keys up to its own where causal, which is what was written.
    float dq[DIM / 8][4] = {};
    const int until = mean ? 16 : causal ? (warp + 1) * 16 : CHUNK;
    for (int key = 0; key < until; key += 16) {
      uint32_t a[4];
      load_matrices(a, shared_address(s.ds + (warp * 16 + lane % 16) * ROW + key + lane / 16 * 8));
#pragma unroll
      for (int n = 0; n < DIM / 8; n += 2) {
        uint32_t b[4];
        summed_of(b, s.keys, key, n);
        mma<T>(dq[n], a, b[0], b[1]);
        mma<T>(dq[n + 1], a, b[2], b[3]);
      }
    }
    // Rotated back: channel n * 8 + .. and its partner, 32 further, are in one lane.
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int row = warp * 16 + lane / 4 + h * 8, position = row + part * CHUNK;
#pragma unroll
      for (int n = 0; n < HALF / 8; n++) {
        const int channel = n * 8 + lane % 4 * 2;
        const float2 cos = *(const float2 *)(p.rope + position * HALF + channel);
        const float2 sin = *(const float2 *)(p.rope + (2 * CHUNK + position) * HALF + channel);
        const float *a = &dq[n][2 * h], *b = &dq[n + HALF / 8][2 * h];
        const float2 low = make_float2(a[0] * cos.x + b[0] * sin.x, a[1] * cos.y + b[1] * sin.y);
        const float2 high = make_float2(b[0] * cos.x - a[0] * sin.x, b[1] * cos.y - a[1] * sin.y);
        if (part == 0) {
          T *to = p.to + (first_row(reader) + row) * stride + head * DIM + channel;
          *(uint32_t *)to = pack<T>(low.x, low.y), *(uint32_t *)(to + HALF) = pack<T>(high.x, high.y);
        } else {
          float *to = p.far + (first_row(reader) + row) * width + head * DIM + channel;
          *(float2 *)to = low, *(float2 *)(to + HALF) = high;
        }
      }
    }
  }
  if (MEAN && reader_of(p, c) >= 0) {
    if (threadIdx.x < 4)
#pragma unroll
      for (int n = 0; n < DIM / 8; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const int channel = n * 8 + lane * 2 + e;
          const float own_key = s.means[channel], own_value = s.means[DIM + channel];
          s.means[channel] = dk[n][e] / CHUNK, s.means[DIM + channel] = dv[n][e] / CHUNK;
          dk[n][e] = own_key, dv[n][e] = own_value;
        }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < DIM / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int channel = n * 8 + lane % 4 * 2 + e % 2;
        dk[n][e] += s.means[channel], dv[n][e] += s.means[DIM + channel];
      }
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int row = warp * 16 + lane / 4 + h * 8;
    T *to = p.to + (first_row(c) + row) * stride + head * DIM;
#pragma unroll
    for (int n = 0; n < DIM / 8; n++)
      *(uint32_t *)(to + 2 * width + n * 8 + lane % 4 * 2) = pack<T>(dv[n][2 * h], dv[n][2 * h + 1]);
#pragma unroll
    for (int n = 0; n < HALF / 8; n++) {
      const int channel = n * 8 + lane % 4 * 2;
      const float2 cos = *(const float2 *)(p.rope + row * HALF + channel), sin = *(const float2 *)(p.rope + (2 * CHUNK + row) * HALF + channel);
      const float *a = &dk[n][2 * h], *b = &dk[n + HALF / 8][2 * h];
      *(uint32_t *)(to + width + channel) = pack<T>(a[0] * cos.x + b[0] * sin.x, a[1] * cos.y + b[1] * sin.y);
      *(uint32_t *)(to + width + channel + HALF) = pack<T>(b[0] * cos.x - a[0] * sin.x, b[1] * cos.y - a[1] * sin.y);
    }
  }
}

// Adds the far part to the gradients of queries that have a partner.
template <int CHUNK> __device__ void finish(const PairParams &p, int rows) {
  const int width = p.heads * DIM;
  const int64_t count = (int64_t)rows * width / 8;
  for (int64_t i = blockIdx.x * 256ll + threadIdx.x; i < count; i += gridDim.x * 256ll) {
    const int64_t row = i * 8 / width;
    if (partner_of(p, (int)(row / CHUNK % p.chunks)) < 0) continue;
    const float4 a = *(const float4 *)(p.far + i * 8), b = *(const float4 *)(p.far + i * 8 + 4);
    uint4 *to = (uint4 *)(p.to + row * 3 * width + i * 8 % width);
    uint4 x = *to;
    const float2 w[4] = {unpack<T>(x.x), unpack<T>(x.y), unpack<T>(x.z), unpack<T>(x.w)};
    *to = make_uint4(pack<T>(w[0].x + a.x, w[0].y + a.y), pack<T>(w[1].x + a.z, w[1].y + a.w), pack<T>(w[2].x + b.x, w[2].y + b.y),
                     pack<T>(w[3].x + b.z, w[3].y + b.w));
  }
}

#define PAIR(CHUNK, SUFFIX, MEAN)                                                                                            \
  extern "C" __global__ void __launch_bounds__(2 * CHUNK) pair_forward_##CHUNK##SUFFIX(const __grid_constant__ PairParams p) {  \
    extern __shared__ __align__(128) char shared[];                                                                          \
    forward<CHUNK, MEAN>(p, shared);                                                                                         \
  }                                                                                                                          \
  extern "C" __global__ void __launch_bounds__(2 * CHUNK) pair_backward_##CHUNK##SUFFIX(const __grid_constant__ PairParams p) { \
    extern __shared__ __align__(128) char shared[];                                                                          \
    backward<CHUNK, MEAN>(p, shared);                                                                                        \
  }
#define FINISH(CHUNK)                                                                                                        \
  extern "C" __global__ void __launch_bounds__(256) pair_finish_##CHUNK(const __grid_constant__ PairParams p, int rows) {    \
    finish<CHUNK>(p, rows);                                                                                                  \
  }
PAIR(128, , false)
PAIR(128, _mean, true)
PAIR(16, , false)
PAIR(16, _mean, true)
FINISH(128)
FINISH(16)
