// Passes over quantised weights, in f32 arithmetic from the blocks as stored, without rounding the vector: those of a
// decode step as in decode.cu, and the dequantisation of a matrix for products of many rows. One format to a module
// (blocks.cuh): a model uses a few of them, and the driver translates only those.
//
// decode_embed_FORMAT   x = embedding[token] * scale, and the rotary tables, as decode_embed.
//                       Grid ceil(max(N, tables * half) / 256), 256 threads.
// decode_MODE_FORMAT_R  W v and its epilogue, as decode_matvec: up to three matrices [rows, N] of this format.
//                       Grid so that each warp gets R rows at a time, 256 threads, shared memory 16 (q + q / 8 + q / 32) bytes with
//                       q = N / 4. N whole blocks.
// dequantise_FORMAT_T   out = W, each element rounded once to T: `units` units of consecutive whole rows; out aligned to
//                       16 bytes. Grid ceil(units / 256), 256 threads. Bound by the bytes written.
// gather_FORMAT_T       out[i] = W[ids[i]], each element rounded once to T: ids u32 [n] below W's rows, `units` units in
//                       all, `per_row` to a row; out aligned to 16 bytes. Grid ceil(units / 256), 256 threads.
//
// A lane takes a unit of a block, 32 elements (q8_0: 8). A product adds up what the unit's numbers and the vector give
// before it meets the scale: sum_e (s q_e + m) v_e = s sum_e q_e v_e + m sum_e v_e. Bound by the weights' bytes where
// rows are many; where they are few, as decode_matvec, by the chain of wait, vector, reduction and store.
#include "blocks.cuh"
#include "matvec.cuh"

// Where float4 number i of the vector lies in shared memory: eight lanes that read at once, each from a unit of its
// own, find eight different groups of banks. Units in a row are 32 elements apart, or, in the formats of 256, in two
// rows of 64 or 128.
template <typename F> __device__ inline int place(int i) { return i + i / 8 + (F::GROUPS > 1 ? i / 32 : 0); }

template <typename F> __device__ inline float number(uint32_t w, int i) {
  return F::SIGNED ? (float)(int8_t)(w >> 8 * i) : (float)(uint8_t)(w >> 8 * i);
}
template <typename F> __device__ inline float dot4(uint32_t w, float4 v) {
  return number<F>(w, 0) * v.x + number<F>(w, 1) * v.y + number<F>(w, 2) * v.z + number<F>(w, 3) * v.w;
}

// Loads a unit and passes its elements on four at a time: take(index among the float4 of the block, value).
template <typename F, typename Take> __device__ inline void read_unit(const uint8_t *block, int part, Take take) {
  typename F::Raw raw;
  uint32_t w[F::WORDS];
  float scale[F::GROUPS], min[F::GROUPS] = {};
  F::load(raw, block, part);
  F::dequantise(raw, block, part, w, scale, min);
#pragma unroll
  for (int k = 0; k < F::WORDS; k++) {
    const int g = k * F::GROUPS / F::WORDS;
    auto value = [&](int e) { return number<F>(w[k], e) * scale[g] + min[g]; };
    take(F::quad(part, k), make_float4(value(0), value(1), value(2), value(3)));
  }
}

template <typename F>
__device__ void embed(const uint8_t *table, float factor, float *x, int n, const float *frequencies, const float *amplitudes, float *cos,
                      float *sin, int tables, int half, const DecodeState *state) {
  constexpr int PER_BLOCK = F::PARTS * F::WORDS;
  release_next();
  await_previous();
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  rotary(i, frequencies, amplitudes, cos, sin, tables, half, state->position);
  if (i >= n / (4 * F::WORDS)) return;
  const int block = i / F::PARTS, part = i % F::PARTS, blocks = n / (4 * PER_BLOCK);
  read_unit<F>(table + ((int64_t)state->token * blocks + block) * F::BYTES, part, [&](int quad, float4 v) {
    ((float4 *)x)[block * PER_BLOCK + quad] = make_float4(v.x * factor, v.y * factor, v.z * factor, v.w * factor);
  });
}

template <typename T> __device__ inline void store4(T *out, float4 v) { *(uint2 *)out = make_uint2(pack<T>(v.x, v.y), pack<T>(v.z, v.w)); }
template <> __device__ inline void store4(float *out, float4 v) { *(float4 *)out = v; }

template <typename F, typename T> __device__ void dequantise(const uint8_t *w, T *out, int64_t units) {
  const int64_t unit = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, block = unit / F::PARTS;
  if (unit >= units) return;
  T *to = out + block * (4 * F::PARTS * F::WORDS);
  read_unit<F>(w + block * F::BYTES, unit % F::PARTS, [&](int quad, float4 v) { store4(to + 4 * quad, v); });
}

template <typename F, typename T>
__device__ void gather(const uint8_t *table, const uint32_t *ids, T *out, int64_t units, int per_row) {
  const int64_t unit = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (unit >= units) return;
  const int64_t row = unit / per_row;
  const int within = unit % per_row, block = within / F::PARTS, blocks = per_row / F::PARTS;
  constexpr int ELEMENTS = 4 * F::PARTS * F::WORDS;
  T *to = out + (row * blocks + block) * ELEMENTS;
  read_unit<F>(table + ((int64_t)ids[row] * blocks + block) * F::BYTES, within % F::PARTS,
               [&](int quad, float4 v) { store4(to + 4 * quad, v); });
}

