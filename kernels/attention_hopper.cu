// attention_hopper: attention_prefill for compute capability 9.0, on warpgroup matrix products.
//
//   Formula in attention.cuh, recurrence in attention_prefill.cu.
//
// Shapes  as attention_prefill; without queries of a store, for which attention_prefill is used.
// Launch  grid (H, tiles of 128 positions), 384 threads, shared memory SHARED.
//
// One warpgroup gathers keys and values (each row from ring or chunk by its own address) into rings of STAGES tiles;
// two warpgroups own 64 query rows each. While a consumer's products of one tile with V run, it takes the next tile's
// logits through softmax (FlashAttention-3, Shah et al. 2024, arXiv:2407.08608, section 3.2). Sinks and summaries come
// first, 16 at a time; raw blocks fill tiles of their own, ahead of the window's.
#include "attention.cuh"
#include "wgmma.cuh"

// Whether runs of rows are read; a separate module (attention_hopper_pieces.cu), since their masks cost registers.
#ifndef WITH_PIECES
#define WITH_PIECES 0
#endif

template <typename T, int DIM, int BN, int STAGES> struct Hopper {
  static constexpr int BM = 128, ROW = DIM <= 64 ? 64 : DIM <= 128 ? 128 : 256, EXTRA = 16, GROUP = 128;
  static constexpr int NT = BN / 8, STEPS = DIM / 16, CHUNKS = ROW / 8, PASS = GROUP / CHUNKS;
  static constexpr int PIECES = BN / PIECE;
  static constexpr int TILE = BN * ROW * 2, SMALL = EXTRA * ROW * 2;
  static constexpr int Q = 0, K = Q + BM * ROW * 2, V = K + STAGES * TILE, XK = V + STAGES * TILE, XV = XK + SMALL;
  static constexpr int BARRIERS = XV + SMALL, SHARED = BARRIERS + (4 * STAGES + 2) * 8 + 1024;

  const AttentionParams &p;
  const uint32_t base;
  // `end` is the last raw position to read: without keys of the chunk's own, the one before it.
  const int head, kv, tile, first, last, end, begin, lowest, x_first, tiles;
  int extra_from, extra_to;
#if WITH_PIECES
  int piece_from, piece_to, listed;
#else
  static constexpr int piece_from = 0, piece_to = 0, listed = 0;
#endif

  __device__ Hopper(const AttentionParams &params, uint32_t shared)
      : p(params), base((shared + 1023) & ~1023u), head(blockIdx.x), kv(head / (params.heads / params.kv_heads)),
        tile(params.start / BM + (int)(gridDim.y - 1 - blockIdx.y)), first(tile * BM),
        last(min(tile * BM + BM, params.start + params.tokens) - 1), end(params.k ? last : min(last, params.start - 1)),
        begin(max(first, params.start)), lowest(left_edge(params, begin)), x_first(lowest / BN * BN),
        tiles((end - x_first) / BN + 1), extra_from(0), extra_to(0) {
    if (p.extras) {
      const int list = tile - p.start / EXTRA_TILE;
      extra_from = p.extra_offsets[list];
      extra_to = p.extra_offsets[list + 1];
    }
#if WITH_PIECES
    const int list = tile - p.start / EXTRA_TILE;
    piece_from = p.piece_offsets[list];
    piece_to = p.piece_offsets[list + 1];
    listed = (piece_to - piece_from + PIECES - 1) / PIECES;
#endif
  }

  __device__ uint32_t full_k(int s) const { return base + BARRIERS + s * 8; }
  __device__ uint32_t free_k(int s) const { return base + BARRIERS + (STAGES + s) * 8; }
  __device__ uint32_t full_v(int s) const { return base + BARRIERS + (2 * STAGES + s) * 8; }
  __device__ uint32_t free_v(int s) const { return base + BARRIERS + (3 * STAGES + s) * 8; }
  __device__ uint32_t full_x() const { return base + BARRIERS + 4 * STAGES * 8; }
  __device__ uint32_t free_x() const { return full_x() + 8; }

  __device__ void init() const {
    if (threadIdx.x == 0) {
      for (int s = 0; s < STAGES; s++) {
        barrier_init(full_k(s), 4);
        barrier_init(full_v(s), 4);
        barrier_init(free_k(s), 8);
        barrier_init(free_v(s), 8);
      }
      barrier_init(full_x(), 4);
      barrier_init(free_x(), 8);
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
  }

  // ---- the gathering warpgroup ----

  // Raw keys (or values) of positions x0 .. x0 + BN - 1; zeros outside [lowest, end].
  __device__ void gather(uint32_t to, const void *past, const void *own, int64_t own_row, int64_t own_head, int x0) const {
    const int j = threadIdx.x % CHUNKS, r0 = threadIdx.x / CHUNKS;
    const bool column = j * 8 < p.dim;
    if (DIM < ROW && j * 8 >= DIM) return;
    const T *chunk = (const T *)own + kv * own_head + j * 8;
    const T *ring = (const T *)past + kv * p.past_head + j * 8;
    const int turn = x0 < p.start ? x0 % p.capacity : 0;
    const bool in_chunk = x0 >= p.start, in_ring = x0 + BN <= p.start && turn + BN <= p.capacity;
    if ((in_chunk || in_ring) && x0 >= lowest && x0 + BN - 1 <= end) {
      const int64_t stride = in_chunk ? own_row : p.past_row;
      const T *row = (in_chunk ? chunk + (x0 - p.start) * stride : ring + turn * stride) + r0 * stride;
#pragma unroll
      for (int i = 0; i < BN / PASS; i++) {
        copy16(to + panel_place(BN, r0 + i * PASS, j), column ? row : (const T *)p.q, column);
        row += PASS * stride;
      }
      return;
    }
    for (int r = r0; r < BN; r += PASS) {
      const int x = x0 + r;
      const T *row;
      if (x >= p.start) {
        row = chunk + (x - p.start) * own_row;
      } else {
        int at = turn + r;
        if (at >= p.capacity) at %= p.capacity;
        row = ring + at * p.past_row;
      }
      const bool valid = column && x >= lowest && x <= end;
      copy16(to + panel_place(BN, r, j), valid ? row : (const T *)p.q, valid);
    }
  }

  // Keys (or values) of PIECES pieces, PIECE rows to each; zeros where there are fewer.
  __device__ void gather_pieces(uint32_t to, bool keys, int at) const {
    const int j = threadIdx.x % CHUNKS;
    if (DIM < ROW && j * 8 >= DIM) return;
#pragma unroll 4
    for (int r = threadIdx.x / CHUNKS; r < BN; r += PASS) {
      const Piece *piece = p.pieces + at + r / PIECE;
      const bool valid = at + r / PIECE < piece_to && j * 8 < p.dim && r % PIECE < piece->rows;
      const T *row = (const T *)p.q;
      if (valid) row = (const T *)(keys ? piece->k : piece->v) + (r % PIECE * p.kv_heads + kv) * p.dim + j * 8;
      copy16(to + panel_place(BN, r, j), row, valid);
    }
  }

  // Tile `i` of all: the listed pieces, then the raw positions.
  __device__ void gather_keys(uint32_t to, int i) const {
    if (i < listed) gather_pieces(to, true, piece_from + i * PIECES);
    else gather(to, p.past_k, p.k, p.k_row, p.k_head, x_first + (i - listed) * BN);
  }
  __device__ void gather_values(uint32_t to, int i) const {
    if (i < listed) gather_pieces(to, false, piece_from + i * PIECES);
    else gather(to, p.past_v, p.v, p.v_row, p.v_head, x_first + (i - listed) * BN);
  }

  // Signals that this warp's copies, except the last LATER groups, have arrived.
  template <int LATER> __device__ void publish(uint32_t barrier) const {
    wait<LATER>();
    fence_async();
    __syncwarp();
    if (threadIdx.x % WARP == 0) barrier_arrive(barrier);
  }

  __device__ void produce() const {
    for (int at = extra_from, i = 0; at < extra_to; at += EXTRA, i++) {
      barrier_wait(free_x(), (i & 1) ^ 1);
      const int j = threadIdx.x % CHUNKS, count = min(EXTRA, extra_to - at);
      for (int r = threadIdx.x / CHUNKS; r < EXTRA; r += PASS) {
        if (DIM < ROW && j * 8 >= DIM) break;
        const bool valid = r < count && j * 8 < p.dim;
        const Extra *e = p.extras + at + r;
        copy16(base + XK + panel_place(EXTRA, r, j), valid ? (const T *)e->k + kv * p.dim + j * 8 : (const T *)p.q, valid);
        copy16(base + XV + panel_place(EXTRA, r, j), valid ? (const T *)e->v + kv * p.dim + j * 8 : (const T *)p.q, valid);
      }
      commit();
      publish<0>(full_x());
    }
    // Each tile is published once the next one's copies are under way.
    const int total = listed + tiles;
    for (int i = 0; i < total; i++) {
      const int s = i % STAGES, round = (i / STAGES) & 1;
      barrier_wait(free_k(s), round ^ 1);
      gather_keys(base + K + s * TILE, i);
      commit();
      if (i > 0) publish<1>(full_v((i - 1) % STAGES));
      barrier_wait(free_v(s), round ^ 1);
      gather_values(base + V + s * TILE, i);
      commit();
      publish<1>(full_k(s));
    }
    publish<0>(full_v((total - 1) % STAGES));
  }

  // ---- a consuming warpgroup ----

  struct Rows {
    float o[DIM / 2], m[2], l[2], keep[2];
  };

  __device__ int position(int group, int half) const {
    return first + group * 64 + (threadIdx.x % GROUP) / WARP * 16 + threadIdx.x % WARP / 4 + half * 8;
  }

  __device__ void load_queries(int group) const {
    const int j = threadIdx.x % CHUNKS;
    for (int r = threadIdx.x % GROUP / CHUNKS; r < 64; r += PASS) {
      if (DIM < ROW && j * 8 >= DIM) break;
      const int x = first + group * 64 + r;
      const bool valid = x >= p.start && x <= last && j * 8 < p.dim;
      const T *row = (const T *)p.q + (valid ? (int64_t)(x - p.start) * p.q_row + head * p.q_head + j * 8 : 0);
      copy16(base + Q + panel_place(BM, group * 64 + r, j), row, valid);
    }
    commit();
    wait<0>();
    fence_async();
    named_sync(1 + group, GROUP);
  }

  // s = Q K^T; N keys in panels of `rows` rows.
  template <int N> __device__ static void logits(float (&s)[N / 2], uint32_t q, uint32_t keys) {
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      const int panel = step / 4, inside = step % 4 * 32;
      Wgmma<T, N>::shared(s, matrix_descriptor(q + panel * BM * 128 + inside, 16), matrix_descriptor(keys + panel * N * 128 + inside, 16),
                          step > 0);
    }
  }

  // o += P V; N keys in panels of N rows.
  template <int N> __device__ static void weigh(float (&o)[DIM / 2], const uint32_t (&w)[N / 16][4], uint32_t values) {
#pragma unroll
    for (int k = 0; k < N / 16; k++) Wgmma<T, DIM>::registers(o, w[k], matrix_descriptor(values + k * 2048, N * 128));
  }

  template <int N> __device__ static void pack_weights(uint32_t (&w)[N / 16][4], const float (&s)[N / 2]) {
#pragma unroll
    for (int k = 0; k < N / 16; k++) {
#pragma unroll
      for (int i = 0; i < 4; i++) w[k][i] = pack<T>(s[k * 8 + 2 * i], s[k * 8 + 2 * i + 1]);
    }
  }

  // Logits to weights, in place; `keep` is what o must be multiplied by.
  template <int N> __device__ void softmax(float (&s)[N / 2], Rows &rows) const {
    const float scale = p.scale * LOG2E;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float top = rows.m[half];
#pragma unroll
      for (int n = 0; n < N / 8; n++) top = fmaxf(top, fmaxf(s[n * 4 + half * 2], s[n * 4 + half * 2 + 1]));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      const float from = top == -INFINITY ? 0.f : top * scale;
      rows.keep[half] = exp2f(rows.m[half] * scale - from);
      rows.m[half] = top;
      float sum = 0.f;
#pragma unroll
      for (int n = 0; n < N / 8; n++) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
          float &x = s[n * 4 + half * 2 + c];
          x = exp2f(fmaf(x, scale, -from));
          sum += x;
        }
      }
      rows.l[half] = rows.l[half] * rows.keep[half] + sum;
    }
  }

  __device__ static void rescale(Rows &rows) {
#pragma unroll
    for (int d = 0; d < DIM / 8; d++) {
#pragma unroll
      for (int c = 0; c < 4; c++) rows.o[d * 4 + c] *= rows.keep[c / 2];
    }
  }

  __device__ void mask_raw(float (&s)[BN / 2], int group, int x0) const {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int x = position(group, half), left = left_edge(p, x), right = min(x, end);
#pragma unroll
      for (int n = 0; n < NT; n++) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
          const int key = x0 + n * 8 + (threadIdx.x % 4) * 2 + c;
          if (key < left || key > right) s[n * 4 + half * 2 + c] = -INFINITY;
        }
      }
    }
  }

  __device__ void mask_pieces(float (&s)[BN / 2], int group, int at) const {
    // Most tiles are whole pieces that all of the group's rows see.
    const int lane = threadIdx.x % WARP, low = max(first + group * 64, p.start), end = min(first + group * 64 + 63, last);
    bool plain = true;
    if (lane < PIECES) {
      const Piece *piece = p.pieces + at + lane;
      plain = at + lane < piece_to && piece->bias == 0.f && piece->from <= low && piece->until > end && piece->rows == PIECE;
    }
    if (__all_sync(~0u, plain)) return;
    const int high = position(group, 0);
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
      const bool any = at + i < piece_to;
      const Piece *piece = p.pieces + at + i;
      const float bias = any ? piece->bias / p.scale : 0.f;
      const int from = any ? piece->from : 1, until = any ? piece->until : 0, rows = any ? piece->rows : 0;
#pragma unroll
      for (int n = 0; n < 2; n++) {
#pragma unroll
        for (int c = 0; c < 4; c++) {
          const int x = high + c / 2 * 8, r = n * 8 + (threadIdx.x % 4) * 2 + c % 2;
          float &logit = s[(i * 2 + n) * 4 + c];
          logit = x >= from && x < until && r < rows ? logit + bias : -INFINITY;
        }
      }
    }
  }

  // Masks what group `group` may not see of tile `i`. Tiles within the windows of all its rows need no mask.
  __device__ void mask(float (&s)[BN / 2], int group, int i, int inner, int low) const {
    const int x0 = x_first + (i - listed) * BN;
    if (i < listed) mask_pieces(s, group, piece_from + i * PIECES);
    else if (x0 < inner || x0 + BN - 1 > min(low, end)) mask_raw(s, group, x0);
  }

  __device__ void release(uint32_t barrier) const {
    if (threadIdx.x % WARP == 0) barrier_arrive(barrier);
  }

  __device__ void extras(Rows &rows, int group, uint32_t q) const {
    for (int at = extra_from, i = 0; at < extra_to; at += EXTRA, i++) {
      const int count = min(EXTRA, extra_to - at);
      barrier_wait(full_x(), i & 1);
      float s[EXTRA / 2];
      wgmma_fence();
      logits<EXTRA>(s, q, base + XK);
      wgmma_commit();
      wgmma_wait<0>();
#pragma unroll
      for (int n = 0; n < 2; n++) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
          const int r = n * 8 + (threadIdx.x % 4) * 2 + c;
          const Extra *e = p.extras + at + r;
          const float bias = r < count ? e->bias / p.scale : 0.f;
          const int from = r < count ? e->from : 1, until = r < count ? e->until : 0;
#pragma unroll
          for (int half = 0; half < 2; half++) {
            const int x = position(group, half);
            float &logit = s[n * 4 + half * 2 + c];
            logit = x >= from && x < until ? logit + bias : -INFINITY;
          }
        }
      }
      softmax<EXTRA>(s, rows);
      rescale(rows);
      uint32_t w[1][4];
      pack_weights<EXTRA>(w, s);
      wgmma_fence();
      weigh<EXTRA>(rows.o, w, base + XV);
      wgmma_commit();
      wgmma_wait<0>();
      release(free_x());
    }
  }

  __device__ void consume(int group) const {
    Rows rows;
#pragma unroll
    for (int i = 0; i < DIM / 2; i++) rows.o[i] = 0.f;
    rows.m[0] = rows.m[1] = -INFINITY;
    rows.l[0] = rows.l[1] = 0.f;
    load_queries(group);
    const uint32_t q = base + Q + group * 64 * 128;
    extras(rows, group, q);
    const int total = listed + tiles;
    const int low = max(first + group * 64, p.start), inner = left_edge(p, min(first + group * 64 + 63, last));
    float s[BN / 2];
    uint32_t w[BN / 16][4];
    barrier_wait(full_k(0), 0);
    wgmma_fence();
    logits<BN>(s, q, base + K);
    wgmma_commit();
    wgmma_wait<0>();
    release(free_k(0));
    mask(s, group, 0, inner, low);
    softmax<BN>(s, rows);
    rescale(rows);
    pack_weights<BN>(w, s);
    // No branch around the products: the compiler would wait for each of them.
#pragma unroll 1
    for (int i = 1; i < total; i++) {
      const int stage = i % STAGES, before = (i - 1) % STAGES;
      barrier_wait(full_k(stage), (i / STAGES) & 1);
      wgmma_fence();
      logits<BN>(s, q, base + K + stage * TILE);
      wgmma_commit();
      barrier_wait(full_v(before), ((i - 1) / STAGES) & 1);
      weigh<BN>(rows.o, w, base + V + before * TILE);
      wgmma_commit();
      wgmma_wait<1>();
      release(free_k(stage));
      mask(s, group, i, inner, low);
      softmax<BN>(s, rows);
      wgmma_wait<0>();
      release(free_v(before));
      rescale(rows);
      pack_weights<BN>(w, s);
    }
    const int stage = (total - 1) % STAGES;
    barrier_wait(full_v(stage), ((total - 1) / STAGES) & 1);
    wgmma_fence();
    weigh<BN>(rows.o, w, base + V + stage * TILE);
    wgmma_commit();
    wgmma_wait<0>();
    note(rows, group);
    store(rows, group);
  }

  // A function of its own: inlined into `store` it slows the kernel also where no log-sum-exp is asked for.
  __device__ void note(const Rows &rows, int group) const {
    if (!p.lse) return;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float sum = rows.l[half];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      const int x = position(group, half);
      if (threadIdx.x % 4 == 0 && x >= p.start && x <= last) note_lse(p, x - p.start, head, rows.m[half] * p.scale, sum);
    }
  }

  // Rows pass through this group's part of the query buffer, so that stores are 16 bytes wide.
  __device__ void store(const Rows &rows, int group) const {
    named_sync(1 + group, GROUP);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x % GROUP / WARP, top = group * 64 + warp * 16;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float sum = rows.l[half];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      const float scale = 1.f / sum;
#pragma unroll
      for (int d = 0; d < DIM / 8; d++) {
        const uint32_t pair = pack<T>(rows.o[d * 4 + half * 2] * scale, rows.o[d * 4 + half * 2 + 1] * scale);
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(base + Q + panel_place(BM, top + lane / 4 + half * 8, d) + (lane % 4) * 4), "r"(pair));
      }
    }
    __syncwarp();
    for (int c = lane; c < 16 * CHUNKS; c += WARP) {
      const int r = top + c / CHUNKS, j = c % CHUNKS, x = first + r;
      if (x < p.start || x > last || j * 8 >= p.dim) continue;
      uint4 value;
      asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                   : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w) : "r"(base + Q + panel_place(BM, r, j)));
      *(uint4 *)((T *)p.out + ((int64_t)(x - p.start) * p.heads + head) * p.dim + j * 8) = value;
    }
  }
};

