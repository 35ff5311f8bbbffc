// What the attention kernels of a chunk share: their parameters and the raw window's edge.
//
// out[t, h] = sum_j softmax_j(scale q[t, h] . k_j + bias_j) v_j over the keys that position p = start + t may read: raw
// positions left(p)..p (from `past` before `start`, from the chunk from there on) and the extra rows (sinks, summaries)
// listed for p's tile that p sees. Query head h reads KV head h / (H / G).
#pragma once
#include "common.cuh"

// Positions per list of extra rows (absolute: tile i begins at position i * TILE).
constexpr int EXTRA_TILE = 128;

// A key outside the raw window: a sink or a summary. Mirrors `Extra` in src/ops/attention/cuda.rs.
struct Extra {
  const void *k;  // its [G, D] row
  const void *v;
  float bias;     // added to the logit
  int from;       // first position that sees it
  int until;      // first position that no longer does
  int far_query;  // scored with q_far
};
MIRRORED(Extra, 32);
FIELD(Extra, k, 0); FIELD(Extra, v, 8); FIELD(Extra, bias, 16); FIELD(Extra, from, 20); FIELD(Extra, until, 24);
FIELD(Extra, far_query, 28);

// Rows of a piece at most.
constexpr int PIECE = 16;

// Up to PIECE consecutive rows outside the raw window: a part of a raw block. Mirrors `Piece` in
// src/ops/attention/cuda.rs.
struct Piece {
  const void *k;  // [rows, G, D]
  const void *v;
  float bias;     // as in Extra
  int from;
  int until;
  int rows;
};
MIRRORED(Piece, 32);
FIELD(Piece, k, 0); FIELD(Piece, v, 8); FIELD(Piece, bias, 16); FIELD(Piece, from, 20); FIELD(Piece, until, 24);
FIELD(Piece, rows, 28);

// Strides in elements. Mirrors `Params` in src/ops/attention/cuda.rs.
struct AttentionParams {
  const void *q;       // [T, H, D]
  const void *q_far;   // [T, H, D] or null
  const void *k;       // [T, G, D]
  const void *v;       // [T, G, D]
  const void *past_k;  // [capacity, G, D]: position x in row x % capacity
  const void *past_v;
  void *out;           // [T, H, D], contiguous
  const Extra *extras;
  const int *extra_offsets;  // per tile, first near row; tiles + 1 entries (then the same for far rows, at far_offsets)
  const int *far_offsets;    // per tile, first far-query row
  const Piece *pieces;       // attention_hopper alone: others find runs of rows among the extras
  const int *piece_offsets;  // per tile, first piece; tiles + 1 entries
  float *lse;                // [T, H]: ln of the sum of exp(logit), or null
  int64_t q_row, q_head, k_row, k_head, v_row, v_head, past_row, past_head;
  int tokens, start, heads, kv_heads, dim, capacity;
  int window_kind;  // 0 unbounded, 1 tokens, 2 blocks
  int window_size;  // tokens, or positions per block
  int window_count; // blocks
  float scale;
};
MIRRORED(AttentionParams, 208);
FIELD(AttentionParams, q, 0); FIELD(AttentionParams, q_far, 8); FIELD(AttentionParams, k, 16);
FIELD(AttentionParams, v, 24); FIELD(AttentionParams, past_k, 32); FIELD(AttentionParams, past_v, 40);
FIELD(AttentionParams, out, 48); FIELD(AttentionParams, extras, 56); FIELD(AttentionParams, extra_offsets, 64);
FIELD(AttentionParams, far_offsets, 72); FIELD(AttentionParams, pieces, 80);
FIELD(AttentionParams, piece_offsets, 88); FIELD(AttentionParams, lse, 96); FIELD(AttentionParams, q_row, 104);
FIELD(AttentionParams, q_head, 112); FIELD(AttentionParams, k_row, 120); FIELD(AttentionParams, k_head, 128);
FIELD(AttentionParams, v_row, 136); FIELD(AttentionParams, v_head, 144); FIELD(AttentionParams, past_row, 152);
FIELD(AttentionParams, past_head, 160); FIELD(AttentionParams, tokens, 168); FIELD(AttentionParams, start, 172);
FIELD(AttentionParams, heads, 176); FIELD(AttentionParams, kv_heads, 180); FIELD(AttentionParams, dim, 184);
FIELD(AttentionParams, capacity, 188); FIELD(AttentionParams, window_kind, 192);
FIELD(AttentionParams, window_size, 196); FIELD(AttentionParams, window_count, 200);
FIELD(AttentionParams, scale, 204);

// Stores the log-sum-exp of query t of the chunk and a head: `top` is the largest logit, `sum` that of exp(logit -
// top).
__device__ inline void note_lse(const AttentionParams &p, int t, int head, float top, float sum) {
  if (p.lse) p.lse[(int64_t)t * p.heads + head] = sum > 0.f ? top + logf(sum) : -INFINITY;
}

// First raw position that p reads.
__device__ inline int left_edge(const AttentionParams &p, int position) {
  if (p.window_kind == 0) return 0;
  if (p.window_kind == 1) return max(0, position + 1 - p.window_size);
  return max(0, (position / p.window_size - p.window_count) * p.window_size);
}
