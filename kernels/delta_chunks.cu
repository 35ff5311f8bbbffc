// Gated DeltaNet over a chunk of many positions, on tensor cores (src/ops/delta.rs holds the mathematics; the WY form of
// arXiv:2406.06484 with the gates of arXiv:2412.06464). Pieces of 64 positions; sums of logarithms of decays, the
// triangular solve and the state are f32, factors of products 16 bits.
//
//   delta_prepare   q, k = unit(silu(conv x)), v = silu(conv x); G_t = sum of ln g up to t;
//                   M = (I + tril(beta_t e^{G_t - G_i} k_t . k_i, -1))^-1 diag(beta), A = tril(e^{G_t - G_i} q_t . k_i)
//   delta_states    U = M (V - e^G K S), S <- e^{G_64} S + K^T e^{G_64 - G} U; keeps U and the S before each piece
//   delta_outputs   O = e^G Q S + A U, then the norm and the gate of the output
//   delta_keep      the last inputs of the convolution, for the next chunk
//
// Shapes  x T [tokens, C], z T [tokens, V D], beta, decay T [tokens, V], C = (2 K + V) D; pieces = ceil(length / 64):
//         q, k T [K, pieces, 64, D]; v T [V, pieces, 64, D]; m, a T [V, pieces, 64, 64]; sums f32 [V, pieces, 64]; by
//         fragments u T [V, pieces, 64, D] and before T [V, pieces, D, D]; state f32 [V, D, D]; ring f32 [4, C], position x in
//         row x mod 4; out T [tokens, V D].
//         D = 128, a convolution of 4. Rows of x to out are [start, start + length) of the tensors.
// Launch  delta_prepare: grid (pieces, K), 256 threads. delta_states: grid V D / COLUMNS, 128 threads. delta_outputs:
//         grid (pieces, V), 256 threads. delta_keep: grid ceil(C / 256), 256 threads. Shared memory: the structs' sizes.
//
// delta_states is a chain of three small products to a piece. It computes their transposes: what one gives is then, lane by
// lane, the left factor of the next, and a warp keeps 16 columns of the state in registers and waits for no other warp
// but those that load. S is rounded to 16 bits as a factor alone.
#include "common.cuh"
constexpr int PIECE = 64, D = 128, WIDE = D + 8, NARROW = PIECE + 8, COLUMNS = 32, SLIM = COLUMNS + 8, THREADS = 256;
constexpr int COMPUTING = COLUMNS / 16, LOADING = 64;  // of delta_states: warps that compute, threads that load
constexpr float UNIT_EPS = 1e-6f;

struct ChunkParams {
  const void *x, *z, *beta, *decay;
  const float *conv, *rate, *bias, *norm;
  void *q, *k, *v, *m, *a, *u, *before;
  float *sums, *ring, *state;
  void *out;
  int start, length, position, key_heads, value_heads, tiled;
  float eps;
  int pad;
};
MIRRORED(ChunkParams, 184);
FIELD(ChunkParams, x, 0); FIELD(ChunkParams, z, 8); FIELD(ChunkParams, beta, 16); FIELD(ChunkParams, decay, 24);
FIELD(ChunkParams, conv, 32); FIELD(ChunkParams, rate, 40); FIELD(ChunkParams, bias, 48); FIELD(ChunkParams, norm, 56);
FIELD(ChunkParams, q, 64); FIELD(ChunkParams, k, 72); FIELD(ChunkParams, v, 80); FIELD(ChunkParams, m, 88);
FIELD(ChunkParams, a, 96); FIELD(ChunkParams, u, 104); FIELD(ChunkParams, before, 112); FIELD(ChunkParams, sums, 120);
FIELD(ChunkParams, ring, 128); FIELD(ChunkParams, state, 136); FIELD(ChunkParams, out, 144);
FIELD(ChunkParams, start, 152); FIELD(ChunkParams, length, 156); FIELD(ChunkParams, position, 160);
FIELD(ChunkParams, key_heads, 164); FIELD(ChunkParams, value_heads, 168); FIELD(ChunkParams, tiled, 172);
FIELD(ChunkParams, eps, 176); FIELD(ChunkParams, pad, 180);

