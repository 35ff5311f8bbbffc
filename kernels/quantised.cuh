// Passes over quantised weights, in f32 arithmetic from the blocks as stored, without rounding the vector. Shared by
// quantised.cu and affine.cu, whose headers hold launches and shapes.
//
// A lane takes a unit of a block: WORDS times four elements. Of a format F these want WORDS, GROUPS, Raw, and an object
// with
//
//   block(u), part(u)       the block of unit u of a row or matrix, and which of the block's units it is
//   bytes(), quads()        bytes of a block, and how many times four elements it has
//   quad(part, k)           which four of the block's elements are number k of a unit
//   load(raw, block, part)  issues the loads of a unit, so that many are in flight
//   each(raw, .., take)     passes the unit's elements on four at a time: take(index among the block's fours, values)
//   prepare(v, units)       after the vector lies in shared memory, before it is used
//   totals(totals, ..)      sums of the vector over a unit, if they lie ready; with MIN they are taken each time, over
//                           SPAN times four elements
//   add(sum, raw, .., x, totals)  adds the product of the unit and its part x of the vector
//
// EVEN: blocks are consecutive elements, and a whole number of them has as many units as a warp has lanes, so that a
// lane's part of a block is the same throughout and its address advances like that of all others.
//
// A product adds up what the unit's numbers and the vector give before it meets the scale: sum_e (s q_e + m) v_e = s
// sum_e q_e v_e + m sum_e v_e. Bound by the weights' bytes where rows are many; where they are few, as decode_matvec,
// by the chain of wait, vector, reduction and store.
#pragma once
#include "matvec.cuh"

// Unlike load16_stream these leave lines in L1: a line holds parts of several threads' words.
__device__ inline uint16_t load2(const void *p) {
  uint16_t v;
  asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(v) : "l"(p));
  return v;
}
__device__ inline uint32_t load4(const void *p) {
  uint32_t v;
  asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}
