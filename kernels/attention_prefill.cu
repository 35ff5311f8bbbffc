// attention_prefill: attention of a chunk on tensor cores, one pass and one softmax over sinks, ring, chunk and
// summaries.
//
//   Formula in attention.cuh. With m the running maximum of a row's logits s, in f32:
//     m' = max(m, max s),  l' = l 2^(m - m') + sum 2^(s - m'),  o' = o 2^(m - m') + 2^(s - m') V,  out = o / l
//   (FlashAttention-2, Dao 2023, arXiv:2307.08691; logits are kept in units of log2).
//
// Shapes  q [T, H, D], k, v [T, G, D], past [capacity, G, D], out [T, H, D]; bf16 or f16; D a multiple of 8, up to DIM.
// Launch  grid (tiles of BM positions, H), 32 WARPS threads, shared memory (BM + 2 BN) ROW elements.
//         Tiles lie at multiples of BM in absolute positions, so that blocks of BM or more have one left edge per tile and
//         key tiles left of it are never computed. Later tiles, which read more keys, start first.
//
// A warp owns 16 MT query rows and all keys: softmax needs no exchange between warps. K and V have one buffer each: V
// of a tile arrives while its logits are computed, the next K while V is used; two thread blocks per multiprocessor
// cover the rest.
#include "attention.cuh"

template <int DIM> struct Padded { static constexpr int ROW = DIM <= 64 ? 64 : DIM <= 128 ? 128 : 256; };

// Byte offset of 16-byte chunk `j` of row `r`: chunks are permuted within 128 bytes so that neither rows nor columns of
// 8x8 matrices collide in shared memory's banks.
template <int ROW> __device__ inline uint32_t place(int r, int j) { return r * ROW * 2 + ((j ^ (r & 7)) << 4); }

