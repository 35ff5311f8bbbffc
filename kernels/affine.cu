// Passes over matrices of MLX's affine quantisation, as stored: those of quantised.cu, by the same templates
// (quantised.cuh). One number of bits to a module; the group size (32, 64 or 128 values) and the type of scale and bias
// (0: f32, 1: f16, 2: bf16) come with the launch. B: 2, 3, 4, 5, 6 or 8.
//
// decode_embed_affineB    x = embedding[token] * scale, and the rotary tables, as decode_embed.
//                         Grid ceil(max(N, tables * half) / 256), 256 threads.
// decode_MODE_affineB_R   W v and its epilogue, as decode_matvec: up to four matrices [rows, N] of this format.
//                         Grid so that each warp gets R rows at a time, 256 threads, shared memory 16 (q + q / 8) +
//                         4 N / unit bytes with q = N / 4. N whole groups.
// dequantise_affineB_T    out = W, each element rounded once to T: `units` units of consecutive whole rows; out aligned
//                         to 16 bytes. Grid ceil(units / 256), 256 threads.
// gather_affineB_T        out[i] = W[ids[i]], each element rounded once to T: ids u32 [n] below W's rows, `units` units
//                         in all, `per_row` to a row; out aligned to 16 bytes. Grid ceil(units / 256), 256 threads.
//
// Layout, as in src/ops/blocks/: a group is its scale s, its bias b and the numbers q in a little-endian bit stream;
// a value is s q + b. A unit, which begins and ends at 4-byte words and within a group, is 32 values, or 16 of 4 and 6
// bits, or 8 of 8 bits: so that 32 lanes' words lie in few lines. What a unit's part of the vector adds up to is kept
// in shared memory for all rows.
#include "quantised.cuh"

// As `settings` in src/ops/matvec/cuda.rs numbers the types of scale and bias.
enum { F32, F16, BF16 };

template <int BITS> struct Affine {
  static constexpr int WORDS = BITS == 8 ? 2 : BITS == 4 || BITS == 6 ? 4 : 8, GROUPS = 1, SPAN = WORDS;
  static constexpr int LOG = BITS == 8 ? 3 : BITS == 4 || BITS == 6 ? 4 : 5;  // of a unit's values
  static constexpr int UNIT = 4 * WORDS * BITS / 8;                          // bytes
  static constexpr bool MIN = false, EVEN = true;                            // the sums of the vector lie ready
  struct Raw {
    uint32_t head, q[UNIT / 4];
  };
  // Units to a group, as a power of two; bytes of a scale and bias, and of a group.
  int scale, shift, head_bytes, size;

  __device__ Affine(int group, int scale)
      : scale(scale), shift((group == 32 ? 5 : group == 64 ? 6 : 7) - LOG), head_bytes(scale == F32 ? 8 : 4), size(head_bytes + (UNIT << shift)) {}
  template <typename I> __device__ I block(I unit) const { return unit >> shift; }
  template <typename I> __device__ int part(I unit) const { return (int)unit & ((1 << shift) - 1); }
  __device__ int bytes() const { return size; }
  __device__ int quads() const { return WORDS << shift; }
  __device__ static int quad(int part, int k) { return part * WORDS + k; }

  __device__ void load(Raw &raw, const uint8_t *block, int part) const {
    const uint8_t *from = block + head_bytes + UNIT * part;
    raw.head = load4(block);
#pragma unroll
    for (int k = 0; k < UNIT / 4; k++) raw.q[k] = load4(from + 4 * k);
  }

  // Scale and bias. The bias in f32 is a load of its own, of a line that is there: such matrices are rare, and it would
  // take a register for each unit in flight.
  __device__ float2 head(const Raw &raw, const uint8_t *block) const {
    if (scale == BF16) return unpack<__nv_bfloat16>(raw.head);
    if (scale == F16) return unpack<__half>(raw.head);
    return make_float2(__uint_as_float(raw.head), __uint_as_float(load4(block + 4)));
  }

  // Number j of the unit, exactly, without the conversion unit, which is slow: its bits are put into the mantissa of
  // 2^23 where they are, and one product undoes both their place and the 2^23. One shift serves as many numbers as fit.
  __device__ static float number(const Raw &raw, int j) {
    constexpr int FIT = BITS == 4 ? 4 : BITS == 2 ? 8 : 23 / BITS;
    constexpr uint32_t MASK = (1u << BITS) - 1;
    const int at = j * BITS, i = at / 32, shift = at % 32;
    const int before = (BITS - 32 * i % BITS) % BITS;  // bits of a number that began in the word ahead
    const int index = (shift - before) / BITS, place = index % FIT * BITS;
    if (shift + BITS > 32) {
      const uint32_t over = __funnelshift_r(raw.q[i], raw.q[(i + 1) % (UNIT / 4)], shift);
      return __uint_as_float(masked(over, MASK)) - 8388608.f;
    }
    const uint32_t bits = masked(raw.q[i] >> (shift - place), MASK << place);
    return fmaf(__uint_as_float(bits), 1.f / (1 << place), -8388608.f / (1 << place));
  }
  // The bits of `mask` in 2^23. In one instruction, of which the compiler makes two.
  __device__ static uint32_t masked(uint32_t q, uint32_t mask) {
    uint32_t out;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(out) : "r"(q), "r"(mask), "r"(0x4b000000u));
    return out;
  }

  template <typename Take> __device__ void each(const Raw &raw, const uint8_t *block, int part, Take take) const {
    const float2 h = head(raw, block);
    auto value = [&](int j) { return number(raw, j) * h.x + h.y; };
#pragma unroll
    for (int k = 0; k < WORDS; k++) take(quad(part, k), make_float4(value(4 * k), value(4 * k + 1), value(4 * k + 2), value(4 * k + 3)));
  }

  // Sums of the vector over each unit, after the vector.
  __device__ static const float *ready(const float *v, int units) { return v + 4 * place<Affine>(units * WORDS); }
  __device__ static void prepare(float *v, int units) {
    const float4 *v4 = (const float4 *)v;
    for (int unit = threadIdx.x; unit < units; unit += 256) {
      float sum = 0.f;
#pragma unroll
      for (int k = 0; k < WORDS; k++) {
        const float4 x = v4[place<Affine>(unit * WORDS + k)];
        sum += (x.x + x.y) + (x.z + x.w);
      }
      const_cast<float *>(ready(v, units))[unit] = sum;
    }
    __syncthreads();
  }
  __device__ static void totals(float (&totals)[1], const float *v, int unit, int units) { totals[0] = ready(v, units)[unit]; }

  __device__ void add(float &to, const Raw &raw, const uint8_t *block, int, const float4 (&x)[WORDS], const float (&totals)[1]) const {
    const float2 h = head(raw, block);
    float sum = 0.f;
#pragma unroll
    for (int k = 0; k < WORDS; k++) {
      sum = fmaf(number(raw, 4 * k), x[k].x, sum);
      sum = fmaf(number(raw, 4 * k + 1), x[k].y, sum);
      sum = fmaf(number(raw, 4 * k + 2), x[k].z, sum);
      sum = fmaf(number(raw, 4 * k + 3), x[k].w, sum);
    }
    to = fmaf(h.x, sum, fmaf(h.y, totals[0], to));
  }
};

