// Shared by the kernels of exact recall (recall_*.cu): parameters, far positions, codes.
//
//   near, chosen and rest of the far tokens under one softmax: src/ops/recall/mod.rs has the definition.
//   A decode step is four launches: recall_scan (scores of all far tokens, and the new token's codes and exact row),
//   recall_weigh and recall_choose (the k best of each KV head), recall_fetch (their exact attention, the rest's estimate,
//   the merge).
#pragma once
#include "decode.cuh"

// A channel's level number in a token's key code. Mirrors `Field` in src/recall/scalar.rs, by byte.
struct RecallField {
  uint16_t channel;
  uint8_t shift, bits;
};
MIRRORED(RecallField, 4);

constexpr int RECALL_HEADS = 8;   // query heads of a group, at most
constexpr int RECALL_SUB = 16;    // channels of a value code's sub-vector
constexpr int RECALL_EDGES = 128; // offset of the edges in `levels`
constexpr int RECALL_BINS = 2048; // of `histogram`
constexpr int RECALL_LISTED = 4096;
// A KV head's counters, zero between steps, and their places: of recall_fetch, fetchers that are done, blocks of the rest
// that have read their slice and that have come to its end, whether their sum is made, what the last fetcher decided, and
// whether a slice was computed again; from COUNTED on, of recall_choose, tokens listed, blocks, tiles taken and tiles counted.
constexpr int RECALL_COUNTERS = 16;
enum { FETCHED = 0, SLICED = 1, ENDED = 2, SUMMED = 3, DECIDED = 4, AGAIN = 5, COUNTED = 8 };

// G KV heads, group = H / G. `ctx` is a multiple of 64.
struct RecallParams {
  const float *q;             // [H, D], rotated
  const float *near_lse;      // [H]: natural logarithm
  const float *near_out;      // [H, D]
  float *out;                 // [H, D]
  uint8_t *key_codes;         // [G, ctx, bytes]
  uint8_t *value_codes;       // [G, ctx, ceil(D / 16)], or null
  const __half *codebook;     // [G, ceil(D / 16), 256, 16], or null
  void *means;                // [G, blocks, D] of type `means_type`, or null
  const float *mean, *scale;  // [G, D]
  const RecallField *fields;  // [G, D]: by byte, then by shift
  const int *first;           // [G, bytes + 1]: first field of each byte, and their number
  const float *levels;        // [256]: level i of b bits at 2^b + i; edge i of b bits at 128 + 2^b + i
  __half *scores;             // [H, ctx]: relative to near_lse, finite; no entry below the first far position is read
  float2 *slices;             // [H, slices]: largest of a slice's `scores` and the sum of exp relative to it, base 2
  float *weights;             // [G, ctx]
  int *histogram;             // [G, 2, 2048]: weights by their upper 11 bits, those of a crowded bin by the next 11; zero between steps
  uint2 *listed;              // [G, 4096]: weight and position of tokens in the k-th's bin
  int *chosen;                // [G, k]: positions, ascending
  int *counts;                // [G]: how many are chosen
  uint32_t *bitmap;           // [G, ctx / 32]: bit i % 32 of word i / 32: position i is chosen
  float *lowest;              // [G]: log2 of the lowest weight that was chosen
  float *mass;                // [H]: log2(1 + e^far), far the log-sum-exp of all `scores` of the head
  void *store;                // [G, rows, 2, D]: exact keys and values, pinned host memory that the device maps
  const void *own_k, *own_v;  // [own_rows, G, D]: the new token's in row position % own_rows
  float *parts;               // [G, fetchers + rest_slices + 1, 8, ceil4(D) + 4]: o, m, l, of the rest its largest score; the
                              // last is the sum of the rest's
  int *counters;              // [G, RECALL_COUNTERS]
  int *previous;              // [G, k + 1]: `chosen` of the layer's previous step, then how many, or null
  unsigned long long *fetched;  // [2]: rows fetched in all steps of the layer, and those that the step before fetched too
  uint32_t *redone;           // thread blocks that computed their rest again since an estimate exceeded the cap
  const DecodeState *state;   // or null: `position`
  int position;
  int ctx, rows, own_rows, heads, kv_heads, dim, bytes, k;
  int slice_count;            // of recall_scan
  int fetchers, rest_slices;  // thread blocks per KV head; rest_slices 0: no rest
  int block, blocks;          // positions of a mean
  int sinks, window_kind, window_size, window_count;
  int store_type, means_type; // 0: f32, 1: bf16, 2: f16
  float factor;               // of dot products
  const float *read_mean, *read_scale;  // what key codes decode with; `mean` and `scale` write them
  const __half *read_codebook;          // what value codes decode to; `codebook` writes them
};
MIRRORED(RecallParams, 368);
FIELD(RecallParams, q, 0); FIELD(RecallParams, near_lse, 8); FIELD(RecallParams, near_out, 16);
FIELD(RecallParams, out, 24); FIELD(RecallParams, key_codes, 32); FIELD(RecallParams, value_codes, 40);
FIELD(RecallParams, codebook, 48); FIELD(RecallParams, means, 56); FIELD(RecallParams, mean, 64);
FIELD(RecallParams, scale, 72); FIELD(RecallParams, fields, 80); FIELD(RecallParams, first, 88);
FIELD(RecallParams, levels, 96); FIELD(RecallParams, scores, 104); FIELD(RecallParams, slices, 112);
FIELD(RecallParams, weights, 120); FIELD(RecallParams, histogram, 128); FIELD(RecallParams, listed, 136);
FIELD(RecallParams, chosen, 144); FIELD(RecallParams, counts, 152); FIELD(RecallParams, bitmap, 160);
FIELD(RecallParams, lowest, 168); FIELD(RecallParams, mass, 176); FIELD(RecallParams, store, 184);
FIELD(RecallParams, own_k, 192); FIELD(RecallParams, own_v, 200); FIELD(RecallParams, parts, 208);
FIELD(RecallParams, counters, 216); FIELD(RecallParams, previous, 224);
FIELD(RecallParams, fetched, 232); FIELD(RecallParams, redone, 240); FIELD(RecallParams, state, 248);
FIELD(RecallParams, position, 256); FIELD(RecallParams, ctx, 260); FIELD(RecallParams, rows, 264);
FIELD(RecallParams, own_rows, 268); FIELD(RecallParams, heads, 272); FIELD(RecallParams, kv_heads, 276);
FIELD(RecallParams, dim, 280); FIELD(RecallParams, bytes, 284); FIELD(RecallParams, k, 288);
FIELD(RecallParams, slice_count, 292); FIELD(RecallParams, fetchers, 296); FIELD(RecallParams, rest_slices, 300);
FIELD(RecallParams, block, 304); FIELD(RecallParams, blocks, 308); FIELD(RecallParams, sinks, 312);
FIELD(RecallParams, window_kind, 316); FIELD(RecallParams, window_size, 320); FIELD(RecallParams, window_count, 324);
FIELD(RecallParams, store_type, 328); FIELD(RecallParams, means_type, 332); FIELD(RecallParams, factor, 336);
FIELD(RecallParams, read_mean, 344); FIELD(RecallParams, read_scale, 352); FIELD(RecallParams, read_codebook, 360);

