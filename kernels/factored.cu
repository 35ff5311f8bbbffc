// Butterflies applied to rows, forward and backward, fused: all factors between one read and one write of a row.
//
//   y[r] = B P x[r] for rows r, B of log2 N factors: src/ops/factored/mod.rs has the formulas; P is an index or nothing
//   factored_forward_{real,complex}_{tied,untied}    x [rows, C, N], w [stack, B's parameters] -> y [rows, stack, C, N]
//   factored_stream_{real_untied,real_tied,complex_tied}_{256,512,1024}   the same without index
//   factored_backward_{..}                           dx [stack, rows, C, N], partial sums of dw [blocks, stack, parameters]
//
// C is 2 where factors are complex, f32 throughout. N = 2 to 4,096.
//
// Launch  grid (tiles of rows, stack), THREADS threads, `shared` bytes below. Three factors at a time are applied to 8
//         elements that a thread holds in registers, of V rows at once, so that a weight is read once for V rows; rows
//         lie in shared memory in between. The backward pass keeps the input of each three factors there.
//         factored_stream: grid (a block a multiprocessor, stack), STREAMED threads, Stream::SHARED bytes.
#include "factored.cuh"

struct Butterfly {
  const float *x, *w;
  float *y;                // of the backward pass dx
  const float *dy;
  float *partial;
  const uint32_t *index;   // element i of a row is read at index[i]; null for i
  int rows, n, levels, parameters, stack;
  int each;                // rows that a tile of the backward pass has
};
MIRRORED(Butterfly, 72);
FIELD(Butterfly, index, 40);
FIELD(Butterfly, rows, 48);
FIELD(Butterfly, each, 68);

constexpr int K = 3, THREADS = 128;

// Place of element `e` in shared memory: lanes of a warp that are a multiple of 64 apart fall on different banks.
__device__ inline int padded(int e) { return e + (e >> 6) * 8; }
// A multiple of 4, so that four elements are read at once.
__device__ inline int padded_row(int n) { return (padded(n - 1) + 4) & ~3; }

template <int C, bool TIED> struct Level {
  static __device__ inline const float *pair(const float *w, int n, int level, int a) {
    const int half = 1 << level, j = a & (half - 1);
    const int at = TIED ? half - 1 + j : (n / 2) * level + (a >> (level + 1)) * half + j;
    return w + (int64_t)at * 4 * C;
  }
};

// 2^COUNT elements of V rows: those of group `g` of the factors from `first` on, which are 2^first apart.
template <int C, int COUNT, int V> struct Group {
  static constexpr int E = 1 << COUNT;
  float x[V][E][C];
  int base, step;

  __device__ inline Group(int g, int first) : step(1 << first) { base = (g >> first) << (first + COUNT) | (g & (step - 1)); }

  __device__ inline void load(const float *rows, int row) {
#pragma unroll
    for (int v = 0; v < V; v++)
#pragma unroll
      for (int c = 0; c < C; c++)
#pragma unroll
        for (int e = 0; e < E; e++) x[v][e][c] = rows[(v * C + c) * row + padded(base + e * step)];
  }
  __device__ inline void store(float *rows, int row) const {
#pragma unroll
    for (int v = 0; v < V; v++)
#pragma unroll
      for (int c = 0; c < C; c++)
        if (E == 8 && step == 1) {
          float4 *to = (float4 *)(rows + (v * C + c) * row + padded(base));
          to[0] = make_float4(x[v][0][c], x[v][1 % E][c], x[v][2 % E][c], x[v][3 % E][c]);
          to[1] = make_float4(x[v][4 % E][c], x[v][5 % E][c], x[v][6 % E][c], x[v][7 % E][c]);
        } else
#pragma unroll
          for (int e = 0; e < E; e++) rows[(v * C + c) * row + padded(base + e * step)] = x[v][e][c];
  }
  // Rows `row ..` of a tensor `[rows, stride]`, C planes of n; rows past the end are zeros.
  __device__ inline void load_global(const float *p, int64_t row, int rows, int64_t stride, int n, const uint32_t *index) {
#pragma unroll
    for (int v = 0; v < V; v++)
#pragma unroll
      for (int c = 0; c < C; c++) {
        const float *from = p + (row + v) * stride + c * n;
        if (row + v >= rows) {
#pragma unroll
          for (int e = 0; e < E; e++) x[v][e][c] = 0.f;
        } else if (E == 8 && step == 1 && !index) {
          const float4 lo = ((const float4 *)(from + base))[0], hi = ((const float4 *)(from + base))[1];
          x[v][0][c] = lo.x, x[v][1 % E][c] = lo.y, x[v][2 % E][c] = lo.z, x[v][3 % E][c] = lo.w;
          x[v][4 % E][c] = hi.x, x[v][5 % E][c] = hi.y, x[v][6 % E][c] = hi.z, x[v][7 % E][c] = hi.w;
        } else {
#pragma unroll
          for (int e = 0; e < E; e++) x[v][e][c] = from[index ? index[base + e * step] : base + e * step];
        }
      }
  }
  __device__ inline void store_global(float *p, int64_t row, int rows, int64_t stride, int n, const uint32_t *index) const {
#pragma unroll
    for (int v = 0; v < V; v++)
      if (row + v < rows)
#pragma unroll
        for (int c = 0; c < C; c++)
#pragma unroll
          for (int e = 0; e < E; e++) {
            const int at = base + e * step;
            p[(row + v) * stride + c * n + (index ? index[at] : at)] = x[v][e][c];
          }
  }
  template <bool TIED> __device__ inline void forward(const float *w, int n, int first) {
#pragma unroll
    for (int l = 0; l < COUNT; l++)
#pragma unroll
      for (int e = 0; e < E; e++)
        if (!(e >> l & 1)) {
          Four<C> d;
          d.load(Level<C, TIED>::pair(w, n, first + l, base + e * step));
#pragma unroll
          for (int v = 0; v < V; v++) d.apply(x[v][e], x[v][e | 1 << l]);
        }
  }
};

