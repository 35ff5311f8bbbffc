// Shared by all kernels: element types, 16-byte moves, tensor-core instructions of sm_80 and later.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stddef.h>
#include <stdint.h>

// A struct that Rust fills: its size and the offset of each field are asserted here and, by `mirrored!`, there.
#define MIRRORED(STRUCT, SIZE) static_assert(sizeof(STRUCT) == SIZE, #STRUCT " differs from its mirror in Rust")
#define FIELD(STRUCT, NAME, OFFSET) static_assert(offsetof(STRUCT, NAME) == OFFSET, #STRUCT "::" #NAME " differs from its mirror in Rust")

constexpr int WARP = 32;
constexpr float LOG2E = 1.4426950408889634f;

// Conversions by name, so that templates over the element type read alike.
__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }
template <typename T> __device__ inline T from_float(float x);
template <> __device__ inline float from_float<float>(float x) { return x; }
template <> __device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <> __device__ inline __half from_float<__half>(float x) { return __float2half_rn(x); }

// Two f32 as a packed pair of 16-bit elements, the first in the low half.
template <typename T> __device__ inline uint32_t pack(float lo, float hi);
template <> __device__ inline uint32_t pack<__nv_bfloat16>(float lo, float hi) {
  __nv_bfloat162 p = __floats2bfloat162_rn(lo, hi);
  return *reinterpret_cast<uint32_t *>(&p);
}
template <> __device__ inline uint32_t pack<__half>(float lo, float hi) {
  __half2 p = __floats2half2_rn(lo, hi);
  return *reinterpret_cast<uint32_t *>(&p);
}

// The inverse of `pack`.
template <typename T> __device__ inline float2 unpack(uint32_t x);
template <> __device__ inline float2 unpack<__nv_bfloat16>(uint32_t x) {
  return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
}
template <> __device__ inline float2 unpack<__half>(uint32_t x) {
  return __half22float2(*reinterpret_cast<__half2 *>(&x));
}

__device__ inline float warp_sum(float x) {
  for (int d = 16; d > 0; d >>= 1) x += __shfl_xor_sync(~0u, x, d);
  return x;
}

// Activation of a gate: SiLU (0) or GELU's tanh form (1), as x sigmoid(..).
__device__ inline float activate(float x, int kind) {
  const float inner = kind == 0 ? x : 1.5957691216057308f * (x + 0.044715f * x * x * x);
  return x / (1.f + expf(-inner));
}

__device__ inline uint32_t shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

// Asynchronous copy of 16 bytes into shared memory; zeros where not `valid` (the source is then not read).
__device__ inline void copy16(uint32_t to, const void *from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0));
}
__device__ inline void commit() { asm volatile("cp.async.commit_group;"); }
template <int N> __device__ inline void wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N)); }

// Four 8x8 matrices of 16-bit elements, one row address per lane.
__device__ inline void load_matrices(uint32_t (&r)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at));
}
__device__ inline void load_matrices_transposed(uint32_t (&r)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at));
}

// c[16,8] += a[16,16] b[16,8], f32 accumulation.
template <typename T> __device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ inline void mma<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <> __device__ inline void mma<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