// Far positions begin .. end: from the first that is no sink to the window's left edge.
struct Far {
  int position, begin, end;
  bool stopped;
  __device__ explicit Far(const RecallParams &p) {
    position = p.state ? p.state->position : p.position;
    stopped = p.state && p.state->stopped;
    int left = 0;
    if (p.window_kind == 1) left = position + 1 - p.window_size;
    if (p.window_kind == 2) left = (position / p.window_size - p.window_count) * p.window_size;
    end = min(max(left, 0), p.ctx);
    begin = min(p.sinks, end);
  }
  __device__ int count() const { return end - begin; }
};

// What `scores` and `parts` of a head are relative to: as half numbers, scores that matter so have the smallest error.
__device__ inline float near_of(const RecallParams &p, int head) {
  const float near = p.near_lse[head];
  return near > -INFINITY ? near : 0.f;
}

// An element of type 0: f32, 1: bf16, 2: f16.
__device__ inline float element(const void *p, int64_t i, int type) {
  if (type == 0) return ((const float *)p)[i];
  return type == 1 ? __bfloat162float(((const __nv_bfloat16 *)p)[i]) : __half2float(((const __half *)p)[i]);
}

__device__ inline void put_element(void *p, int64_t i, int type, float x) {
  if (type == 0) ((float *)p)[i] = x;
  else if (type == 1) ((__nv_bfloat16 *)p)[i] = __float2bfloat16(x);
  else ((__half *)p)[i] = __float2half(x);
}

// Means over positions first .. until of `at(position, channel)`, given to `put(channel, mean)`; nothing where there is no
// position. `sums`: THREADS floats of shared memory. Every sum has a fixed order.
template <int THREADS, typename At, typename Put>
__device__ inline void block_mean(int dim, int first, int until, float *sums, At at, Put put) {
  for (int from = 0; from < dim && first < until; from += THREADS) {
    const int width = min(dim - from, THREADS), teams = THREADS / width, team = threadIdx.x / width, c = threadIdx.x % width;
    float sum = 0.f;
    if (team < teams)
      for (int i = first + team; i < until; i += teams) sum += at(i, from + c);
    __syncthreads();
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (team == 0) {
      for (int t = 1; t < teams; t++) sum += sums[t * width + c];
      put(from + c, sum / (float)(until - first));
    }
  }
}

// The byte `b` of the key code of `key [D]`: `ScalarCode::encode`, operation by operation.
__device__ inline uint32_t key_byte(const float *key, const float *mean, const float *scale, const RecallField *fields, int from, int to,
                                    const float *levels) {
  uint32_t code = 0;
  for (int i = from; i < to; i++) {
    const RecallField f = fields[i];
    const float x = __fmul_rn(__fsub_rn(key[f.channel], mean[f.channel]), __fdiv_rn(1.f, fmaxf(scale[f.channel], 1.17549435e-38f)));
    const float *edges = levels + RECALL_EDGES + (1 << f.bits);
    int level = 0;
    for (int e = 0; e < (1 << f.bits) - 1; e++) level += edges[e] <= x;
    code |= level << f.shift;
  }
  return code & 0xff;
}

// Squared distance of a sub-vector from a codeword, summed in the order of `ValueCode::encode`.
__device__ inline float word_distance(const float *x, const __half *word) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < RECALL_SUB; i++) {
    const float off = __fsub_rn(__half2float(word[i]), x[i]);
    sum = __fadd_rn(sum, __fmul_rn(off, off));
  }
  return sum;
}
