// The quantised formats, one struct each. Layouts: ggml's block_q*
// (https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h); the same as src/ops/blocks/, cut so that a
// thread's share of a block comes with few wide loads.
//
// A thread takes a unit: WORDS words of four 8-bit numbers each, of PARTS units to a block. Word k holds the elements 4
// quad(part, k) .. + 3 of the block; the words fall into GROUPS groups of equal size, and an element is scale[group] *
// number (+ min[group], with MIN).
//
// A new one: a struct here, its name in kernels/build.rs and src/ops/cuda.rs, and a variant of `Ggml` in
// src/storage.rs.
//
// `load` issues the loads and `dequantise` uses their values, so that many loads are in flight. Blocks of 18, 22, 34,
// 110 and 210 bytes lie at even addresses, and are read as the 4-byte words that cover them, shifted into place; up to
// 4 bytes after the matrix are read and ignored. Row starts: the base is aligned to 256 bytes, and a row holds whole
// blocks.
#pragma once
#include "quantised.cuh"

// N words that cover 4 (N - 1) bytes from an even address; the shift that brings them into place, 0 or 16 bits.
template <int N> __device__ inline void load_words(uint32_t (&a)[N], const uint8_t *p) {
  const uint8_t *from = (const uint8_t *)((uintptr_t)p & ~(uintptr_t)3);
#pragma unroll
  for (int k = 0; k < N; k++) a[k] = load4(from + 4 * k);
}
__device__ inline int shift_of(const uint8_t *p) { return ((int)(uintptr_t)p & 2) * 8; }

// The low half of a word as a half-precision number.
__device__ inline float half_at(uint32_t bits) { return unpack<__half>(bits).x; }

__device__ inline uint32_t low(uint32_t q) { return q & 0x0f0f0f0fu; }
__device__ inline uint32_t high(uint32_t q) { return q >> 4 & 0x0f0f0f0fu; }
// Four bits of a mask, from bit `from` on, as bit 4 of four bytes.
__device__ inline uint32_t fifth(uint32_t mask, int from) { return (mask >> from & 15u) * 0x02040810u & 0x10101010u; }
// Bytes below 128 less OFFSET, each a signed byte.
template <int OFFSET> __device__ inline uint32_t minus(uint32_t q) { return q + (128 - OFFSET) * 0x01010101u ^ 0x80808080u; }

struct q4_0 {
  static constexpr int BYTES = 18, PARTS = 1, WORDS = 8, GROUPS = 1;
  static constexpr bool SIGNED = true, MIN = false;
  struct Raw {
    uint32_t a[5];
  };
  __device__ static int quad(int, int k) { return k; }
  __device__ static void load(Raw &raw, const uint8_t *block, int) { load_words(raw.a, block); }
  __device__ static void dequantise(const Raw &raw, const uint8_t *block, int, uint32_t (&w)[8], float (&scale)[1], float (&)[1]) {
    const int shift = shift_of(block);
    scale[0] = half_at(raw.a[0] >> shift);
#pragma unroll
    for (int k = 0; k < 4; k++) {
      // The numbers begin two bytes in.
      const uint32_t q = __funnelshift_rc(raw.a[k], raw.a[k + 1], shift + 16);
      w[k] = minus<8>(low(q));
      w[4 + k] = minus<8>(high(q));
    }
  }
};

struct q4_1 {
  static constexpr int BYTES = 20, PARTS = 1, WORDS = 8, GROUPS = 1;
  static constexpr bool SIGNED = false, MIN = true;
  struct Raw {
    uint32_t a[5];
  };
  __device__ static int quad(int, int k) { return k; }
  __device__ static void load(Raw &raw, const uint8_t *block, int) { load_words(raw.a, block); }
  __device__ static void dequantise(const Raw &raw, const uint8_t *, int, uint32_t (&w)[8], float (&scale)[1], float (&min)[1]) {
    scale[0] = half_at(raw.a[0]);
    min[0] = half_at(raw.a[0] >> 16);
#pragma unroll
    for (int k = 0; k < 4; k++) {
      w[k] = low(raw.a[1 + k]);
      w[4 + k] = high(raw.a[1 + k]);
    }
  }
};