// Threads of a row tile and row tiles of a block.
__device__ inline int groups_of(int n) { return max(n >> K, 1); }

template <int C, bool TIED, int V, int COUNT>
__device__ inline void forward_pass(const Butterfly &b, const float *w, float *rows, int row, int64_t at, int first, int t, int threads) {
  const bool begin = first == 0, end = first + COUNT == b.levels;
  for (int g = t; g < b.n >> COUNT; g += threads) {
    Group<C, COUNT, V> x(g, first);
    if (begin) x.load_global(b.x, at, b.rows, (int64_t)C * b.n, b.n, b.index);
    else x.load(rows, row);
    x.template forward<TIED>(w, b.n, first);
    if (end) x.store_global(b.y + (int64_t)blockIdx.y * C * b.n, at, b.rows, (int64_t)b.stack * C * b.n, b.n, nullptr);
    else x.store(rows, row);
  }
}

template <int C, bool TIED, int V> __device__ void forward(const Butterfly &b) {
  extern __shared__ float shared[];
  const int threads = min(groups_of(b.n), THREADS), tile = threadIdx.x / threads, t = threadIdx.x % threads;
  const int tiles = THREADS / threads, row = padded_row(b.n);
  float *rows = shared + tile * V * C * row;
  const float *w = b.w + (int64_t)blockIdx.y * b.parameters;
  const int64_t at = ((int64_t)blockIdx.x * tiles + tile) * V;
  for (int first = 0; first < b.levels; first += K) {
    const int count = min(K, b.levels - first);
    if (count == 3) forward_pass<C, TIED, V, 3>(b, w, rows, row, at, first, t, threads);
    else if (count == 2) forward_pass<C, TIED, V, 2>(b, w, rows, row, at, first, t, threads);
    else forward_pass<C, TIED, V, 1>(b, w, rows, row, at, first, t, threads);
    __syncthreads();
  }
}

// ---- N of 256 to 1,024: weights in shared memory, the next rows copied there meanwhile.
//
// A stream of N / 8 threads has V rows at a time in one of two buffers; a block of STREAMED threads has several. Untied
// weights lie in the order in which lanes read them: of each factor, those of a slot of the pass for one group after the
// other. Complex weights lie as two arrays, so that lanes read 16 bytes side by side. A pass begins as soon as the
// weights of its own factors are there.

constexpr int STREAMED = 256;