__device__ inline float sigmoid(float x) { return __fdividef(1.f, 1.f + __expf(-x)); }
// x sigmoid(x) = x / 2 (1 + tanh(x / 2)); the hardware's tanh is good to 11 bits, as are the 16-bit types that take the result.
__device__ inline float silu(float x) {
  const float half = 0.5f * x;
  float t;
  asm("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(half));
  return fmaf(half, t, half);
}
__device__ inline int pieces_of(const ChunkParams &p) { return (p.length + PIECE - 1) / PIECE; }

// ldmatrix addresses of a 16 x 16 tile at (row, column) of a row-major array: as the left factor, as the right factor given
// by rows of its transpose (two tiles of 8), and as either's transpose.
template <typename T> __device__ inline uint32_t left_at(const T *base, int stride, int row, int column) {
  const int lane = threadIdx.x % WARP;
  return shared_address(base + (row + lane % 16) * stride + column + lane / 16 * 8);
}
template <typename T> __device__ inline uint32_t right_at(const T *base, int stride, int row, int column) {
  const int lane = threadIdx.x % WARP;
  return shared_address(base + (row + lane % 8 + lane / 16 * 8) * stride + column + lane / 8 % 2 * 8);
}

// Copies ROWS rows of CHUNKS times 16 bytes into rows of STRIDE elements, by ALL threads; the source's rows are `wide`
// elements apart.
template <int ALL, int ROWS, int CHUNKS, int STRIDE, typename T>
__device__ inline void copy_rows(int thread, T *to, const T *from, int wide) {
  constexpr int AT_ONCE = ALL / CHUNKS;
  static_assert(ALL % CHUNKS == 0 && ROWS % AT_ONCE == 0, "whole rows at a time");
  const int row = thread / CHUNKS, column = thread % CHUNKS * 8;
  const uint32_t at = shared_address(to + row * STRIDE + column);
  from += (int64_t)row * wide + column;
#pragma unroll
  for (int i = 0; i < ROWS / AT_ONCE; i++)
    copy16(at + i * AT_ONCE * STRIDE * sizeof(T), from + (int64_t)i * AT_ONCE * wide, true);
}

// The convolution of 64 positions of 128 channels from `channel` on, eight positions to a warp, four channels to a lane:
// take(position in the piece, values, 1 or, after the last position, 0).
template <typename T, typename Take>
__device__ inline void convolve(const ChunkParams &p, int first, int channel, Take take) {
  constexpr int BACK = 3, ROWS = 8;
  const int lane = threadIdx.x % WARP, row = threadIdx.x / WARP * ROWS, all = (2 * p.key_heads + p.value_heads) * D;
  const int c = channel + 4 * lane, begin = p.start + first + row - BACK;
  const T *x = (const T *)p.x + (int64_t)begin * all + c;
  uint2 raw[BACK + ROWS];
  const bool inside = begin >= 0 && first + row + ROWS <= p.length;
  if (inside) {
#pragma unroll
    for (int r = 0; r < BACK + ROWS; r++, x += all) raw[r] = *(const uint2 *)x;
  } else {
#pragma unroll
    for (int r = 0; r < BACK + ROWS; r++, x += all) {
      raw[r] = make_uint2(0, 0);
      if (begin + r >= 0 && first + row + r - BACK < p.length) raw[r] = *(const uint2 *)x;
      if (begin + r < 0) {  // before the chunk
        const float4 old = *(const float4 *)(p.ring + (int64_t)((p.position + begin + r) & 3) * all + c);
        raw[r] = make_uint2(pack<T>(old.x, old.y), pack<T>(old.z, old.w));
      }
    }
  }
  float4 w[4];
#pragma unroll
  for (int i = 0; i < 4; i++) w[i] = *(const float4 *)(p.conv + (c + i) * 4);
  float in[BACK + ROWS][4];
#pragma unroll
  for (int r = 0; r < BACK + ROWS; r++) {
    const float2 lo = unpack<T>(raw[r].x), hi = unpack<T>(raw[r].y);
    in[r][0] = lo.x, in[r][1] = lo.y, in[r][2] = hi.x, in[r][3] = hi.y;
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    float y[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
      y[i] = silu(w[i].x * in[r][i] + w[i].y * in[r + 1][i] + w[i].z * in[r + 2][i] + w[i].w * in[r + 3][i]);
    take(row + r, y, first + row + r < p.length ? 1.f : 0.f);
  }
}

template <typename T> struct Prepare {
  T k[PIECE][WIDE], q[PIECE][WIDE];
  float l[PIECE][PIECE + 4], sum[PIECE], beta[PIECE];
};

// c += the product of two 16 x 16 blocks of l, in tf32; blocks are given by row and column.
__device__ inline void multiply_blocks(float (&c)[2][4], const float (*l)[PIECE + 4], int a_row, int a_column, int b_row, int b_column) {
  const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
  auto at = [&](int row, int column) {
    uint32_t x;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(x) : "f"(l[row][column]));
    return x;
  };
#pragma unroll
  for (int k = 0; k < 16; k += 8) {
    const int row = 16 * a_row + g, column = 16 * a_column + k + t, inner = 16 * b_row + k + t;
    const uint32_t a[4] = {at(row, column), at(row + 8, column), at(row, column + 4), at(row + 8, column + 4)};
#pragma unroll
    for (int n = 0; n < 2; n++) {
      const uint32_t b[2] = {at(inner, 16 * b_column + 8 * n + g), at(inner + 4, 16 * b_column + 8 * n + g)};
      asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                   : "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
  }
}
__device__ inline void store_block(float (*l)[PIECE + 4], int row, int column, const float (&c)[2][4], float sign) {
  float *to = &l[16 * row + threadIdx.x % WARP / 4][16 * column + threadIdx.x % 4 * 2];
#pragma unroll
  for (int n = 0; n < 2; n++) {
    *(float2 *)(to + 8 * n) = make_float2(sign * c[n][0], sign * c[n][1]);
    *(float2 *)(to + 8 * (PIECE + 4) + 8 * n) = make_float2(sign * c[n][2], sign * c[n][3]);
  }
}

// l <- l^-1 for a unit lower triangular l of four blocks of 16; the diagonal is not read, what is above it is overwritten.
// Diagonal blocks D_i by substitution in f32. With P_ij = L_ij D_j, which takes the place of block (j, i):
// M_ij = -(D_i P_ij + sum_{j < k < i} M_ik P_kj), by distance from the diagonal.
__device__ inline void invert(float (*l)[PIECE + 4]) {
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  if (warp < 4) {  // a column of a block to a lane; the lanes of the upper half do the same as those of the lower
    float x[16];
#pragma unroll
    for (int r = 0; r < 16; r++) {
      float row[16], s = r == lane % 16 ? 1.f : 0.f;
#pragma unroll
      for (int i = 0; i < r; i += 4) *(float4 *)(row + i) = *(const float4 *)&l[16 * warp + r][16 * warp + i];
#pragma unroll
      for (int i = 0; i < r; i++) s = fmaf(-row[i], x[i], s);
      x[r] = s;
    }
    __syncwarp();
#pragma unroll
    for (int r = 0; r < 16; r++) l[16 * warp + r][16 * warp + lane % 16] = x[r];
  }
  __syncthreads();
  // Warps by block: (1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2).
  const int i = warp < 1 ? 1 : warp < 3 ? 2 : 3, j = warp - i * (i - 1) / 2;
  if (warp < 6) {
    float c[2][4] = {};
    multiply_blocks(c, l, i, j, j, j);
    store_block(l, j, i, c, 1.f);
  }
#pragma unroll
  for (int distance = 1; distance < 4; distance++) {
    __syncthreads();
    if (warp < 6 && i - j == distance) {
      float c[2][4] = {};
      multiply_blocks(c, l, i, i, j, i);
#pragma unroll
      for (int d = 1; d < distance; d++) multiply_blocks(c, l, i, j + d, j, j + d);
      store_block(l, i, j, c, -1.f);
    }
  }
  __syncthreads();
}

template <typename T> __device__ void prepare(const ChunkParams &p) {
  extern __shared__ __align__(16) uint8_t raw[];
  Prepare<T> &s = *(Prepare<T> *)raw;
  const int piece = blockIdx.x, key_head = blockIdx.y, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const int pieces = pieces_of(p), first = piece * PIECE, group = p.value_heads / p.key_heads;
  auto unit = [&](T(*to)[WIDE], void *store, float scale) {
    T *out = (T *)store + ((int64_t)key_head * pieces + piece) * PIECE * D;
    return [=](int row, const float(&y)[4], float live) {
      const float square = warp_sum(y[0] * y[0] + y[1] * y[1] + y[2] * y[2] + y[3] * y[3]);
      const float r = rsqrtf(square + UNIT_EPS) * scale * live;
      const uint2 both = make_uint2(pack<T>(y[0] * r, y[1] * r), pack<T>(y[2] * r, y[3] * r));
      *(uint2 *)&to[row][4 * lane] = both;
      *(uint2 *)(out + row * D + 4 * lane) = both;
    };
  };
  auto head_of = [&](int g) { return p.tiled ? g * p.key_heads + key_head : key_head * group + g; };
  for (int g = 0; g < group; g++) {
    T *v = (T *)p.v + ((int64_t)head_of(g) * pieces + piece) * PIECE * D;
    convolve<T>(p, first, (2 * p.key_heads + head_of(g)) * D, [=](int row, const float(&y)[4], float live) {
      *(uint2 *)(v + row * D + 4 * lane) = make_uint2(pack<T>(y[0] * live, y[1] * live), pack<T>(y[2] * live, y[3] * live));
    });
  }
  convolve<T>(p, first, key_head * D, unit(s.q, p.q, rsqrtf((float)D)));
  convolve<T>(p, first, (p.key_heads + key_head) * D, unit(s.k, p.k, 1.f));
  __syncthreads();
  // Products of keys, and of queries, with keys: rows 16 (warp mod 4), columns 32 (warp / 4).
  const int row = warp % 4 * 16, column = warp / 4 * 32;
  float kk[4][4] = {}, qk[4][4] = {};
  if (column < row + 16) {
#pragma unroll
    for (int d = 0; d < D; d += 16) {
      uint32_t k[4], q[4], b[4];
      load_matrices(k, left_at(&s.k[0][0], WIDE, row, d));
      load_matrices(q, left_at(&s.q[0][0], WIDE, row, d));
#pragma unroll
      for (int n = 0; n < 2; n++) {
        load_matrices(b, right_at(&s.k[0][0], WIDE, column + 16 * n, d));
        mma<T>(kk[2 * n], k, b[0], b[1]), mma<T>(kk[2 * n + 1], k, b[2], b[3]);
        mma<T>(qk[2 * n], q, b[0], b[1]), mma<T>(qk[2 * n + 1], q, b[2], b[3]);
      }
    }
  }
  for (int g = 0; g < group; g++) {
    const int head = head_of(g);
    const int64_t at = (int64_t)head * pieces + piece;
    if (warp < 2) {  // a position to a thread
      const int i = threadIdx.x, t = first + i;
      float log = 0.f, beta = 0.f;
      if (t < p.length) {
        const int64_t from = (int64_t)(p.start + t) * p.value_heads + head;
        const float d = to_float(((const T *)p.decay)[from]) + p.bias[head];
        log = p.rate[head] * (d > 20.f ? d : log1pf(expf(d)));
        beta = sigmoid(to_float(((const T *)p.beta)[from]));
      }
#pragma unroll
      for (int d = 1; d < WARP; d *= 2) {
        const float other = __shfl_up_sync(~0u, log, d);
        if (lane >= d) log += other;
      }
      s.sum[i] = log, s.beta[i] = beta;
    }
    __syncthreads();
    if (warp == 1) s.sum[threadIdx.x] += s.sum[WARP - 1];
    __syncthreads();
    if (warp < 2) p.sums[at * PIECE + threadIdx.x] = s.sum[threadIdx.x];
    T *a = (T *)p.a + at * PIECE * PIECE;
#pragma unroll
    for (int n = 0; n < 4; n++) {
      const int i = column + 8 * n + lane % 4 * 2;
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int t = row + lane / 4 + 8 * half;
        auto kept = [&](int i) { return __expf(fminf(s.sum[t] - s.sum[i], 0.f)); };
        const float lo = kept(i), hi = kept(i + 1), *x = &kk[n][2 * half], *y = &qk[n][2 * half];
        *(uint32_t *)(a + t * PIECE + i) = pack<T>(i <= t ? lo * y[0] : 0.f, i < t ? hi * y[1] : 0.f);
        *(float2 *)&s.l[t][i] = make_float2(i < t ? s.beta[t] * lo * x[0] : 0.f, i + 1 < t ? s.beta[t] * hi * x[1] : 0.f);
      }
    }
    __syncthreads();
    invert(s.l);
    const int t = threadIdx.x / 4, from = threadIdx.x % 4 * 16;
    uint32_t packed[8];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float4 x = *(const float4 *)&s.l[t][from + 4 * i], beta = *(const float4 *)&s.beta[from + 4 * i];
      const int left = t - from - 4 * i;  // above the diagonal: zeros
      packed[2 * i] = pack<T>(left < 0 ? 0.f : x.x * beta.x, left < 1 ? 0.f : x.y * beta.y);
      packed[2 * i + 1] = pack<T>(left < 2 ? 0.f : x.z * beta.z, left < 3 ? 0.f : x.w * beta.w);
    }
    uint4 *m = (uint4 *)((T *)p.m + at * PIECE * PIECE + t * PIECE + from);
    m[0] = make_uint4(packed[0], packed[1], packed[2], packed[3]);
    m[1] = make_uint4(packed[4], packed[5], packed[6], packed[7]);
    __syncthreads();
  }
}

