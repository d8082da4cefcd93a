/* Where the results of a vector kernel go, and the requantization of single elements (numerics.py, `requantize`) for what the vector
   paths leave out: three branches and more. Everything is static: several files include this header. */

#ifndef FXC_REQUANTIZE_SCALAR_H
#define FXC_REQUANTIZE_SCALAR_H

#include <stddef.h>
#include <stdint.h>

#include "fxc_kernels.h"

namespace {

/* Where the codes of a group go, and the step's requantization. */
struct destination {
  const fxc_requantize *q; /* NULL: int32 output */
  const void *const *in;
  const int32_t *stride; /* of the branches' pixels */
  void *out;
  int32_t out_stride;
};

inline int32_t saturate_16(int32_t v) { return v < -32768 ? -32768 : v > 32767 ? 32767 : v; }

/* u of one branch for channel c; v: accumulator, or element plus offset. Arithmetic shifts, as on every compiler in use. */
inline int32_t scale_element(const fxc_branch &b, uint32_t v, int32_t c) {
  const int32_t t = saturate_16((int32_t)(v << b.left_shift) >> b.right_shift[c]);
  return (t * b.multiplier[c] + (1 << 14)) >> 15;
}

/* Channels first..first + count - 1 of one pixel from their accumulators, with any number of branches. */
void requantize_scalar(const destination &d, const int32_t *acc, int32_t first, int32_t count, int32_t pixel) {
  uint8_t *out = (uint8_t *)d.out + (ptrdiff_t)pixel * d.out_stride + first;
  const fxc_requantize *q = d.q;
  for (int32_t c = first; c < first + count; ++c) {
    int32_t total = scale_element(q->branch[0], (uint32_t)acc[c - first], c);
    for (int32_t i = 1; i < q->branches; ++i) {
      const fxc_branch &b = q->branch[i];
      const ptrdiff_t at = (ptrdiff_t)pixel * d.stride[i] + c;
      const uint32_t x = b.wide ? (uint32_t)((const int32_t *)d.in[i])[at] : ((const uint8_t *)d.in[i])[at];
      total += scale_element(b, x + (uint32_t)b.offset[c], c);
    }
    const int32_t y = saturate_16(saturate_16(total) + q->zero[c]) >> q->guard_bits;
    const int32_t code = y < q->lo[c] ? q->lo[c] : y > q->hi[c] ? q->hi[c] : y;
    out[c - first] = q->table ? q->table[code] : (uint8_t)code;
  }
}

}  // namespace

#endif