#define INSTANCE(NAME, T, DIM, BN, STAGES)                                                                        \
  extern "C" __global__ void __launch_bounds__(384, 1) NAME(const __grid_constant__ AttentionParams p) {          \
    extern __shared__ __align__(1024) unsigned char shared[];                                                     \
    Hopper<T, DIM, BN, STAGES> tile(p, shared_address(shared));                                                   \
    tile.init();                                                                                                  \
    if (threadIdx.x < 128) {                                                                                      \
      asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");                                                        \
      tile.produce();                                                                                             \
    } else {                                                                                                      \
      asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");                                                       \
      tile.consume(threadIdx.x / 128 - 1);                                                                        \
    }                                                                                                             \
  }
// The build compiles each head dim apart, with ONLY_DIM set.
#if WITH_PIECES
#define NAME(TYPE, DIM) attention_hopper_pieces_##TYPE##_##DIM
#else
#define NAME(TYPE, DIM) attention_hopper_##TYPE##_##DIM
#endif
#define TYPES(DIM, BN, STAGES)                               \
  INSTANCE(NAME(bf16, DIM), __nv_bfloat16, DIM, BN, STAGES)  \
  INSTANCE(NAME(f16, DIM), __half, DIM, BN, STAGES)
#if !defined(ONLY_DIM) || ONLY_DIM == 64
TYPES(64, 128, 2)
#endif
#if !defined(ONLY_DIM) || ONLY_DIM == 96
TYPES(96, 128, 2)
#endif
#if !defined(ONLY_DIM) || ONLY_DIM == 128
TYPES(128, 96, 2)
#endif
#if !defined(ONLY_DIM) || ONLY_DIM == 256
TYPES(256, 64, 2)
#endif
