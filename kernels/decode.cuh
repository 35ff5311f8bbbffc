// Shared by the kernels of a decode step. A step is captured once as a graph and replayed for every token, so that
// everything that changes from token to token lies in device memory.
#pragma once
#include "common.cuh"

// Mirrors `State` in src/generate/graph/mod.rs.
struct DecodeState {
  int position;             // of the token being read
  int step;                 // tokens made so far
  uint32_t token;           // the token being read
  uint32_t stopped;         // not 0 once a token ended the text (1) or a logit was not finite (2): later steps change nothing
  unsigned long long best;  // of the logits so far: value (ordered as an integer) and index
};
MIRRORED(DecodeState, 24);
FIELD(DecodeState, position, 0); FIELD(DecodeState, step, 4); FIELD(DecodeState, token, 8);
FIELD(DecodeState, stopped, 12); FIELD(DecodeState, best, 16);

// Larger floats give larger integers.
__device__ inline uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// A kernel may start before the one ahead of it has ended (programmatic dependent launch): what it reads of that one's
// work comes after `await_previous`. Without the launch attribute, and before sm_90, both do nothing.
__device__ inline void await_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ inline void release_next() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Entry i of the rotary tables, of `half` entries each, for a position.
__device__ inline void rotary(int i, const float *frequencies, const float *amplitudes, float *cos, float *sin, int tables, int half,
                              int position) {
  if (i >= tables * half) return;
  float s, c;
  sincosf(__fmul_rn((float)position, frequencies[i]), &s, &c);
  cos[i] = c * amplitudes[i / half];
  sin[i] = s * amplitudes[i / half];
}

__device__ inline uint4 load16(const void *p) { return *reinterpret_cast<const uint4 *>(p); }
// Read once, and written by no kernel that may still run (weights): not worth a place in L1.
__device__ inline uint4 load16_stream(const void *p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
// The same for what an earlier kernel of the step may have written: coherent.
__device__ inline uint4 load16_written(const void *p) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}