struct q5_0 {
  static constexpr int BYTES = 22, PARTS = 1, WORDS = 8, GROUPS = 1;
  static constexpr bool SIGNED = true, MIN = false;
  struct Raw {
    uint32_t a[6];
  };
  __device__ static int quad(int, int k) { return k; }
  __device__ static void load(Raw &raw, const uint8_t *block, int) { load_words(raw.a, block); }
  __device__ static void dequantise(const Raw &raw, const uint8_t *block, int, uint32_t (&w)[8], float (&scale)[1], float (&)[1]) {
    const int shift = shift_of(block);
    scale[0] = half_at(raw.a[0] >> shift);
    const uint32_t fifths = __funnelshift_rc(raw.a[0], raw.a[1], shift + 16);
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const uint32_t q = __funnelshift_rc(raw.a[k + 1], raw.a[k + 2], shift + 16);
      w[k] = minus<16>(low(q) | fifth(fifths, 4 * k));
      w[4 + k] = minus<16>(high(q) | fifth(fifths, 16 + 4 * k));
    }
  }
};

struct q5_1 {
  static constexpr int BYTES = 24, PARTS = 1, WORDS = 8, GROUPS = 1;
  static constexpr bool SIGNED = false, MIN = true;
  struct Raw {
    uint2 head, q[2];
  };
  __device__ static int quad(int, int k) { return k; }
  __device__ static void load(Raw &raw, const uint8_t *block, int) {
    raw.head = load8(block);
    raw.q[0] = load8(block + 8);
    raw.q[1] = load8(block + 16);
  }
  __device__ static void dequantise(const Raw &raw, const uint8_t *, int, uint32_t (&w)[8], float (&scale)[1], float (&min)[1]) {
    scale[0] = half_at(raw.head.x);
    min[0] = half_at(raw.head.x >> 16);
    const uint32_t q[4] = {raw.q[0].x, raw.q[0].y, raw.q[1].x, raw.q[1].y};
#pragma unroll
    for (int k = 0; k < 4; k++) {
      w[k] = low(q[k]) | fifth(raw.head.y, 4 * k);
      w[4 + k] = high(q[k]) | fifth(raw.head.y, 16 + 4 * k);
    }
  }
};

// A quarter of a block to a unit: a whole one would be nine loads, each of 32 lanes over nine lines.
struct q8_0 {
  static constexpr int BYTES = 34, PARTS = 4, WORDS = 2, GROUPS = 1;
  static constexpr bool SIGNED = true, MIN = false;
  struct Raw {
    uint32_t a[3];
    uint16_t d;
  };
  __device__ static int quad(int part, int k) { return 2 * part + k; }
  __device__ static void load(Raw &raw, const uint8_t *block, int part) {
    load_words(raw.a, block + 2 + 8 * part);
    raw.d = load2(block);
  }
  __device__ static void dequantise(const Raw &raw, const uint8_t *block, int, uint32_t (&w)[2], float (&scale)[1], float (&)[1]) {
    const int shift = shift_of(block + 2);
    scale[0] = half_at(raw.d);
    w[0] = __funnelshift_r(raw.a[0], raw.a[1], shift);
    w[1] = __funnelshift_r(raw.a[1], raw.a[2], shift);
  }
};

// Scales and minima, six bits each, of the sub-blocks 2 i and 2 i + 1: bytes 4..15 of a block, packed.
__device__ inline void scales_and_minima(uint4 head, int i, float (&scale)[2], float (&min)[2]) {
  const int shift = 16 * (i & 1);
  const uint32_t a = head.y >> shift, b = head.z >> shift, c = head.w >> shift;
  const uint32_t s = i < 2 ? a & 0x3f3fu : c & 0x0f0fu | (a & 0xc0c0u) >> 2;
  const uint32_t m = i < 2 ? b & 0x3f3fu : c >> 4 & 0x0f0fu | (b & 0xc0c0u) >> 2;
  const float2 d = unpack<__half>(head.x);
#pragma unroll
  for (int g = 0; g < 2; g++) {
    scale[g] = d.x * (float)(s >> 8 * g & 0xffu);
    min[g] = -(d.y * (float)(m >> 8 * g & 0xffu));
  }
}

