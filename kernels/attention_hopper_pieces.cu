// attention_hopper_pieces: attention_hopper that also reads runs of rows outside the window (`Piece`): routed raw blocks.
//
//   as attention_hopper.cu says; shapes and launch are the same, `pieces` and `piece_offsets` must be set.
#define WITH_PIECES 1
#include "attention_hopper.cu"
