/* Windows of conv_amx.cpp (im2col): the taps of each pixel side by side in scratch; for few channels by kernel rows, several in 64 bytes
   (pieces). Everything is static; include it after the target pragma. */

#ifndef FXC_CONV_AMX_WINDOWS_H
#define FXC_CONV_AMX_WINDOWS_H

#include "conv_amx_input.h"

namespace {

/* The taps of one kernel row for `count` pixels of an output row, the first from input column v on. row NULL: outside. */
void gather_taps(const job &j, uint8_t *target, const uint8_t *row, int32_t v, int32_t count) {
  const fxc_conv *p = j.p;
  const int32_t width = p->kernel[2], channels = p->in_channels;
  const bool joined = row && (width == 1 || (p->dilation[2] == 1 && p->in_pixel_stride == channels));
  for (int32_t i = 0; i < count; ++i, v += p->stride[2], target += j.g.window_bytes) {
    if (joined && v >= 0 && v + width <= p->in_size[2]) {
      copy_vectors(target, row + (ptrdiff_t)v * p->in_pixel_stride, width * channels);
      continue;
    }
    for (int32_t tap = 0; tap < width; ++tap) {
      const int32_t at = v + tap * p->dilation[2];
      const bool inside = row && at >= 0 && at < p->in_size[2];
      copy_vectors(target + tap * channels, inside ? row + (ptrdiff_t)at * p->in_pixel_stride : p->pad_value, channels);
    }
  }
}

/* The input row under kernel row i (depth, height) for the output row of (n, d, h), NULL outside the image. */
const uint8_t *input_row(const job &j, const int32_t at[4], int32_t i) {
  const fxc_conv *p = j.p;
  const int32_t d = at[1] * p->stride[0] - p->pad_before[0] + i / p->kernel[1] * p->dilation[0];
  const int32_t h = at[2] * p->stride[1] - p->pad_before[1] + i % p->kernel[1] * p->dilation[1];
  if (d < 0 || d >= p->in_size[0] || h < 0 || h >= p->in_size[1]) return NULL;
  return j.x + (ptrdiff_t)at[0] * p->in_image_stride + (ptrdiff_t)d * p->in_plane_stride + (ptrdiff_t)h * p->in_row_stride;
}

/* The windows of `count` output pixels of one row from (n, d, h, v) on. */
void gather_row(const job &j, uint8_t *target, const int32_t at[4], int32_t count) {
  const fxc_conv *p = j.p;
  for (int32_t i = 0; i < kernel_rows(p); ++i, target += p->kernel[2] * p->in_channels)
    gather_taps(j, target, input_row(j, at, i), at[3] * p->stride[2] - p->pad_before[2], count);
}

/* ----------------------------------------------------------------------------------------------------------- pieces */

/* One step of `count` pixels: `rows` pieces side by side, each under its own mask, so that a vector is stored once and the tile load
   that follows finds it in one store. at[r]: the first pixel's piece r, less r pieces (its place in the vector). */
template <int ROWS>
void gather_step(const job &j, uint8_t *target, const intptr_t *at, const ptrdiff_t *pitch, int32_t count) {
  const int32_t bytes = piece_bytes(j.p);
  __mmask64 mask[ROWS];
  intptr_t from[ROWS];
  for (int r = 0; r < ROWS; ++r) mask[r] = (~0ULL >> (64 - bytes)) << r * bytes, from[r] = at[r];
  for (int32_t i = 0; i < count; ++i, target += j.g.window_bytes) {
    __m512i v = _mm512_setzero_si512();
#pragma GCC unroll 7
    for (int r = 0; r < ROWS; ++r) v = _mm512_mask_loadu_epi8(v, mask[r], (const void *)from[r]), from[r] += pitch[r];
    _mm512_store_si512(target, v);
  }
}

typedef void (*gather_function)(const job &, uint8_t *, const intptr_t *, const ptrdiff_t *, int32_t);

const gather_function GATHER_STEP[MAX_ROWS_PER_STEP + 1] = {NULL,           gather_step<1>, gather_step<2>, gather_step<3>,
                                                            gather_step<4>, gather_step<5>, gather_step<6>, gather_step<7>};

/* The kernel rows row[i] (from input column 0 on; NULL: pad values) of `count` pixels, the first at input column v. */
void gather_inside(const job &j, uint8_t *target, const uint8_t *const *row, int32_t v, int32_t count) {
  const int32_t per_step = rows_per_step(j.p), rows = kernel_rows(j.p);
  for (int32_t first = 0; first < rows; first += per_step, target += STEP) {
    intptr_t at[MAX_ROWS_PER_STEP];
    ptrdiff_t pitch[MAX_ROWS_PER_STEP];
    const int32_t n = smaller(per_step, rows - first);
    for (int32_t r = 0; r < n; ++r) {
      const uint8_t *piece = row[first + r];
      at[r] = (piece ? (intptr_t)piece + (ptrdiff_t)v * j.p->in_pixel_stride : (intptr_t)j.w.pad) - r * piece_bytes(j.p);
      pitch[r] = piece ? (ptrdiff_t)j.p->stride[2] * j.p->in_pixel_stride : 0;
    }
    GATHER_STEP[n](j, target, at, pitch, count);
  }
}

/* The same for one pixel whose window crosses the left or right border. */
void gather_border(const job &j, uint8_t *target, const uint8_t *const *row, int32_t v) {
  const fxc_conv *p = j.p;
  const int32_t bytes = piece_bytes(p), per_step = rows_per_step(p), rows = kernel_rows(p);
  const int32_t from = smaller(larger(0, -v), p->kernel[2]), to = larger(from, smaller(p->kernel[2], p->in_size[2] - v)); /* taps inside */
  const __mmask64 all = ~0ULL >> (64 - bytes);
  const __mmask64 inside = to > from ? (~0ULL >> (64 - (to - from) * p->in_channels)) << from * p->in_channels : 0;
  for (int32_t first = 0; first < rows; first += per_step, target += STEP) {
    __m512i x = _mm512_setzero_si512();
    for (int32_t r = 0, at = 0; r < smaller(per_step, rows - first); ++r, at += bytes) {
      x = _mm512_mask_loadu_epi8(x, all << at, (const void *)((intptr_t)j.w.pad - at));
      if (row[first + r])
        x = _mm512_mask_loadu_epi8(x, inside << at, (const void *)((intptr_t)row[first + r] + (ptrdiff_t)v * p->in_pixel_stride - at));
    }
    _mm512_store_si512(target, x);
  }
}

void gather_pieces(const job &j, uint8_t *target, const int32_t start[4], int32_t count) {
  const fxc_conv *p = j.p;
  const uint8_t *row[MAX_PIECES];
  for (int32_t i = 0; i < kernel_rows(p); ++i) row[i] = input_row(j, start, i);
  for (int32_t i = 0, n; i < count; i += n, target += n * j.g.window_bytes) {
    const int32_t v = (start[3] + i) * p->stride[2] - p->pad_before[2], room = p->in_size[2] - p->kernel[2] - v;
    n = v < 0 || room < 0 ? 1 : smaller(count - i, room / p->stride[2] + 1);
    if (v < 0 || room < 0)
      gather_border(j, target, row, v);
    else
      gather_inside(j, target, row, v, n);
  }
}

/* The windows of pixels first..end-1 of the batch. */
void gather_windows(const job &j, uint8_t *target, int32_t first, int32_t end) {
  const fxc_conv *p = j.p;
  if (j.linear) {
    for (; first < end; ++first, target += j.g.window_bytes)
      copy_vectors(target, j.x + (ptrdiff_t)first * p->in_pixel_stride, p->in_channels);
    return;
  }
  while (first < end) {
    int32_t at[4], rest = first;
    for (int i = 3; i > 0; --i) at[i] = rest % p->out_size[i - 1], rest /= p->out_size[i - 1];
    at[0] = rest;
    const int32_t left = p->out_size[2] - at[3], count = left < end - first ? left : end - first;
    if (j.g.from == PIECES)
      gather_pieces(j, target, at, count);
    else
      gather_row(j, target, at, count);
    first += count, target += count * j.g.window_bytes;
  }
}

}  // namespace

#endif