// Place of element `e` of a row: as `padded`, and fours change places so that lanes 32 bytes apart do not share banks.
__device__ inline int streamed(int e) { return (e ^ (e >> 5 & 1) << 2) + (e >> 6) * 8; }

template <int C, bool TIED, int LEVELS> struct Stream {
  static constexpr int N = 1 << LEVELS, GROUPS = N / 8, ROW = N + N / 64 * 8, V = 8 / C, TILE = V * C * ROW;
  static constexpr int STREAMS = STREAMED / GROUPS, PAIRS = TIED ? N - 1 : N / 2 * LEVELS;
  static constexpr size_t SHARED = sizeof(float4) * (PAIRS * C + 1) + sizeof(float) * STREAMS * 2 * TILE;
  // Of 1,024 elements the last pass has four factors, and two threads share its rows.
  static constexpr int PASSES = LEVELS == 10 ? 3 : (LEVELS + K - 1) / K;
  static __host__ __device__ constexpr int count_of(int first) { return first + K < LEVELS && first / K + 1 < PASSES ? K : LEVELS - first; }
  static_assert(GROUPS % WARP == 0 && GROUPS <= STREAMED, "a stream is some warps");

  static __device__ inline void barrier(int stream) { asm volatile("bar.sync %0, %1;" ::"r"(1 + stream), "n"(GROUPS) : "memory"); }

  // Copies the weights of the factors of pass `PASS`.
  template <int PASS> static __device__ inline void stage(const float4 *w, float4 *to) {
    constexpr int FIRST = PASS * K, COUNT = count_of(FIRST);
    constexpr int FROM = TIED ? (1 << FIRST) - 1 : FIRST * (N / 2);
    constexpr int END = TIED ? (1 << (FIRST + COUNT)) - 1 : (FIRST + COUNT) * (N / 2);
#pragma unroll 4
    for (int p = FROM + threadIdx.x; p < END; p += STREAMED) {
      int at = p;
      if constexpr (!TIED) {
        const int level = p / (N / 2), q = p % (N / 2), l = level - FIRST;
        const int a = (q >> level << (level + 1)) | (q & ((1 << level) - 1)), e = a >> FIRST & ((1 << COUNT) - 1);
        const int group = a >> (FIRST + COUNT) << FIRST | (a & ((1 << FIRST) - 1));
        const int slot = e >> (l + 1) << l | (e & ((1 << l) - 1));
        at = level * (N / 2) + slot * (N >> COUNT) + group;
      }
#pragma unroll
      for (int c = 0; c < C; c++) copy16(shared_address(to + c * PAIRS + at), (const float *)(w + p * C + c), true);
    }
    commit();
  }

  static __device__ inline void fetch(const Butterfly &b, int64_t tile, float *to, int t) {
#pragma unroll
    for (int v = 0; v < V * C; v++) {
      const int64_t row = tile * V + v / C;
      const float *from = b.x + (min(row, (int64_t)b.rows - 1) * C + v % C) * N;
#pragma unroll
      for (int u = t; u < N / 4; u += GROUPS)
        copy16(shared_address(to + v * ROW + streamed(4 * u)), from + 4 * u, row < b.rows);
    }
  }

  template <int FIRST> static __device__ inline void pass(const Butterfly &b, const float4 *w, float *rows, int64_t tile, int t) {
    constexpr int COUNT = count_of(FIRST), E = 1 << COUNT, STEP = 1 << FIRST, ROWS = E > 8 ? V / 2 : V;
    constexpr bool LAST = FIRST + COUNT == LEVELS;
#pragma unroll
    for (int i = t; i < (N >> COUNT) * (V / ROWS); i += GROUPS) {
      const int g = i & ((N >> COUNT) - 1), own_rows = (i >> (LEVELS - COUNT)) * ROWS;
      const int base = (g >> FIRST) << (FIRST + COUNT) | (g & (STEP - 1));
      float x[ROWS][E][C];
#pragma unroll
      for (int v = 0; v < ROWS; v++)
#pragma unroll
        for (int c = 0; c < C; c++) {
          const float *own = rows + ((own_rows + v) * C + c) * ROW;
          if constexpr (FIRST == 0) {
            const float4 lo = *(const float4 *)(own + streamed(base)), hi = *(const float4 *)(own + streamed(base + 4));
            x[v][0][c] = lo.x, x[v][1][c] = lo.y, x[v][2][c] = lo.z, x[v][3][c] = lo.w;
            x[v][4][c] = hi.x, x[v][5][c] = hi.y, x[v][6][c] = hi.z, x[v][7][c] = hi.w;
          } else {
#pragma unroll
            for (int e = 0; e < E; e++) x[v][e][c] = own[streamed(base + e * STEP)];
          }
        }
#pragma unroll
      for (int l = 0; l < COUNT; l++)
#pragma unroll
        for (int e = 0, slot = 0; e < E; e++)
          if (!(e >> l & 1)) {
            const int at = TIED ? (STEP << l) - 1 + ((base + e * STEP) & ((STEP << l) - 1)) : (FIRST + l) * (N / 2) + slot * (N >> COUNT) + g;
            Four<C> d;
#pragma unroll
            for (int c = 0; c < C; c++) {
              const float4 f = w[c * PAIRS + at];
              d.w[4 * c] = f.x, d.w[4 * c + 1] = f.y, d.w[4 * c + 2] = f.z, d.w[4 * c + 3] = f.w;
            }
#pragma unroll
            for (int v = 0; v < ROWS; v++) d.apply(x[v][e], x[v][e | 1 << l]);
            slot++;
          }
#pragma unroll
      for (int v = 0; v < ROWS; v++)
#pragma unroll
        for (int c = 0; c < C; c++) {
          float *own = rows + ((own_rows + v) * C + c) * ROW;
          if constexpr (LAST) {
            const int64_t row = tile * V + own_rows + v;
            if (row < b.rows)
#pragma unroll
              for (int e = 0; e < E; e++) b.y[((row * b.stack + blockIdx.y) * C + c) * N + base + e * STEP] = x[v][e][c];
          } else if constexpr (FIRST == 0) {
            *(float4 *)(own + streamed(base)) = make_float4(x[v][0][c], x[v][1][c], x[v][2][c], x[v][3][c]);
            *(float4 *)(own + streamed(base + 4)) = make_float4(x[v][4][c], x[v][5][c], x[v][6][c], x[v][7][c]);
          } else {
#pragma unroll
            for (int e = 0; e < E; e++) own[streamed(base + e * STEP)] = x[v][e][c];
          }
        }
    }
  }

  // Passes of one tile; of the block's first one, each waits for its weights, of which every thread has copied some.
  template <int PASS> static __device__ inline void passes(const Butterfly &b, const float4 *w, float *rows, int64_t tile, int t, int stream, bool first, bool here) {
    if constexpr (PASS < PASSES) {
      if (first) {
        wait<PASSES - PASS>();
        __syncthreads();
      } else {
        if constexpr (PASS == 0) wait<1>();
        barrier(stream);
      }
      if (here) pass<PASS * K>(b, w, rows, tile, t);
      passes<PASS + 1>(b, w, rows, tile, t, stream, first, here);
    }
  }

  static __device__ void run(const Butterfly &b) {
    extern __shared__ float4 staged[];
    const int stream = threadIdx.x / GROUPS, t = threadIdx.x % GROUPS;
    float *rows = (float *)(staged + PAIRS * C + (PAIRS * C & 1)) + stream * 2 * TILE;
    const int64_t tiles = (b.rows + V - 1) / V, step = (int64_t)gridDim.x * STREAMS;
    int64_t tile = (int64_t)blockIdx.x * STREAMS + stream;
    const float4 *w = (const float4 *)(b.w + (int64_t)blockIdx.y * b.parameters);
    // Groups of copies: the first rows with the weights of the first pass, those of the others, the next rows.
    if (tile < tiles) fetch(b, tile, rows, t);
    stage<0>(w, staged);
    stage<1>(w, staged);
    stage<2>(w, staged);
    if constexpr (PASSES > 3) stage<3>(w, staged);
    bool first = true;
    for (int buffer = 0; first || tile < tiles; tile += step, buffer ^= 1, first = false) {
      if (tile + step < tiles) fetch(b, tile + step, rows + (buffer ^ 1) * TILE, t);
      commit();
      passes<0>(b, staged, rows + buffer * TILE, tile, t, stream, first, tile < tiles);
      barrier(stream);
    }
  }
};

