// Passes over quantised weights, in f32 arithmetic from the blocks as stored, without rounding the vector: those of a
// decode step as in decode.cu, and the dequantisation of a matrix for products of many rows. One format to a module
// (blocks.cuh): a model uses a few of them, and the driver translates only those.
//
// decode_embed_FORMAT   x = embedding[token] * scale, and the rotary tables, as decode_embed.
//                       Grid ceil(max(N, tables * half) / 256), 256 threads.
// decode_MODE_FORMAT_R  W v and its epilogue, as decode_matvec: up to four matrices [rows, N] of this format.
//                       Grid so that each warp gets R rows at a time, 256 threads, shared memory 16 (q + q / 8 + q / 32) bytes with
//                       q = N / 4. N whole blocks.
// dequantise_FORMAT_T   out = W, each element rounded once to T: `units` units of consecutive whole rows; out aligned to
//                       16 bytes. Grid ceil(units / 256), 256 threads. Bound by the bytes written.
// gather_FORMAT_T       out[i] = W[ids[i]], each element rounded once to T: ids u32 [n] below W's rows, `units` units in
//                       all, `per_row` to a row; out aligned to 16 bytes. Grid ceil(units / 256), 256 threads.
//
// A lane takes a unit of a block, 32 elements (q8_0: 8); the passes: quantised.cuh.
#include "blocks.cuh"

// A format of blocks.cuh as quantised.cuh wants it.
template <typename Q> struct Ggml : Q {
  static constexpr int SPAN = Q::WORDS / Q::GROUPS;
  static constexpr bool EVEN = false;
  template <typename I> __device__ static I block(I unit) { return unit / Q::PARTS; }
  template <typename I> __device__ static int part(I unit) { return unit % Q::PARTS; }
  __device__ static constexpr int bytes() { return Q::BYTES; }
  __device__ static constexpr int quads() { return Q::PARTS * Q::WORDS; }

  __device__ static float number(uint32_t w, int i) { return Q::SIGNED ? (float)(int8_t)(w >> 8 * i) : (float)(uint8_t)(w >> 8 * i); }
  __device__ static float dot4(uint32_t w, float4 v) {
    return number(w, 0) * v.x + number(w, 1) * v.y + number(w, 2) * v.z + number(w, 3) * v.w;
  }

  template <typename Take> __device__ static void each(const typename Q::Raw &raw, const uint8_t *block, int part, Take take) {
    uint32_t w[Q::WORDS];
    float scale[Q::GROUPS], min[Q::GROUPS] = {};
    Q::dequantise(raw, block, part, w, scale, min);
#pragma unroll
    for (int k = 0; k < Q::WORDS; k++) {
      const int g = k * Q::GROUPS / Q::WORDS;
      auto value = [&](int e) { return number(w[k], e) * scale[g] + min[g]; };
      take(Q::quad(part, k), make_float4(value(0), value(1), value(2), value(3)));
    }
  }

  __device__ static void prepare(float *, int) {}
  __device__ static void totals(float (&)[Q::GROUPS], const float *, int, int) {}
  __device__ static void add(float &to, const typename Q::Raw &raw, const uint8_t *block, int part, const float4 (&x)[Q::WORDS],
                             const float (&totals)[Q::GROUPS]) {
    uint32_t w[Q::WORDS];
    float scale[Q::GROUPS], min[Q::GROUPS];
    Q::dequantise(raw, block, part, w, scale, min);
#pragma unroll
    for (int g = 0; g < Q::GROUPS; g++) {
      float sum = 0.f;
#pragma unroll
      for (int k = 0; k < SPAN; k++) sum += dot4(w[g * SPAN + k], x[g * SPAN + k]);
      to += scale[g] * sum;
      if (Q::MIN) to += min[g] * totals[g];
    }
  }
};

template <typename Q, int MODE, int ROWS> __device__ void matvec(const MatvecParams &p) { multiply<Ggml<Q>, MODE, ROWS>({}, p); }

#define DEQUANTISE(FORMAT, NAME, T)                                                                            \
  extern "C" __global__ void dequantise_##FORMAT##_##NAME(const uint8_t *w, T *out, int64_t units) { \
    dequantise(Ggml<FORMAT>(), w, out, units);                                                                         \
  }
#define GATHER(FORMAT, NAME, T)                                                                           \
  extern "C" __global__ void gather_##FORMAT##_##NAME(const uint8_t *table, const uint32_t *ids, T *out, int64_t units, int per_row) { \
    gather(Ggml<FORMAT>(), table, ids, out, units, per_row);                                                      \
  }
#define INSTANCE(FORMAT)                                                                                                        \
  extern "C" __global__ void decode_embed_##FORMAT(const uint8_t *table, float scale, float *x, int n, const float *frequencies, \
                                                   const float *amplitudes, float *cos, float *sin, int tables, int half,        \
                                                   const DecodeState *state) {                                                  \
    embed(Ggml<FORMAT>(), table, scale, x, n, frequencies, amplitudes, cos, sin, tables, half, state);                                  \
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
