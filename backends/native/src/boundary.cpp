// The float boundary; see boundary.h. Rounding is the processor's round-half-even (the default mode, as in torch).

#include "boundary.h"

#include <math.h>
#include <stddef.h>

namespace boundary {  // a name that tells these functions from the integer kernels in the symbol table
namespace {

const int last = FXC_MAX_DIMS - 1;

int32_t rows(const fxc_loops &loops) {
  int32_t count = 1;
  for (int dim = 0; dim < last; ++dim) count *= loops.size[dim];
  return count;
}

struct Row {
  ptrdiff_t in = 0, out = 0;
  int32_t channel = 0;  // of the row's first element
};

Row row_at(const fxc_loops &loops, int32_t unit) {
  Row row;
  for (int dim = last - 1; dim >= 0; --dim) {
    const int32_t index = unit % loops.size[dim];
    unit /= loops.size[dim];
    row.in += (ptrdiff_t)index * loops.in_stride[0][dim];
    row.out += (ptrdiff_t)index * loops.out_stride[dim];
    if (dim == loops.channel_dim) row.channel = index;
  }
  return row;
}

// Bounding before rounding equals rounding before bounding, because the bounds are integers; it also keeps infinities and
// large values inside int32. A NaN compares false and becomes the lower bound here; the caller reports it.
int32_t code_of(float x, float inverse_scale, int32_t zero_point, int32_t lo, int32_t hi) {
  const float scaled = x * inverse_scale, smallest = (float)(lo - zero_point), largest = (float)(hi - zero_point);
  const float bounded = scaled > smallest ? (scaled < largest ? scaled : largest) : smallest;
  return (int32_t)lrintf(bounded) + zero_point;
}

void run_quantize(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *) {
  const fxc_quantize &p = *(const fxc_quantize *)params;
  const int32_t step = p.loops.channel_dim == last;
  int32_t nans = 0;
  for (int32_t unit = begin; unit < end; ++unit) {
    const Row row = row_at(p.loops, unit);
    const float *x = (const float *)in[0] + row.in;
    uint8_t *y = (uint8_t *)out + row.out;
    for (int32_t i = 0, c = row.channel; i < p.loops.size[last]; ++i, c += step) {
      const float value = x[(ptrdiff_t)i * p.loops.in_stride[0][last]];
      nans += value != value;
      y[(ptrdiff_t)i * p.loops.out_stride[last]] = (uint8_t)code_of(value, p.inverse_scale[c], p.zero_point[c], p.lo, p.hi);
    }
  }
  if (nans) __atomic_fetch_add((int32_t *)(uintptr_t)in[1], nans, __ATOMIC_RELAXED);
}

void run_dequantize(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *) {
  const fxc_dequantize &p = *(const fxc_dequantize *)params;
  const int32_t step = p.loops.channel_dim == last;
  for (int32_t unit = begin; unit < end; ++unit) {
    const Row row = row_at(p.loops, unit);
    float *y = (float *)out + row.out;
    for (int32_t i = 0, c = row.channel; i < p.loops.size[last]; ++i, c += step) {
      const ptrdiff_t at = row.in + (ptrdiff_t)i * p.loops.in_stride[0][last];
      const double q = p.wide ? ((const int32_t *)in[0])[at] : ((const uint8_t *)in[0])[at];
      y[(ptrdiff_t)i * p.loops.out_stride[last]] = (float)((q - p.zero_point[c]) * p.scale[c]);
    }
  }
}

int32_t quantize_units(const void *params) { return rows(((const fxc_quantize *)params)->loops); }
int32_t dequantize_units(const void *params) { return rows(((const fxc_dequantize *)params)->loops); }

}  // namespace
}  // namespace boundary

extern "C" {
const fxc_kernel fxc_quantize__float = {
    "fxc_f32_quantize__float", "quantize", "float", nullptr, nullptr, nullptr, boundary::quantize_units, nullptr, boundary::run_quantize};
const fxc_kernel fxc_dequantize__float = {
    "fxc_f32_dequantize__float", "dequantize", "float", nullptr, nullptr, nullptr, boundary::dequantize_units, nullptr, boundary::run_dequantize};
}