template <typename F, int MODE, int ROWS> __device__ void matvec(const MatvecParams &p) {
  extern __shared__ __align__(16) float v[];
  constexpr int PER_BLOCK = F::PARTS * F::WORDS;  // float4 of the vector
  constexpr int AHEAD = 32 / F::WORDS / ROWS;     // units in flight per lane and row
  constexpr int SPAN = F::WORDS / F::GROUPS;      // words of a group
  const int lane = threadIdx.x % WARP, warp = blockIdx.x * 8 + threadIdx.x / WARP, warps = gridDim.x * 8;
  const int units = p.columns / (4 * F::WORDS), bytes = units / F::PARTS * F::BYTES, total = all_rows<MODE>(p);
  typename F::Raw raw[ROWS][AHEAD];
  int first = warp * ROWS;
  auto block_of = [&](int r, int unit) { return row_of<MODE>(p, min(first + r, total - 1), bytes) + unit / F::PARTS * F::BYTES; };
  auto fetch = [&](int c) {
#pragma unroll
    for (int a = 0; a < AHEAD; a++) {
      const int unit = c + a * WARP + lane;
#pragma unroll
      for (int r = 0; r < ROWS; r++)
        if (unit < units) F::load(raw[r][a], block_of(r, unit), unit % F::PARTS);
    }
  };
  if (first < total) fetch(0);
  stage(p, v, place<F>);
  const float4 *v4 = (const float4 *)v;
  Outcome<MODE, ROWS> outcome;
  for (; first < total; first += warps * ROWS) {
    float sums[ROWS] = {};
    for (int c = 0; c < units; c += AHEAD * WARP) {
      if (c > 0 || first != warp * ROWS) fetch(c);
#pragma unroll
      for (int a = 0; a < AHEAD; a++) {
        const int unit = c + a * WARP + lane, part = unit % F::PARTS;
        if (unit >= units) break;
        float4 x[F::WORDS];
        float totals[F::GROUPS] = {};
#pragma unroll
        for (int k = 0; k < F::WORDS; k++) {
          x[k] = v4[place<F>(unit / F::PARTS * PER_BLOCK + F::quad(part, k))];
          if (F::MIN) totals[k / SPAN] += (x[k].x + x[k].y) + (x[k].z + x[k].w);
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
          uint32_t w[F::WORDS];
          float scale[F::GROUPS], min[F::GROUPS];
          F::dequantise(raw[r][a], block_of(r, unit), part, w, scale, min);
#pragma unroll
          for (int g = 0; g < F::GROUPS; g++) {
            float sum = 0.f;
#pragma unroll
            for (int k = 0; k < SPAN; k++) sum += dot4<F>(w[g * SPAN + k], x[g * SPAN + k]);
            sums[r] += scale[g] * sum;
            if (F::MIN) sums[r] += min[g] * totals[g];
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) sums[r] = warp_sum(sums[r]);
    if (lane == 0) outcome.take(p, first, total, sums);
  }
  if (lane == 0) outcome.report(p);
}

#define DEQUANTISE(FORMAT, NAME, T)                                                                            \
  extern "C" __global__ void dequantise_##FORMAT##_##NAME(const uint8_t *w, T *out, int64_t units) { \
    dequantise<FORMAT>(w, out, units);                                                                         \
  }
#define GATHER(FORMAT, NAME, T)                                                                           \
  extern "C" __global__ void gather_##FORMAT##_##NAME(const uint8_t *table, const uint32_t *ids, T *out, int64_t units, int per_row) { \
    gather<FORMAT>(table, ids, out, units, per_row);                                                      \
  }
#define INSTANCE(FORMAT)                                                                                                        \
  extern "C" __global__ void decode_embed_##FORMAT(const uint8_t *table, float scale, float *x, int n, const float *frequencies, \
                                                   const float *amplitudes, float *cos, float *sin, int tables, int half,        \
                                                   const DecodeState *state) {                                                  \
    embed<FORMAT>(table, scale, x, n, frequencies, amplitudes, cos, sin, tables, half, state);                                  \
  }                                                                                                                             \
  DEQUANTISE(FORMAT, bf16, __nv_bfloat16)                                                                                            \
  DEQUANTISE(FORMAT, f16, __half)                                                                                                    \
  DEQUANTISE(FORMAT, f32, float)                                                                                                     \
  GATHER(FORMAT, bf16, __nv_bfloat16)                                                                                           \
  GATHER(FORMAT, f16, __half)                                                                                                   \
  GATHER(FORMAT, f32, float)                                                                                                    \
  MATVECS(FORMAT, FORMAT, __launch_bounds__(256, 2))
// The build compiles each format apart, with ONLY_FORMAT set.
#ifdef ONLY_FORMAT
#define EXPANDED(FORMAT) INSTANCE(FORMAT)
EXPANDED(ONLY_FORMAT)
#else
INSTANCE(q4_0)
INSTANCE(q4_1)
INSTANCE(q5_0)
INSTANCE(q5_1)
INSTANCE(q8_0)
INSTANCE(q2_k)
INSTANCE(q3_k)
INSTANCE(q4_k)
INSTANCE(q5_k)
INSTANCE(q6_k)
#endif