// The last inputs of the convolution; after `delta_prepare` of the whole chunk.
template <typename T> __device__ void keep(const ChunkParams &p) {
  const int all = (2 * p.key_heads + p.value_heads) * D, c = blockIdx.x * THREADS + threadIdx.x;
  if (c >= all) return;
  for (int at = max(p.start + p.length - 3, p.start); at < p.start + p.length; at++)
    p.ring[(int64_t)((p.position + at) & 3) * all + c] = to_float(((const T *)p.x)[(int64_t)at * all + c]);
}

template <typename T> struct Stage {
  T k[PIECE][WIDE], m[PIECE][NARROW], v[PIECE][SLIM];
  float sum[PIECE];
};
template <typename T, int STAGES> struct States {
  Stage<T> stage[STAGES];
};

// Two accumulator tiles of 8 columns side by side as a left factor of 16.
template <typename T> __device__ inline uint4 as_left(const float (&a)[4], const float (&b)[4]) {
  return make_uint4(pack<T>(a[0], a[1]), pack<T>(a[2], a[3]), pack<T>(b[0], b[1]), pack<T>(b[2], b[3]));
}
template <typename T> __device__ inline void mma2(float (&c0)[4], float (&c1)[4], uint4 a, const uint32_t (&b)[4]) {
  const uint32_t left[4] = {a.x, a.y, a.z, a.w};
  mma<T>(c0, left, b[0], b[1]), mma<T>(c1, left, b[2], b[3]);
}