template <typename T, int DIM, int BN, int WARPS, int MT> struct Tile {
  static constexpr int BM = WARPS * 16 * MT, ROW = Padded<DIM>::ROW, CHUNKS = ROW / 8, STEPS = DIM / 16, NT = BN / 8;
  static constexpr int THREADS = WARPS * WARP, EXTRA = 16;
  static constexpr bool KEEP_Q = DIM * MT <= 128;  // Q fragments stay in registers

  const AttentionParams &p;
  const int lane, warp, head, kv, tile, first, last;  // first position of the tile; last valid position
  uint32_t sq, sk, sv;
  float o[MT][DIM / 8][4], m[MT][2], l[MT][2];
  uint32_t q[KEEP_Q ? MT : 1][KEEP_Q ? STEPS : 1][4];

  __device__ Tile(const AttentionParams &params, uint32_t shared)
      : p(params), lane(threadIdx.x % WARP), warp(threadIdx.x / WARP), head(blockIdx.y), kv(head / (params.heads / params.kv_heads)),
        tile(params.start / BM + (int)(gridDim.x - 1 - blockIdx.x)), first(tile * BM),
        last(min(tile * BM + BM, params.start + params.tokens) - 1), sq(shared), sk(shared + BM * ROW * 2),
        sv(shared + (BM + BN) * ROW * 2) {
    for (int i = 0; i < MT; i++) {
      m[i][0] = m[i][1] = -INFINITY;
      l[i][0] = l[i][1] = 0.f;
      for (int j = 0; j < DIM / 8; j++)
        for (int c = 0; c < 4; c++) o[i][j][c] = 0.f;
    }
  }

  // Absolute position of this lane's row `half` of its `i`-th 16 rows.
  __device__ int position(int i, int half) const { return first + (warp * MT + i) * 16 + lane / 4 + half * 8; }

  __device__ void load_queries(const void *source) {
    const int j = threadIdx.x % CHUNKS;
    for (int r = threadIdx.x / CHUNKS; r < BM; r += THREADS / CHUNKS) {
      const int x = first + r;
      const bool valid = x >= p.start && x <= last && j * 8 < p.dim;
      const T *row = (const T *)source + (valid ? (int64_t)(x - p.start) * p.q_row + head * p.q_head + j * 8 : 0);
      copy16(sq + place<ROW>(r, j), row, valid);
    }
  }

  __device__ void keep_queries() {
    if constexpr (KEEP_Q)
      for (int i = 0; i < MT; i++)
        for (int s = 0; s < STEPS; s++) query(q[i][s], i, s);
  }

  __device__ void query(uint32_t (&a)[4], int i, int s) const {
    load_matrices(a, sq + place<ROW>((warp * MT + i) * 16 + lane % 16, s * 2 + lane / 16));
  }

  // Raw keys (or values) of positions x0 .. x0 + BN - 1 into `to`; zeros outside [lowest, last].
  __device__ void load_raw(uint32_t to, const void *past, const void *own, int64_t own_row, int64_t own_head, int x0, int lowest) {
    const int j = threadIdx.x % CHUNKS;
    const bool column = j * 8 < p.dim;
    const T *chunk = (const T *)own + kv * own_head + j * 8;
    const T *ring = (const T *)past + kv * p.past_head + j * 8;
    const int turn = x0 < p.start ? x0 % p.capacity : 0;
    for (int r = threadIdx.x / CHUNKS; r < BN; r += THREADS / CHUNKS) {
      const int x = x0 + r;
      const T *row;
      if (x >= p.start) {
        row = chunk + (x - p.start) * own_row;
      } else {
        int at = turn + r;
        if (at >= p.capacity) at %= p.capacity;
        row = ring + at * p.past_row;
      }
      const bool valid = column && x >= lowest && x <= last;
      copy16(to + place<ROW>(r, j), valid ? row : (const T *)p.q, valid);
    }
  }

  __device__ void load_extras(int from, int count) {
    const int j = threadIdx.x % CHUNKS;
    for (int r = threadIdx.x / CHUNKS; r < EXTRA; r += THREADS / CHUNKS) {
      const bool valid = r < count && j * 8 < p.dim;
      const Extra *e = p.extras + from + r;
      copy16(sv + place<ROW>(r, j), valid ? (const T *)e->k + kv * p.dim + j * 8 : (const T *)p.q, valid);
      copy16(sv + place<ROW>(EXTRA + r, j), valid ? (const T *)e->v + kv * p.dim + j * 8 : (const T *)p.q, valid);
    }
  }

  // s = Q K^T for N columns of 8 keys at `keys`.
  template <int N> __device__ void logits(float (&s)[MT][N][4], uint32_t keys) {
    for (int i = 0; i < MT; i++)
      for (int n = 0; n < N; n++)
        for (int c = 0; c < 4; c++) s[i][n][c] = 0.f;
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      uint32_t a[MT][4];
      if constexpr (!KEEP_Q)
        for (int i = 0; i < MT; i++) query(a[i], i, step);
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        uint32_t b[4];
        load_matrices(b, keys + place<ROW>(n * 8 + lane % 8 + (lane / 16) * 8, step * 2 + (lane / 8) % 2));
#pragma unroll
        for (int i = 0; i < MT; i++) {
          if constexpr (KEEP_Q) {
            mma<T>(s[i][n], q[i][step], b[0], b[1]);
            mma<T>(s[i][n + 1], q[i][step], b[2], b[3]);
          } else {
            mma<T>(s[i][n], a[i], b[0], b[1]);
            mma<T>(s[i][n + 1], a[i], b[2], b[3]);
          }
        }
      }
    }
  }

  // Replaces logits by weights and rescales o and l to the new maximum.
  template <int N> __device__ void softmax(float (&s)[MT][N][4]) {
    const float scale = p.scale * LOG2E;
#pragma unroll
    for (int i = 0; i < MT; i++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float top = m[i][half];
#pragma unroll
        for (int n = 0; n < N; n++) top = fmaxf(top, fmaxf(s[i][n][2 * half], s[i][n][2 * half + 1]));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
        const float base = top == -INFINITY ? 0.f : top * scale;
        const float keep = exp2f(m[i][half] * scale - base);
        m[i][half] = top;
        float sum = 0.f;
#pragma unroll
        for (int n = 0; n < N; n++) {
          s[i][n][2 * half] = exp2f(fmaf(s[i][n][2 * half], scale, -base));
          s[i][n][2 * half + 1] = exp2f(fmaf(s[i][n][2 * half + 1], scale, -base));
          sum += s[i][n][2 * half] + s[i][n][2 * half + 1];
        }
        l[i][half] = l[i][half] * keep + sum;
#pragma unroll
        for (int d = 0; d < DIM / 8; d++) {
          o[i][d][2 * half] *= keep;
          o[i][d][2 * half + 1] *= keep;
        }
      }
    }
  }

  // o += P V for N columns of 8 keys, values at `values`.
  template <int N> __device__ void weigh(const float (&s)[MT][N][4], uint32_t values) {
#pragma unroll
    for (int k = 0; k < N / 2; k++) {
      uint32_t a[MT][4];
#pragma unroll
      for (int i = 0; i < MT; i++) {
        a[i][0] = pack<T>(s[i][2 * k][0], s[i][2 * k][1]);
        a[i][1] = pack<T>(s[i][2 * k][2], s[i][2 * k][3]);
        a[i][2] = pack<T>(s[i][2 * k + 1][0], s[i][2 * k + 1][1]);
        a[i][3] = pack<T>(s[i][2 * k + 1][2], s[i][2 * k + 1][3]);
      }
#pragma unroll
      for (int d = 0; d < DIM / 16; d++) {
        uint32_t b[4];
        load_matrices_transposed(b, values + place<ROW>(k * 16 + lane % 16, d * 2 + lane / 16));
#pragma unroll
        for (int i = 0; i < MT; i++) {
          mma<T>(o[i][2 * d], a[i], b[0], b[1]);
          mma<T>(o[i][2 * d + 1], a[i], b[2], b[3]);
        }
      }
    }
  }

  __device__ void mask_raw(float (&s)[MT][NT][4], int x0) const {
#pragma unroll
    for (int i = 0; i < MT; i++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int x = position(i, half), left = left_edge(p, x);
#pragma unroll
        for (int n = 0; n < NT; n++) {
#pragma unroll
          for (int c = 0; c < 2; c++) {
            const int key = x0 + n * 8 + (lane % 4) * 2 + c;
            if (key < left || key > x) s[i][n][2 * half + c] = -INFINITY;
          }
        }
      }
    }
  }

  // Extra rows [from, to): `near` of the tile's list, in shared memory's value buffer, 16 at a time.
  __device__ void extras(int from, int to) {
    for (int at = from; at < to; at += EXTRA) {
      const int count = min(EXTRA, to - at);
      load_extras(at, count);
      commit();
      wait<0>();
      __syncthreads();
      keep_queries();
      float s[MT][2][4];
      logits(s, sv);
#pragma unroll
      for (int n = 0; n < 2; n++) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
          const int r = n * 8 + (lane % 4) * 2 + c;
          const Extra *e = p.extras + at + r;
          const float bias = r < count ? e->bias / p.scale : 0.f;
          const int begin = r < count ? e->from : 1, end = r < count ? e->until : 0;
#pragma unroll
          for (int i = 0; i < MT; i++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
              const int x = position(i, half);
              float &logit = s[i][n][2 * half + c];
              logit = x >= begin && x < end ? logit + bias : -INFINITY;
            }
          }
        }
      }
      softmax(s);
      weigh(s, sv + EXTRA * ROW * 2);
      __syncthreads();
    }
  }

  __device__ void run() {
    const int begin = max(first, p.start), lowest = left_edge(p, begin), list = tile * BM / EXTRA_TILE - p.start / EXTRA_TILE;
    if (p.extras) {
      const int near = p.extra_offsets[list], far = p.far_offsets[list], end = p.extra_offsets[list + 1];
      if (far < end) {
        load_queries(p.q_far);
        extras(far, end);
      }
      load_queries(p.q);
      extras(near, far);
    } else {
      load_queries(p.q);
    }
    int x0 = lowest / BN * BN;
    load_raw(sk, p.past_k, p.k, p.k_row, p.k_head, x0, lowest);
    commit();
    wait<0>();
    __syncthreads();
    keep_queries();
    const int inner = left_edge(p, last);
    for (; x0 <= last; x0 += BN) {
      load_raw(sv, p.past_v, p.v, p.v_row, p.v_head, x0, lowest);
      commit();
      float s[MT][NT][4];
      logits(s, sk);
      if (x0 < inner || x0 + BN - 1 > begin) mask_raw(s, x0);
      wait<0>();
      __syncthreads();
      if (x0 + BN <= last) {
        load_raw(sk, p.past_k, p.k, p.k_row, p.k_head, x0 + BN, lowest);
        commit();
      }
      softmax(s);
      weigh(s, sv);
      wait<0>();
      __syncthreads();
    }
    store();
    note();  // After `store`: before it, the kernel of head dim 128 is 10% slower, asked for the log-sum-exp or not.
  }

  __device__ void note() {
    if (!p.lse) return;
#pragma unroll
    for (int i = 0; i < MT; i++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float sum = l[i][half];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        const int x = position(i, half);
        if (lane % 4 == 0 && x >= p.start && x <= last) note_lse(p, x - p.start, head, m[i][half] * p.scale, sum);
      }
    }
  }

  // Rows pass through this warp's part of the query buffer, so that stores are 16 bytes wide.
  __device__ void store() {
#pragma unroll
    for (int i = 0; i < MT; i++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float sum = l[i][half];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        const float scale = 1.f / sum;
        const int r = (warp * MT + i) * 16 + lane / 4 + half * 8;
#pragma unroll
        for (int d = 0; d < DIM / 8; d++) {
          const uint32_t pair = pack<T>(o[i][d][2 * half] * scale, o[i][d][2 * half + 1] * scale);
          asm volatile("st.shared.b32 [%0], %1;" ::"r"(sq + place<ROW>(r, d) + (lane % 4) * 4), "r"(pair));
        }
      }
    }
    __syncwarp();
    for (int c = lane; c < 16 * MT * CHUNKS; c += WARP) {
      const int r = warp * MT * 16 + c / CHUNKS, j = c % CHUNKS, x = first + r;
      if (x < p.start || x > last || j * 8 >= p.dim) continue;
      uint4 value;
      asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                   : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w) : "r"(sq + place<ROW>(r, j)));
      *(uint4 *)((T *)p.out + ((int64_t)(x - p.start) * p.heads + head) * p.dim + j * 8) = value;
    }
  }
};