// Unit 2 i + h: half h of the 32 bytes that hold the sub-blocks 2 i (low) and 2 i + 1 (high).
struct q4_k {
  static constexpr int BYTES = 144, PARTS = 8, WORDS = 8, GROUPS = 2;
  static constexpr bool SIGNED = false, MIN = true;
  struct Raw {
    uint4 head, q;
  };
  __device__ static int quad(int part, int k) { return part / 2 * 16 + k / 4 * 8 + part % 2 * 4 + k % 4; }
  __device__ static void load(Raw &raw, const uint8_t *block, int part) {
    raw.head = load16_cached(block);
    raw.q = load16_cached(block + 16 + 16 * part);
  }
  __device__ static void dequantise(const Raw &raw, const uint8_t *, int part, uint32_t (&w)[8], float (&scale)[2], float (&min)[2]) {
    scales_and_minima(raw.head, part / 2, scale, min);
    const uint32_t q[4] = {raw.q.x, raw.q.y, raw.q.z, raw.q.w};
#pragma unroll
    for (int k = 0; k < 4; k++) {
      w[k] = low(q[k]);
      w[4 + k] = high(q[k]);
    }
  }
};

struct q5_k {
  static constexpr int BYTES = 176, PARTS = 8, WORDS = 8, GROUPS = 2;
  static constexpr bool SIGNED = false, MIN = true;
  struct Raw {
    uint4 head, fifths, q;
  };
  __device__ static int quad(int part, int k) { return q4_k::quad(part, k); }
  __device__ static void load(Raw &raw, const uint8_t *block, int part) {
    raw.head = load16_cached(block);
    raw.fifths = load16_cached(block + 16 + 16 * (part % 2));
    raw.q = load16_cached(block + 48 + 16 * part);
  }
  __device__ static void dequantise(const Raw &raw, const uint8_t *, int part, uint32_t (&w)[8], float (&scale)[2], float (&min)[2]) {
    scales_and_minima(raw.head, part / 2, scale, min);
    const uint32_t q[4] = {raw.q.x, raw.q.y, raw.q.z, raw.q.w};
    const uint32_t fifths[4] = {raw.fifths.x, raw.fifths.y, raw.fifths.z, raw.fifths.w};
    const int bit = part / 2 * 2;
#pragma unroll
    for (int k = 0; k < 4; k++) {
      w[k] = low(q[k]) | (fifths[k] >> bit & 0x01010101u) << 4;
      w[4 + k] = high(q[k]) | (fifths[k] >> (bit + 1) & 0x01010101u) << 4;
    }
  }
};

// Unit 4 i + t: of half i of the block, elements 8 t .. + 7 of each of its four quarters, which share bytes. A scale
// and a minimum, four bits each, for every 16 elements.
struct q2_k {
  static constexpr int BYTES = 84, PARTS = 8, WORDS = 8, GROUPS = 4;
  static constexpr bool SIGNED = false, MIN = true;
  struct Raw {
    uint32_t q[2], scales[2], d;
  };
  __device__ static int quad(int part, int k) { return part / 4 * 32 + k / 2 * 8 + part % 4 * 2 + k % 2; }
  __device__ static void load(Raw &raw, const uint8_t *block, int part) {
    const int i = part / 4, t = part % 4;
#pragma unroll
    for (int k = 0; k < 2; k++) {
      raw.q[k] = load4(block + 16 + 32 * i + 8 * t + 4 * k);
      raw.scales[k] = load4(block + 8 * i + 4 * k);
    }
    raw.d = load4(block + 80);
  }
  __device__ static void dequantise(const Raw &raw, const uint8_t *, int part, uint32_t (&w)[8], float (&scale)[4], float (&min)[4]) {
    const float2 d = unpack<__half>(raw.d);
    const int second = part % 4 / 2 * 8;
#pragma unroll
    for (int g = 0; g < 4; g++) {
      const uint32_t s = raw.scales[g / 2] >> (16 * (g % 2) + second);
      scale[g] = d.x * (float)(s & 15u);
      min[g] = -(d.y * (float)(s >> 4 & 15u));
#pragma unroll
      for (int k = 0; k < 2; k++) w[2 * g + k] = raw.q[k] >> 2 * g & 0x03030303u;
    }
  }
};