__device__ inline uint2 load8(const void *p) {
  uint2 v;
  asm volatile("ld.global.nc.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}
__device__ inline uint4 load16_cached(const void *p) {
  uint4 v;
  asm volatile("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

// Where float4 number i of the vector lies in shared memory: eight lanes that read at once, each from a unit of its
// own, find eight different groups of banks. Units in a row are 8, 16 or 32 elements apart, or, in the formats of 256,
// in two rows of 64 or 128.
template <typename F> __device__ inline int place(int i) {
  return F::EVEN ? i + (uint32_t)i / 8 : i + i / 8 + (F::GROUPS > 1 ? i / 32 : 0);
}

template <typename F, typename Take> __device__ inline void read_unit(F f, const uint8_t *block, int part, Take take) {
  typename F::Raw raw;
  f.load(raw, block, part);
  f.each(raw, block, part, take);
}

template <typename F>
__device__ void embed(F f, const uint8_t *table, float factor, float *x, int n, const float *frequencies, const float *amplitudes, float *cos,
                      float *sin, int tables, int half, const DecodeState *state) {
  release_next();
  await_previous();
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  rotary(i, frequencies, amplitudes, cos, sin, tables, half, state->position);
  if (i >= n / (4 * F::WORDS)) return;
  const int block = f.block(i), part = f.part(i), blocks = f.block(n / (4 * F::WORDS));
  read_unit(f, table + ((int64_t)state->token * blocks + block) * f.bytes(), part, [&](int quad, float4 v) {
    ((float4 *)x)[block * f.quads() + quad] = make_float4(v.x * factor, v.y * factor, v.z * factor, v.w * factor);
  });
}

template <typename T> __device__ inline void store4(T *out, float4 v) { *(uint2 *)out = make_uint2(pack<T>(v.x, v.y), pack<T>(v.z, v.w)); }
template <> __device__ inline void store4(float *out, float4 v) { *(float4 *)out = v; }

// Elements go through shared memory, so that a warp writes whole lines: a lane's unit in parts would write a fraction of
// 32 sectors each time. The 32 units of a warp are whole blocks, and so are those of the last one.
template <typename F, typename T> __device__ void dequantise(F f, const uint8_t *w, T *out, int64_t units) {
  struct alignas(4 * sizeof(T)) Four {
    T v[4];
  };
  constexpr int FOURS = WARP * F::WORDS;
  // One of 16 left out: lanes' units then lie in different banks.
  auto place = [](int i) { return i + i / 16; };
  __shared__ Four staged[256 / WARP][FOURS + FOURS / 16];
  const int lane = threadIdx.x % WARP;
  Four *own = staged[threadIdx.x / WARP];
  const int64_t unit = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, first = unit - lane, block = f.block(unit);
  if (first >= units) return;
  const int before = (int)(block - f.block(first)) * f.quads(), count = (int)min(units - first, (int64_t)WARP) * F::WORDS;
  if (unit < units)
    read_unit(f, w + block * f.bytes(), f.part(unit), [&](int quad, float4 v) { store4(own[place(before + quad)].v, v); });
  __syncwarp();
  Four *to = (Four *)out + first * F::WORDS;
#pragma unroll
  for (int k = 0; k < F::WORDS; k++)
    if (k * WARP + lane < count) to[k * WARP + lane] = own[place(k * WARP + lane)];
}

template <typename F, typename T>
__device__ void gather(F f, const uint8_t *table, const uint32_t *ids, T *out, int64_t units, int per_row) {
  const int64_t unit = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (unit >= units) return;
  const int64_t row = unit / per_row;
  const int within = unit % per_row, block = f.block(within), blocks = f.block(per_row);
  T *to = out + (row * blocks + block) * (4 * f.quads());
  read_unit(f, table + ((int64_t)ids[row] * blocks + block) * f.bytes(), f.part(within),
            [&](int quad, float4 v) { store4(to + 4 * quad, v); });
}

template <typename F, int MODE, int ROWS> __device__ void multiply(F f, const MatvecParams &p) {
  extern __shared__ __align__(16) float v[];
  constexpr int AHEAD = 32 / F::WORDS / ROWS;  // units in flight per lane and row
  const int lane = threadIdx.x % WARP, warp = blockIdx.x * 8 + threadIdx.x / WARP, warps = gridDim.x * 8;
  const int units = p.columns / (4 * F::WORDS), bytes = f.block(units) * f.bytes(), total = all_rows<MODE>(p);
  typename F::Raw raw[ROWS][AHEAD];
  int first = warp * ROWS;
  auto row = [&](int r) { return row_of<MODE>(p, min(first + r, total - 1), bytes); };
  // With EVEN: a lane's first block in each row.
  const uint8_t *at[ROWS];
  auto aim = [&]() {
    if constexpr (F::EVEN) {
#pragma unroll
      for (int r = 0; r < ROWS; r++) at[r] = row(r) + f.block(lane) * f.bytes();
    }
  };
  // The block and part of a lane's unit, of those from `from` on.
  auto block_of = [&](int r, int from) {
    if constexpr (F::EVEN) return at[r] + (uint32_t)from / WARP * (f.block(WARP) * f.bytes());
    else return row(r) + f.block(from + lane) * f.bytes();
  };
  auto part_of = [&](int from) { return f.part(F::EVEN ? lane : from + lane); };
  auto fetch = [&](int c) {
#pragma unroll
    for (int a = 0; a < AHEAD; a++) {
      const int from = c + a * WARP;
#pragma unroll
      for (int r = 0; r < ROWS; r++)
        if (from + lane < units) f.load(raw[r][a], block_of(r, from), part_of(from));
    }
  };
  if (first < total) {
    aim();
    fetch(0);
  }
  stage(p, v, place<F>);
  f.prepare(v, units);
  const float4 *v4 = (const float4 *)v;
  Outcome<MODE, ROWS> outcome;
  for (; first < total; first += warps * ROWS) {
    float sums[ROWS] = {};
    if (first != warp * ROWS) aim();
    for (int c = 0; c < units; c += AHEAD * WARP) {
      if (c > 0 || first != warp * ROWS) fetch(c);
#pragma unroll
      for (int a = 0; a < AHEAD; a++) {
        const int from = c + a * WARP, part = part_of(from);
        if (from + lane >= units) break;
        float4 x[F::WORDS];
        float totals[F::GROUPS] = {};
#pragma unroll
        for (int k = 0; k < F::WORDS; k++) {
          x[k] = v4[place<F>(F::EVEN ? (from + lane) * F::WORDS + k : f.block(from + lane) * f.quads() + f.quad(part, k))];
          if (F::MIN) totals[k / F::SPAN] += (x[k].x + x[k].y) + (x[k].z + x[k].w);
        }
        f.totals(totals, v, from + lane, units);
#pragma unroll
        for (int r = 0; r < ROWS; r++) f.add(sums[r], raw[r][a], block_of(r, from), part, x, totals);
      }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) sums[r] = warp_sum(sums[r]);
    if (lane == 0) outcome.take(p, first, total, sums);
  }
  if (lane == 0) outcome.report(p);
}