// One row at a time: the inputs of a pass's factors are computed again from that of the pass, which `rows` holds.
template <int C, bool TIED, int COUNT>
__device__ inline void backward_pass(const Butterfly &b, const float *w, float *rows, float *d, int row, int64_t at, int first,
                                     int t, int threads, float *partial) {
  constexpr int E = 1 << COUNT;
  const bool begin = first == 0, end = first + COUNT == b.levels;
  for (int g = t; g < b.n >> COUNT; g += threads) {
    float sums[COUNT][E / 2][4 * C] = {};
    for (int v = 0; v < b.each; v++) {
      Group<C, COUNT, 1> x(g, first), dx(g, first);
      float inputs[COUNT][E][C];
      x.load(rows + v * C * row, row);
      if (end) dx.load_global(b.dy + (int64_t)blockIdx.y * C * b.n, at + v, b.rows, (int64_t)b.stack * C * b.n, b.n, nullptr);
      else dx.load(d + v * C * row, row);
#pragma unroll
      for (int l = 0; l < COUNT; l++)
#pragma unroll
        for (int e = 0; e < E; e++) {
#pragma unroll
          for (int c = 0; c < C; c++) inputs[l][e][c] = x.x[0][e][c];
          if (e >> l & 1) {
            // The pair's first element was kept before this one, and neither has changed yet.
            Four<C> f;
            f.load(Level<C, TIED>::pair(w, b.n, first + l, x.base + (e ^ 1 << l) * x.step));
            f.apply(x.x[0][e ^ 1 << l], x.x[0][e]);
          }
        }
#pragma unroll
      for (int l = COUNT - 1; l >= 0; l--)
#pragma unroll
        for (int e = 0, pair = 0; e < E; e++)
          if (!(e >> l & 1)) {
            Four<C> f;
            f.load(Level<C, TIED>::pair(w, b.n, first + l, x.base + e * x.step));
            f.back(inputs[l][e], inputs[l][e | 1 << l], dx.x[0][e], dx.x[0][e | 1 << l], sums[l][pair]);
            pair++;
          }
      if (begin) dx.store_global(b.y + (int64_t)blockIdx.y * b.rows * C * b.n, at + v, b.rows, (int64_t)C * b.n, b.n, b.index);
      else dx.store(d + v * C * row, row);
    }
    const Group<C, COUNT, 1> place(g, first);
#pragma unroll
    for (int l = 0; l < COUNT; l++)
#pragma unroll
      for (int e = 0, pair = 0; e < E; e++)
        if (!(e >> l & 1)) {
          // Untied, a thread alone has this pair; a tied one's sums are made by the caller, from a place for each block.
          const int half = 1 << (first + l), a = place.base + e * place.step;
          const int own = (b.n / 2) * (first + l) + (a >> (first + l + 1)) * half + (a & (half - 1));
          float *to = partial + (int64_t)own * 4 * C;
#pragma unroll
          for (int i = 0; i < 4 * C; i++) to[i] += sums[l][pair][i];
          pair++;
        }
  }
}