template <typename F, int MODE, int ROWS> __device__ void matvec(const MatvecParams &p) { multiply<F, MODE, ROWS>(F(p.group, p.scale), p); }

#define DEQUANTISE(BITS, NAME, T)                                                                                                  \
  extern "C" __global__ void dequantise_affine##BITS##_##NAME(const uint8_t *w, T *out, int64_t units, int group, int scale) {     \
    dequantise(Affine<BITS>(group, scale), w, out, units);                                              \
  }
#define GATHER(BITS, NAME, T)                                                                                                      \
  extern "C" __global__ void gather_affine##BITS##_##NAME(const uint8_t *table, const uint32_t *ids, T *out, int64_t units,        \
                                                          int per_row, int group, int scale) {                                     \
    gather(Affine<BITS>(group, scale), table, ids, out, units, per_row);                                   \
  }
#define INSTANCE(BITS)                                                                                                             \
  extern "C" __global__ void decode_embed_affine##BITS(const uint8_t *table, float factor, float *x, int n,                        \
                                                       const float *frequencies, const float *amplitudes, float *cos, float *sin,  \
                                                       int tables, int half, const DecodeState *state, int group, int scale) {     \
    embed(Affine<BITS>(group, scale), table, factor, x, n, frequencies, amplitudes, cos, sin, tables, half, state); \
  }                                                                                                                                \
  DEQUANTISE(BITS, bf16, __nv_bfloat16)                                                                                            \
  DEQUANTISE(BITS, f16, __half)                                                                                                    \
  DEQUANTISE(BITS, f32, float)                                                                                                     \
  GATHER(BITS, bf16, __nv_bfloat16)                                                                                                \
  GATHER(BITS, f16, __half)                                                                                                        \
  GATHER(BITS, f32, float)                                                                                                         \
  MATVECS(affine##BITS, Affine<BITS>, __launch_bounds__(256, BITS == 4 ? 3 : 2))
// The build compiles each number of bits apart, with ONLY_FORMAT set.
#ifdef ONLY_FORMAT
#define EXPANDED(BITS) INSTANCE(BITS)
EXPANDED(ONLY_FORMAT)
#else
INSTANCE(2)
INSTANCE(3)
INSTANCE(4)
INSTANCE(5)
INSTANCE(6)
INSTANCE(8)
#endif
