// Warpgroup matrix products (wgmma) and asynchronous barriers of sm_90a.
//
// PTX ISA, "Asynchronous warpgroup level matrix instructions". Four consecutive warps multiply a 64-row A (shared
// memory, or registers in mma.m16n8k16's layout) by a B in shared memory; accumulators lie as in mma.m16n8k16, 16 rows
// to a warp.
#pragma once
#include "common.cuh"

// Shared memory is laid out in rows of 64 elements (128 bytes) whose 16-byte chunks are permuted by the row's number
// modulo 8 (the 128-byte swizzle). A tile wider than 64 is split into panels of 64 columns, one after the other.
__device__ inline uint32_t panel_place(int rows, int r, int j) {
  return (j >> 3) * rows * 128 + r * 128 + (((j & 7) ^ (r & 7)) << 4);
}

// Descriptor of a matrix in that layout: address, distance between panels (transposed operands), between groups of 8
// rows.
__device__ inline uint64_t matrix_descriptor(uint32_t address, uint32_t panel_bytes) {
  return (uint64_t)((address & 0x3ffff) >> 4) | (uint64_t)(panel_bytes >> 4) << 16 | (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ inline void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
// Makes this thread's writes to shared memory visible to wgmma.
__device__ inline void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Named barrier of `threads` threads; 0 is __syncthreads.
__device__ inline void named_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
__device__ inline void named_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

__device__ inline void barrier_init(uint32_t b, int count) { asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(b), "r"(count)); }
__device__ inline void barrier_arrive(uint32_t b) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(b) : "memory");
}
__device__ inline bool barrier_test(uint32_t b, uint32_t phase) {
  uint32_t done;
  asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(done) : "r"(b), "r"(phase) : "memory");
  return done;
}
__device__ inline void barrier_wait(uint32_t b, uint32_t phase) {
  while (!barrier_test(b, phase)) {
  }
}

#define LIST_8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define LIST_32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15" ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define LIST_48 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15" ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31" ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define LIST_64 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15" ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31" ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47" ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define LIST_128 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15" ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31" ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47" ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63" ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79" ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95" ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111" ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

#define ACC8(C, O) \
  "+f"(C[O]), "+f"(C[O + 1]), "+f"(C[O + 2]), "+f"(C[O + 3]), "+f"(C[O + 4]), "+f"(C[O + 5]), "+f"(C[O + 6]), "+f"(C[O + 7])
#define ACC_8(C) ACC8(C, 0)
#define ACC_32(C) ACC8(C, 0), ACC8(C, 8), ACC8(C, 16), ACC8(C, 24)
#define ACC_48(C) ACC_32(C), ACC8(C, 32), ACC8(C, 40)
#define ACC_64(C) ACC_48(C), ACC8(C, 48), ACC8(C, 56)
#define ACC_128(C) \
  ACC_64(C), ACC8(C, 64), ACC8(C, 72), ACC8(C, 80), ACC8(C, 88), ACC8(C, 96), ACC8(C, 104), ACC8(C, 112), ACC8(C, 120)

// c[64, N] (+)= a[64, 16] b[N, 16]^T, both in shared memory with the 16 contiguous; with `accumulate` 0, c is
// overwritten. c[64, N] += a[64, 16] b[16, N], a in registers, b in shared memory with the N contiguous. Operands of
// the assembly: N / 2 accumulators, then A, B and the flag.
template <typename T, int N> struct Wgmma;
#define WGMMA(TYPE, NAME, N, REGS, A0, A1, A2, A3, A4)                                                                     \
  template <> struct Wgmma<TYPE, N> {                                                                                      \
    __device__ static inline void shared(float (&c)[REGS], uint64_t a, uint64_t b, int accumulate) {                       \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #A2 ", 0;\n"                                                      \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" LIST_##REGS "}, %" #A0 ", %" #A1     \
                   ", p, 1, 1, 0, 0;\n}"                                                                                   \
                   : ACC_##REGS(c) : "l"(a), "l"(b), "r"(accumulate));                                                     \
    }                                                                                                                      \
    __device__ static inline void registers(float (&c)[REGS], const uint32_t (&a)[4], uint64_t b) {                        \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" LIST_##REGS "}, {%" #A0 ", %" #A1   \
                   ", %" #A2 ", %" #A3 "}, %" #A4 ", 1, 1, 1, 1;\n"                                                        \
                   : ACC_##REGS(c) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                  \
    }                                                                                                                      \
  };
#define WGMMA_BOTH(N, REGS, A0, A1, A2, A3, A4)                      \
  WGMMA(__nv_bfloat16, "bf16", N, REGS, A0, A1, A2, A3, A4)          \
  WGMMA(__half, "f16", N, REGS, A0, A1, A2, A3, A4)
WGMMA_BOTH(16, 8, 8, 9, 10, 11, 12)
WGMMA_BOTH(64, 32, 32, 33, 34, 35, 36)
WGMMA_BOTH(96, 48, 48, 49, 50, 51, 52)
WGMMA_BOTH(128, 64, 64, 65, 66, 67, 68)
WGMMA_BOTH(256, 128, 128, 129, 130, 131, 132)