// All transposed, so that what a product gives is the left factor of the next: a warp holds 16 columns of S^T [16, D].
template <typename T, int STAGES> __device__ void states(const ChunkParams &p) {
  extern __shared__ __align__(16) uint8_t raw[];
  auto &s = *(States<T, STAGES> *)raw;
  constexpr int SLICES = D / COLUMNS;
  const int head = blockIdx.x / SLICES, slice = blockIdx.x % SLICES * COLUMNS, pieces = pieces_of(p);
  const int key_head = p.tiled ? head % p.key_heads : head / (p.value_heads / p.key_heads);
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
  if (warp >= COMPUTING) {  // these warps only load
    const T *k = (const T *)p.k + (int64_t)key_head * pieces * PIECE * D, *m = (const T *)p.m + (int64_t)head * pieces * PIECE * PIECE;
    const T *v = (const T *)p.v + (int64_t)head * pieces * PIECE * D + slice;
    const float *sum = p.sums + (int64_t)head * pieces * PIECE;
    const int thread = threadIdx.x - COMPUTING * WARP;
    auto load = [&](int piece) {  // pieces in order
      if (piece < pieces) {
        Stage<T> &to = s.stage[piece % STAGES];
        copy_rows<LOADING, PIECE, D / 8, WIDE>(thread, &to.k[0][0], k, D);
        copy_rows<LOADING, PIECE, PIECE / 8, NARROW>(thread, &to.m[0][0], m, PIECE);
        copy_rows<LOADING, PIECE, COLUMNS / 8, SLIM>(thread, &to.v[0][0], v, D);
        if (thread < PIECE / 4) copy16(shared_address(&to.sum[4 * thread]), sum + 4 * thread, true);
        k += PIECE * D, m += PIECE * PIECE, v += PIECE * D, sum += PIECE;
      }
      commit();
    };
    for (int i = 0; i < STAGES - 1; i++) load(i);
    for (int piece = 0; piece < pieces; piece++) {
      wait<STAGES - 2>();
      __syncthreads();
      load(piece + STAGES - 1);  // where the piece before the one that has just begun was
    }
    return;
  }
  // own[j]: columns g and g + 8 of the warp's, channels 8 j + 2 t and the next.
  float own[D / 8][4];
  float *state = p.state + ((int64_t)head * D + 2 * t) * D + slice + 16 * warp + g;
#pragma unroll
  for (int j = 0; j < D / 8; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) own[j][i] = state[(8 * j + i % 2) * D + i / 2 * 8];
  // Left factors of 16 x 16, a lane's part in 16 bytes, as `outputs` takes them: [pieces, D / 16 columns, 16s, 32 lanes].
  const int64_t column = (int64_t)head * pieces * (D / 16) + slice / 16 + warp;
  uint4 *before = (uint4 *)p.before + column * (D / 16) * WARP + lane, *update = (uint4 *)p.u + column * (PIECE / 16) * WARP + lane;
  for (int piece = 0; piece < pieces; piece++) {
    __syncthreads();
    const Stage<T> &in = s.stage[piece % STAGES];
    const float last = in.sum[PIECE - 1];
    // S^T K^T, then V^T - e^G of it.
    float x[PIECE / 8][4] = {};
#pragma unroll
    for (int d = 0; d < D; d += 16) {
      const uint4 a = as_left<T>(own[d / 8], own[d / 8 + 1]);
      before[d / 16 * WARP] = a;
#pragma unroll
      for (int i = 0; i < PIECE; i += 16) {
        uint32_t b[4];
        load_matrices(b, right_at(&in.k[0][0], WIDE, i, d));
        mma2<T>(x[i / 8], x[i / 8 + 1], a, b);
      }
    }
    before += (D / 16) * (D / 16) * WARP;
#pragma unroll
    for (int i = 0; i < PIECE; i += 16) {
      uint32_t v[4];  // positions i on by columns: (0, 0), (8, 0), (0, 8), (8, 8)
      load_matrices_transposed(v, left_at(&in.v[0][0], SLIM, i, 16 * warp));
#pragma unroll
      for (int n = 0; n < 2; n++) {
        const float2 sums = *(const float2 *)&in.sum[i + 8 * n + 2 * t], lo = unpack<T>(v[n]), hi = unpack<T>(v[n + 2]);
        const float kept[2] = {__expf(sums.x), __expf(sums.y)};
        float(&y)[4] = x[i / 8 + n];
        y[0] = lo.x - kept[0] * y[0], y[1] = lo.y - kept[1] * y[1], y[2] = hi.x - kept[0] * y[2], y[3] = hi.y - kept[1] * y[3];
      }
    }
    // U^T = that M^T; M is lower triangular.
    float u[PIECE / 8][4] = {};
#pragma unroll
    for (int i = 0; i < PIECE; i += 16) {
      const uint4 a = as_left<T>(x[i / 8], x[i / 8 + 1]);
#pragma unroll
      for (int r = i; r < PIECE; r += 16) {
        uint32_t b[4];
        load_matrices(b, right_at(&in.m[0][0], NARROW, r, i));
        mma2<T>(u[r / 8], u[r / 8 + 1], a, b);
      }
    }
    const float kept = __expf(last);
#pragma unroll
    for (int j = 0; j < D / 8; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) own[j][i] *= kept;
#pragma unroll
    for (int i = 0; i < PIECE; i += 16) {
      update[i / 16 * WARP] = as_left<T>(u[i / 8], u[i / 8 + 1]);
#pragma unroll
      for (int n = 0; n < 2; n++) {
        const float2 sums = *(const float2 *)&in.sum[i + 8 * n + 2 * t];
        const float left[2] = {__expf(last - sums.x), __expf(last - sums.y)};
        float(&y)[4] = u[i / 8 + n];
        y[0] *= left[0], y[1] *= left[1], y[2] *= left[0], y[3] *= left[1];
      }
      const uint4 a = as_left<T>(u[i / 8], u[i / 8 + 1]);
#pragma unroll
      for (int d = 0; d < D; d += 16) {
        uint32_t b[4];
        load_matrices_transposed(b, left_at(&in.k[0][0], WIDE, i, d));
        mma2<T>(own[d / 8], own[d / 8 + 1], a, b);
      }
    }
    update += (D / 16) * (PIECE / 16) * WARP;
  }
#pragma unroll
  for (int j = 0; j < D / 8; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) state[(8 * j + i % 2) * D + i / 2 * 8] = own[j][i];
}

