// Shared by the matrix-vector products of a decode step in every weight format: parameters, the vector in shared
// memory, the epilogue. 256 threads.
#pragma once
#include "decode.cuh"

// Most matrices of a launch: `MOST` in src/ops/matvec/cuda.rs.
constexpr int MATRICES = 4;

// Mirrors `Params` in src/ops/matvec/cuda.rs.
struct MatvecParams {
  const void *w[MATRICES];
  const float *bias[MATRICES];
  int rows[MATRICES];
  int columns;
  const float *x;
  const float *norm;  // null: x as it is
  float eps;
  int activation;
  float *out;
  float *logits;  // largest element: also stored, if not null
  DecodeState *state;
  int group, scale;  // of affine.cu: values of a group, type of its scale and bias
};
MIRRORED(MatvecParams, 144);
FIELD(MatvecParams, w, 0); FIELD(MatvecParams, bias, 32); FIELD(MatvecParams, rows, 64);
FIELD(MatvecParams, columns, 80); FIELD(MatvecParams, x, 88); FIELD(MatvecParams, norm, 96);
FIELD(MatvecParams, eps, 104); FIELD(MatvecParams, activation, 108); FIELD(MatvecParams, out, 112);
FIELD(MatvecParams, logits, 120); FIELD(MatvecParams, state, 128);
FIELD(MatvecParams, group, 136); FIELD(MatvecParams, scale, 140);

enum { STORE, ADD, GATED, LARGEST };

// Rows of all matrices side by side.
template <int MODE> __device__ inline int all_rows(const MatvecParams &p) {
  return MODE == GATED ? 2 * p.rows[0] : p.rows[0] + p.rows[1] + p.rows[2] + p.rows[3];
}

// Address of row i, each of `bytes` bytes; with GATED, gate and up alternate.
template <int MODE> __device__ inline const uint8_t *row_of(const MatvecParams &p, int i, int bytes) {
  if (MODE == GATED) return (const uint8_t *)p.w[i & 1] + (int64_t)(i >> 1) * bytes;
  if (i < p.rows[0]) return (const uint8_t *)p.w[0] + (int64_t)i * bytes;
  i -= p.rows[0];
  if (i < p.rows[1]) return (const uint8_t *)p.w[1] + (int64_t)i * bytes;
  i -= p.rows[1];
  if (i < p.rows[2]) return (const uint8_t *)p.w[2] + (int64_t)i * bytes;
  return (const uint8_t *)p.w[3] + (int64_t)(i - p.rows[2]) * bytes;
}

__device__ inline float bias_of(const MatvecParams &p, int i) {
  for (int m = 0; m < MATRICES; m++) {
    if (i < p.rows[m]) return p.bias[m] ? p.bias[m][i] : 0.f;
    i -= p.rows[m];
  }
  return 0.f;
}