// Units as in q2_k; the third bits of both halves share bytes.
struct q3_k {
  static constexpr int BYTES = 110, PARTS = 8, WORDS = 8, GROUPS = 4;
  static constexpr bool SIGNED = true, MIN = false;
  struct Raw {
    uint32_t thirds[3], q[3], scales[4];
    uint16_t d;
  };
  __device__ static int quad(int part, int k) { return q2_k::quad(part, k); }
  __device__ static void load(Raw &raw, const uint8_t *block, int part) {
    const int i = part / 4, t = part % 4;
    load_words(raw.thirds, block + 8 * t);
    load_words(raw.q, block + 32 + 32 * i + 8 * t);
    load_words(raw.scales, block + 96);
    raw.d = load2(block + 108);
  }
  __device__ static void dequantise(const Raw &raw, const uint8_t *block, int part, uint32_t (&w)[8], float (&scale)[4], float (&)[4]) {
    const int shift = shift_of(block), i = part / 4, second = part % 4 / 2 * 8;
    const float d = half_at(raw.d);
    uint32_t s[3];
#pragma unroll
    for (int k = 0; k < 3; k++) s[k] = __funnelshift_r(raw.scales[k], raw.scales[k + 1], shift);
#pragma unroll
    for (int g = 0; g < 4; g++) {
      // Six bits less 32: four of bytes 0..7, two of bytes 8..11.
      const int at = 16 * (g % 2) + second;
      const uint32_t bits = (s[g / 2] >> (at + 4 * i) & 15u) | (s[2] >> (at + 4 * i + g / 2 * 2) & 3u) << 4;
      scale[g] = d * (float)((int)bits - 32);
#pragma unroll
      for (int k = 0; k < 2; k++) {
        const uint32_t q = __funnelshift_r(raw.q[k], raw.q[k + 1], shift), t = __funnelshift_r(raw.thirds[k], raw.thirds[k + 1], shift);
        w[2 * g + k] = minus<4>((q >> 2 * g & 0x03030303u) | (t >> (4 * i + g) & 0x01010101u) << 2);
      }
    }
  }
};

// Units as in q2_k; a scale of 8 bits for every 16 elements.
struct q6_k {
  static constexpr int BYTES = 210, PARTS = 8, WORDS = 8, GROUPS = 4;
  static constexpr bool SIGNED = true, MIN = false;
  struct Raw {
    uint32_t even[3], odd[3], top[3], scales[3];
    uint16_t d;
  };
  __device__ static int quad(int part, int k) { return part / 4 * 32 + k / 2 * 8 + part % 4 * 2 + k % 2; }
  __device__ static void load(Raw &raw, const uint8_t *block, int part) {
    const int i = part / 4, t = part % 4;
    load_words(raw.even, block + 64 * i + 8 * t);
    load_words(raw.odd, block + 64 * i + 32 + 8 * t);
    load_words(raw.top, block + 128 + 32 * i + 8 * t);
    load_words(raw.scales, block + 192 + 8 * i);
    raw.d = load2(block + 208);
  }
  __device__ static void dequantise(const Raw &raw, const uint8_t *block, int part, uint32_t (&w)[8], float (&scale)[4], float (&)[4]) {
    const int shift = shift_of(block), second = part % 4 / 2 * 8;
    const float d = half_at(raw.d);
#pragma unroll
    for (int k = 0; k < 2; k++) {
      const uint32_t even = __funnelshift_r(raw.even[k], raw.even[k + 1], shift), odd = __funnelshift_r(raw.odd[k], raw.odd[k + 1], shift);
      const uint32_t top = __funnelshift_r(raw.top[k], raw.top[k + 1], shift);
      w[k] = minus<32>(low(even) | (top & 0x03030303u) << 4);
      w[2 + k] = minus<32>(low(odd) | (top >> 2 & 0x03030303u) << 4);
      w[4 + k] = minus<32>(high(even) | (top >> 4 & 0x03030303u) << 4);
      w[6 + k] = minus<32>(high(odd) | (top >> 6 & 0x03030303u) << 4);
      // Two scales to a quarter, one for each 16 elements.
      const uint32_t s = __funnelshift_r(raw.scales[k], raw.scales[k + 1], shift) >> second;
      scale[2 * k] = d * (float)(int8_t)s;
      scale[2 * k + 1] = d * (float)(int8_t)(s >> 16);
    }
  }
};