template <typename T> struct Outputs {
  T q[PIECE][WIDE], a[PIECE][NARROW];
  float square[D / 16][PIECE];
};

// A warp computes 16 columns of all positions. What `states` keeps is read as right factors: the left factors of S^T.
template <typename T> __device__ void outputs(const ChunkParams &p) {
  extern __shared__ __align__(16) uint8_t raw[];
  auto &s = *(Outputs<T> *)raw;
  const int piece = blockIdx.x, head = blockIdx.y, pieces = pieces_of(p), warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const int key_head = p.tiled ? head % p.key_heads : head / (p.value_heads / p.key_heads), g = lane / 4, c0 = 16 * warp + lane % 4 * 2;
  const int64_t at = (int64_t)head * pieces + piece;
  copy_rows<THREADS, PIECE, D / 8, WIDE>(threadIdx.x, &s.q[0][0], (const T *)p.q + ((int64_t)key_head * pieces + piece) * PIECE * D, D);
  copy_rows<THREADS, PIECE, PIECE / 8, NARROW>(threadIdx.x, &s.a[0][0], (const T *)p.a + at * PIECE * PIECE, PIECE);
  commit();
  const uint4 *before = (const uint4 *)p.before + (at * (D / 16) + warp) * (D / 16) * WARP + lane;
  const uint4 *update = (const uint4 *)p.u + (at * (D / 16) + warp) * (PIECE / 16) * WARP + lane;
  uint4 b[D / 16];
#pragma unroll
  for (int d = 0; d < D / 16; d++) b[d] = before[d * WARP];
  float o[PIECE / 16][2][4] = {};  // by 16 positions and 8 columns
  auto multiply = [&](float(&o)[2][4], const uint32_t (&a)[4], uint4 b) {
    mma<T>(o[0], a, b.x, b.z), mma<T>(o[1], a, b.y, b.w);
  };
  wait<0>();
  __syncthreads();
#pragma unroll
  for (int d = 0; d < D / 16; d++)
#pragma unroll
    for (int r = 0; r < PIECE / 16; r++) {
      uint32_t a[4];
      load_matrices(a, left_at(&s.q[0][0], WIDE, 16 * r, 16 * d));
      multiply(o[r], a, b[d]);
    }
#pragma unroll
  for (int i = 0; i < PIECE / 16; i++) b[i] = update[i * WARP];
  const int64_t row = (int64_t)p.value_heads * D, to = ((int64_t)(p.start + piece * PIECE) * p.value_heads + head) * D + c0;
  const int left = p.length - piece * PIECE;
#pragma unroll
  for (int r = 0; r < PIECE / 16; r++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float kept = __expf(p.sums[at * PIECE + 16 * r + g + 8 * half]);
#pragma unroll
      for (int n = 0; n < 2; n++) o[r][n][2 * half] *= kept, o[r][n][2 * half + 1] *= kept;
    }
#pragma unroll
  for (int i = 0; i < PIECE / 16; i++)
#pragma unroll
    for (int r = i; r < PIECE / 16; r++) {
      uint32_t a[4];
      load_matrices(a, left_at(&s.a[0][0], NARROW, 16 * r, 16 * i));
      multiply(o[r], a, b[i]);
    }
  uint32_t z[PIECE / 16][2][2];
#pragma unroll
  for (int r = 0; r < PIECE / 16; r++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int t = 16 * r + g + 8 * half;
#pragma unroll
      for (int n = 0; n < 2; n++) z[r][half][n] = t < left ? *(const uint32_t *)((const T *)p.z + to + t * row + 8 * n) : 0;
      const float(&x)[4] = o[r][0], (&y)[4] = o[r][1];
      float square = x[2 * half] * x[2 * half] + x[2 * half + 1] * x[2 * half + 1];
      square += y[2 * half] * y[2 * half] + y[2 * half + 1] * y[2 * half + 1];
      square += __shfl_xor_sync(~0u, square, 1);
      square += __shfl_xor_sync(~0u, square, 2);
      if (lane % 4 == 0) s.square[warp][t] = square;
    }
  const float2 w[2] = {*(const float2 *)(p.norm + c0), *(const float2 *)(p.norm + c0 + 8)};
  __syncthreads();
#pragma unroll
  for (int r = 0; r < PIECE / 16; r++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int t = 16 * r + g + 8 * half;
      float square = 0.f;
#pragma unroll
      for (int i = 0; i < D / 16; i++) square += s.square[i][t];
      const float f = rsqrtf(square / D + p.eps);
      if (t >= left) continue;
#pragma unroll
      for (int n = 0; n < 2; n++) {
        const float2 gate = unpack<T>(z[r][half][n]);
        const float lo = o[r][n][2 * half] * f * w[n].x * silu(gate.x), hi = o[r][n][2 * half + 1] * f * w[n].y * silu(gate.y);
        *(uint32_t *)((T *)p.out + to + t * row + 8 * n) = pack<T>(lo, hi);
      }
    }
}

#define INSTANCE(NAME, T)                                                                                                              \
  extern "C" __global__ void __launch_bounds__(256, 3) delta_prepare_##NAME(const __grid_constant__ ChunkParams p) { prepare<T>(p); }  \
  extern "C" __global__ void __launch_bounds__(256) delta_keep_##NAME(const __grid_constant__ ChunkParams p) { keep<T>(p); }           \
  extern "C" __global__ void __launch_bounds__(32 * COMPUTING + LOADING, 1) delta_states_##NAME##_4(const __grid_constant__ ChunkParams p) { states<T, 4>(p); } \
  extern "C" __global__ void __launch_bounds__(32 * COMPUTING + LOADING, 2) delta_states_##NAME##_2(const __grid_constant__ ChunkParams p) { states<T, 2>(p); } \
  extern "C" __global__ void __launch_bounds__(256, 2) delta_outputs_##NAME(const __grid_constant__ ChunkParams p) { outputs<T>(p); }
INSTANCE(bf16, __nv_bfloat16)
INSTANCE(f16, __half)
