// attention_hopper_pieces: attention_hopper that also reads runs of rows outside the window (`Piece`): routed raw
// blocks.
//
//   Formula, shapes and launch in attention_hopper.cu; `pieces` and `piece_offsets` must be set.
#define WITH_PIECES 1
#include "attention_hopper.cu"