// One entry point per element type and head dim: NAME_<type>_<dim>.
#define INSTANCE(NAME, T, DIM, BN, WARPS, MT)                                                                     \
  extern "C" __global__ void __launch_bounds__(WARPS *WARP, DIM <= 128 ? 2 : 1)                                   \
      NAME(const __grid_constant__ AttentionParams p) {                                                           \
    extern __shared__ __align__(128) unsigned char shared[];                                                      \
    Tile<T, DIM, BN, WARPS, MT> tile(p, shared_address(shared));                                                  \
    tile.run();                                                                                                   \
  }
// The build compiles each head dim apart, with ONLY_DIM set.
#define TYPES(DIM, BN, WARPS, MT)                                                       \
  INSTANCE(attention_prefill_bf16_##DIM, __nv_bfloat16, DIM, BN, WARPS, MT)             \
  INSTANCE(attention_prefill_f16_##DIM, __half, DIM, BN, WARPS, MT)
#if !defined(ONLY_DIM) || ONLY_DIM == 64
TYPES(64, 64, 4, 2)
#endif
#if !defined(ONLY_DIM) || ONLY_DIM == 96
TYPES(96, 64, 4, 2)
#endif
#if !defined(ONLY_DIM) || ONLY_DIM == 128
TYPES(128, 64, 4, 2)
#endif
#if !defined(ONLY_DIM) || ONLY_DIM == 256
TYPES(256, 32, 8, 1)
#endif