// `partial` has the layout of untied weights also where they are tied, [blocks, tiles, stack, 2 N log2 N C], zeros before.
template <int C, bool TIED> __device__ void backward(const Butterfly &b) {
  extern __shared__ float shared[];
  const int threads = min(groups_of(b.n), THREADS), tile = threadIdx.x / threads, t = threadIdx.x % threads;
  const int tiles = THREADS / threads, row = padded_row(b.n), passes = (b.levels + K - 1) / K, V = b.each;
  float *rows = shared + tile * (passes + 1) * V * C * row, *d = rows + passes * V * C * row;
  const float *w = b.w + (int64_t)blockIdx.y * b.parameters;
  const int64_t untied = (int64_t)2 * b.n * b.levels * C;
  float *partial = b.partial + (((int64_t)blockIdx.x * tiles + tile) * gridDim.y + blockIdx.y) * untied;
  const int64_t all = (b.rows + (int64_t)tiles * V - 1) / (tiles * V);
  for (int64_t i = blockIdx.x; i < all; i += gridDim.x) {
    const int64_t at = (i * tiles + tile) * V;
    __syncthreads();
    // The input of every pass.
    for (int e = t; e < b.n; e += threads)
      for (int v = 0; v < V; v++)
        for (int c = 0; c < C; c++)
          rows[(v * C + c) * row + padded(e)] = at + v < b.rows ? b.x[((at + v) * C + c) * b.n + (b.index ? b.index[e] : e)] : 0.f;
    __syncthreads();
    for (int pass = 0; pass + 1 < passes; pass++) {
      for (int g = t; g < b.n >> K; g += threads) {
        Group<C, K, 1> x(g, pass * K);
        for (int v = 0; v < V; v++) {
          x.load(rows + (pass * V + v) * C * row, row);
          x.template forward<TIED>(w, b.n, pass * K);
          x.store(rows + ((pass + 1) * V + v) * C * row, row);
        }
      }
      __syncthreads();
    }
    for (int pass = passes - 1; pass >= 0; pass--) {
      const int first = pass * K, count = min(K, b.levels - first);
      float *own = rows + pass * V * C * row;
      if (count == 3) backward_pass<C, TIED, 3>(b, w, own, d, row, at, first, t, threads, partial);
      else if (count == 2) backward_pass<C, TIED, 2>(b, w, own, d, row, at, first, t, threads, partial);
      else backward_pass<C, TIED, 1>(b, w, own, d, row, at, first, t, threads, partial);
      __syncthreads();
    }
  }
}

