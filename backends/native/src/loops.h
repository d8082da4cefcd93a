/* Walking the rows of a loop nest in SIMD kernels (fxc_loops): where each tensor's row starts. Static: several files include it. */

#ifndef FXC_LOOPS_H
#define FXC_LOOPS_H

#include <stddef.h>

#include "fxc_kernels.h"

enum { FXC_INNERMOST = FXC_MAX_DIMS - 1 };

typedef struct {
  ptrdiff_t out, in[FXC_MAX_BRANCHES];
  int32_t channel; /* of the row's first element */
} fxc_row;

static inline fxc_row fxc_row_at(const fxc_loops *loops, int32_t unit) {
  fxc_row row;
  row.out = 0, row.channel = 0;
  for (int32_t i = 0; i < loops->inputs; ++i) row.in[i] = 0;
  for (int dim = FXC_INNERMOST - 1; dim >= 0; --dim) {
    const int32_t index = unit % loops->size[dim];
    unit /= loops->size[dim];
    row.out += (ptrdiff_t)index * loops->out_stride[dim];
    for (int32_t i = 0; i < loops->inputs; ++i) row.in[i] += (ptrdiff_t)index * loops->in_stride[i][dim];
    if (dim == loops->channel_dim) row.channel = index;
  }
  return row;
}

/* From the row before `unit` to that of `unit`. */
static inline void fxc_next_row(const fxc_loops *loops, fxc_row *row, int32_t unit) {
  const int dim = FXC_INNERMOST - 1;
  if (unit % loops->size[dim] == 0) {
    *row = fxc_row_at(loops, unit);
    return;
  }
  row->out += loops->out_stride[dim];
  for (int32_t i = 0; i < loops->inputs; ++i) row->in[i] += loops->in_stride[i][dim];
  row->channel += dim == loops->channel_dim;
}

static inline int32_t fxc_row_count(const fxc_loops *loops) {
  int32_t count = 1;
  for (int dim = 0; dim < FXC_INNERMOST; ++dim) count *= loops->size[dim];
  return count;
}

/* The output and every input are contiguous or broadcast along the innermost dimension: what SIMD rows accept. */
static inline int fxc_rows_contiguous(const fxc_loops *loops) {
  int contiguous = loops->out_stride[FXC_INNERMOST] == 1 || loops->size[FXC_INNERMOST] == 1;
  for (int32_t i = 0; i < loops->inputs; ++i) {
    const int32_t stride = loops->in_stride[i][FXC_INNERMOST];
    contiguous = contiguous && (stride == 1 || stride == 0 || loops->size[FXC_INNERMOST] == 1);
  }
  return contiguous;
}

#endif