// Puts x, or its norm, into shared memory, float4 number i at place(i). What does not depend on the launch ahead comes
// before the wait for it: a caller asks for its first weights before this.
template <typename Place> __device__ inline void stage(const MatvecParams &p, float *v, Place place) {
  // Inputs of up to HELD * 1024 elements stay in registers between the two passes of the norm, whose weights are asked
  // for ahead like the matrix.
  constexpr int HELD = 4;
  const int n = p.columns, quads = n / 4;
  const bool held = p.norm && quads <= HELD * 256;
  const float4 *x4 = (const float4 *)p.x, *norm4 = (const float4 *)p.norm;
  float4 *v4 = (float4 *)v, weight[HELD], x[HELD];
  auto square = [](float4 a) { return a.x * a.x + a.y * a.y + a.z * a.z + a.w * a.w; };
  auto scaled = [](float4 a, float f, float4 w) { return make_float4(a.x * f * w.x, a.y * f * w.y, a.z * f * w.z, a.w * f * w.w); };
  if (held) {
#pragma unroll
    for (int j = 0; j < HELD; j++) {
      const int i = threadIdx.x + j * 256;
      weight[j] = i < quads ? norm4[i] : make_float4(0.f, 0.f, 0.f, 0.f);
    }
  }
  release_next();
  await_previous();
  float squares = 0.f;
  __shared__ float parts[8];
  auto factor = [&]() {
    squares = warp_sum(squares);
    if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = squares;
    __syncthreads();
    float sum = 0.f;
    for (int i = 0; i < 8; i++) sum += parts[i];
    return 1.f / sqrtf(sum / n + p.eps);
  };
  if (held) {
#pragma unroll
    for (int j = 0; j < HELD; j++) {
      const int i = threadIdx.x + j * 256;
      x[j] = i < quads ? x4[i] : make_float4(0.f, 0.f, 0.f, 0.f);
      squares += square(x[j]);
    }
    const float f = factor();
#pragma unroll
    for (int j = 0; j < HELD; j++) {
      const int i = threadIdx.x + j * 256;
      if (i < quads) v4[place(i)] = scaled(x[j], f, weight[j]);
    }
  } else {
#pragma unroll 8
    for (int i = threadIdx.x; i < quads; i += 256) {
      const float4 a = x4[i];
      v4[place(i)] = a;
      squares += square(a);
    }
    if (p.norm) {
      const float f = factor();
      for (int i = threadIdx.x; i < quads; i += 256) v4[place(i)] = scaled(v4[place(i)], f, norm4[i]);
    }
  }
  __syncthreads();
}

// The epilogue: stores, adds or gates the sums of rows first.., or keeps the largest of all.
template <int MODE, int ROWS> struct Outcome {
  unsigned long long best = 0;
  bool finite = true;

  // Called by one lane of a warp, which holds all sums.
  __device__ inline void take(const MatvecParams &p, int first, int total, const float (&sums)[ROWS]) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const int i = first + r;
      if (i >= total) break;
      if (MODE == STORE) p.out[i] = sums[r] + bias_of(p, i);
      if (MODE == ADD) p.out[i] += sums[r] + bias_of(p, i);
      if (MODE == GATED && r % 2 == 0) p.out[i >> 1] = activate(sums[r], p.activation) * sums[(r + 1) % ROWS];
      if (MODE == LARGEST) {
        // The first wins ties.
        const unsigned long long key = (unsigned long long)ordered(sums[r]) << 32 | (0xffffffffu - i);
        best = max(best, key);
        finite = finite && isfinite(sums[r]);
        if (p.logits) p.logits[i] = sums[r];
      }
    }
  }

  // Called by the same lane after its last row.
  __device__ inline void report(const MatvecParams &p) const {
    if (MODE != LARGEST) return;
    if (best) atomicMax(&p.state->best, best);
    if (!finite) p.state->stopped = 2;
  }
};

// All that a step launches, of `matvec<T, MODE, ROWS>`: few rows to a warp, and many. BOUNDS: __launch_bounds__(256,
// ..).
#define MATVECS(NAME, T, BOUNDS)                           \
  MATVEC(decode_store_##NAME##_1, T, STORE, 1, BOUNDS)     \
  MATVEC(decode_store_##NAME##_4, T, STORE, 4, BOUNDS)     \
  MATVEC(decode_add_##NAME##_1, T, ADD, 1, BOUNDS)         \
  MATVEC(decode_add_##NAME##_4, T, ADD, 4, BOUNDS)         \
  MATVEC(decode_gated_##NAME##_2, T, GATED, 2, BOUNDS)     \
  MATVEC(decode_gated_##NAME##_4, T, GATED, 4, BOUNDS)     \
  MATVEC(decode_largest_##NAME##_4, T, LARGEST, 4, BOUNDS)
#define MATVEC(NAME, T, MODE, ROWS, BOUNDS) \
  extern "C" __global__ void BOUNDS NAME(const __grid_constant__ MatvecParams p) { matvec<T, MODE, ROWS>(p); }
