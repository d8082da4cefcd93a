/* The float boundary: the only code of the library that touches floating point. numerics.quantize and numerics.dequantize. */

#ifndef FXC_BOUNDARY_H
#define FXC_BOUNDARY_H

#include "kernel_row.h"

#ifdef __cplusplus
extern "C" {
#endif

/* clamp(round_half_even(x * inverse_scale) + zero_point, lo, hi) of float32 in[0]; uint8, or int8 when lo < 0.
   in[1] is an int32 counter: NaNs found are added to it. Unit: as for every elementwise kernel. */
typedef struct {
  fxc_loops loops;
  const float *inverse_scale; /* (channels) float32(1 / scale) */
  const int32_t *zero_point;  /* (channels) */
  int32_t lo, hi;
} fxc_quantize;

/* float32(scale * (q - zero_point)), the product in double. */
typedef struct {
  fxc_loops loops;
  const double *scale;       /* (channels) */
  const int32_t *zero_point; /* (channels) */
  int32_t wide, reserved;    /* 0: uint8 codes, 1: int32 */
} fxc_dequantize;

extern const fxc_kernel fxc_quantize__float, fxc_dequantize__float;

#ifdef __cplusplus
}
#endif
#endif