#define KERNELS(FIELD_NAME, C, KIND, TIED, V)                                                                         \
  extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) factored_forward_##FIELD_NAME##_##KIND(Butterfly b) {            \
    forward<C, TIED, V>(b);                                                                                              \
  }                                                                                                                      \
  extern "C" __global__ void __launch_bounds__(THREADS) factored_backward_##FIELD_NAME##_##KIND(Butterfly b) {           \
    backward<C, TIED>(b);                                                                                             \
  }
#ifndef REAL_ROWS
#define REAL_ROWS 8
#define COMPLEX_ROWS 4
#define BLOCKS 4
#endif
KERNELS(real, 1, tied, true, REAL_ROWS)
KERNELS(real, 1, untied, false, REAL_ROWS)
KERNELS(complex, 2, tied, true, COMPLEX_ROWS)
KERNELS(complex, 2, untied, false, COMPLEX_ROWS)

#define STREAMS(KIND, C, TIED)                                                                                            \
  extern "C" __global__ void __launch_bounds__(STREAMED, 1) factored_stream_##KIND##_256(Butterfly b) { Stream<C, TIED, 8>::run(b); }  \
  extern "C" __global__ void __launch_bounds__(STREAMED, 1) factored_stream_##KIND##_512(Butterfly b) { Stream<C, TIED, 9>::run(b); }  \
  extern "C" __global__ void __launch_bounds__(STREAMED, 1) factored_stream_##KIND##_1024(Butterfly b) { Stream<C, TIED, 10>::run(b); }
STREAMS(real_untied, 1, false)
STREAMS(real_tied, 1, true)
STREAMS(complex_tied, 2, true)

// Gradients from those of all blocks: dw [stack, parameters] in the order of `partial`; tied pairs are summed over blocks.
extern "C" __global__ void __launch_bounds__(256) factored_sum(const float *partial, float *dw, int blocks, int stack, int n, int levels,
                                                               int planes, int tied) {
  const int four = 4 * planes, pairs = tied ? n - 1 : n / 2 * levels;
  const int64_t untied = (int64_t)n / 2 * levels * four;
  const int i = blockIdx.x * blockDim.x + threadIdx.x, which = blockIdx.y;
  if (i >= pairs * four) return;
  const int pair = i / four, e = i % four;
  int level = 0, j = pair, copies = 1, apart = 0;
  if (tied) {
    while (pair + 1 >= 2 << level) level++;
    j = pair - ((1 << level) - 1), apart = 1 << level, copies = n / 2 >> level;
  }
  const int64_t first = tied ? (int64_t)(n / 2) * level + j : pair;
  float all = 0.f;
  for (int b = 0; b < blocks; b++)
    for (int c = 0; c < copies; c++) all += partial[((int64_t)b * stack + which) * untied + (first + (int64_t)c * apart) * four + e];
  dw[(int64_t)which * pairs * four + i] = all;
}
