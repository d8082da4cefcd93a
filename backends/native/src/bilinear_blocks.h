/* Linear layers in blocks (fxc_bilinear_linear), the parts that do not depend on the instruction set. Everything is static; include it
   after the target pragma, with ROWS and COLUMNS, the register tile, defined.

   Rows come in groups of p. A unit is UNIT_GROUPS groups: their sums of blocks are computed once, in 16 bits, and meet all columns; per tile
   (ROWS groups, COLUMNS outputs of a block) all products, then their sums, then the results go out, so that products never leave the cache.

   Packed weights: per block of columns and product (pairs of k, COLUMNS, 2) int16, zero padded; columns in the order of place().
   The includer defines before: place(column), the place of a column inside its block. */

#ifndef FXC_BILINEAR_BLOCKS_H
#define FXC_BILINEAR_BLOCKS_H

#include <stddef.h>
#include <string.h>

#include "kernel_row.h"

namespace {

constexpr int32_t UNIT_GROUPS = 4 * ROWS;
constexpr int32_t TILE_ELEMENTS = ROWS * COLUMNS;

struct block_sizes {
  int32_t inner, outer;  /* channels and outputs of a block */
  int32_t row, pairs;    /* elements of a row of sums, zero padded; pairs of them */
  int32_t groups, columns; /* groups of rows; blocks of columns */
  int32_t terms, tiles;  /* of the two programs, steps included */
};

block_sizes sizes_of(const fxc_bilinear_linear *p) {
  block_sizes s;
  s.inner = (p->depth + p->m - 1) / p->m, s.outer = (p->outputs + p->n - 1) / p->n;
  s.row = (s.inner + 31) / 32 * 32, s.pairs = (s.inner + 1) / 2;
  s.groups = (p->rows + p->p - 1) / p->p, s.columns = (s.outer + COLUMNS - 1) / COLUMNS;
  s.terms = p->m * p->p + p->encode.steps, s.tiles = p->products + p->decode.steps;
  return s;
}

int32_t units(const void *params) { return (sizes_of((const fxc_bilinear_linear *)params).groups + UNIT_GROUPS - 1) / UNIT_GROUPS; }

size_t scratch_bytes(const void *params) {
  const block_sizes s = sizes_of((const fxc_bilinear_linear *)params);
  return (size_t)s.terms * UNIT_GROUPS * s.row * 2 + (size_t)s.tiles * TILE_ELEMENTS * 4;
}

inline ptrdiff_t panel_elements(int32_t pairs) { return (ptrdiff_t)pairs * COLUMNS * 2; }

size_t weight_bytes(const fxc_bilinear_linear *p) {
  const block_sizes s = sizes_of(p);
  return (size_t)s.columns * p->products * panel_elements(s.pairs) * 2;
}

void pack_weights(const fxc_bilinear_linear *p, int16_t *packed) {
  const block_sizes s = sizes_of(p);
  memset(packed, 0, weight_bytes(p));
  for (int32_t block = 0; block < s.columns; ++block)
    for (int32_t r = 0; r < p->products; ++r, packed += panel_elements(s.pairs))
      for (int32_t c = 0; c < COLUMNS && block * COLUMNS + c < s.outer; ++c) {
        const int16_t *from = p->weight + ((ptrdiff_t)r * s.outer + block * COLUMNS + c) * s.inner;
        for (int32_t k = 0; k < s.inner; ++k) packed[(ptrdiff_t)k / 2 * 2 * COLUMNS + 2 * place(c) + k % 2] = from[k];
      }
}

/* Codes minus zero points of `count` channels, zeros up to a whole row. */
inline void load_row(const block_sizes &s, const uint8_t *x, const int32_t *zero_point, int32_t count, int16_t *row) {
  for (int32_t c = 0; c < count; ++c) row[c] = (int16_t)(x[c] - zero_point[c]);
  for (int32_t c = count; c < s.row; ++c) row[c] = 0;
}

/* The blocks of UNIT_GROUPS groups from `first` on: term (k, j), group, channel. */
void load_terms(const fxc_bilinear_linear *p, const block_sizes &s, const uint8_t *x, int32_t first, int16_t *terms) {
  for (int32_t k = 0; k < p->m; ++k)
    for (int32_t j = 0; j < p->p; ++j)
      for (int32_t g = 0; g < UNIT_GROUPS; ++g, terms += s.row) {
        const int32_t row = (first + g) * p->p + j, left = p->depth - k * s.inner, count = left < s.inner ? left : s.inner;
        if (row < p->rows && count > 0)
          load_row(s, x + (ptrdiff_t)row * p->in_pixel_stride + k * s.inner, p->zero_point + k * s.inner, count, terms);
        else
          memset(terms, 0, (size_t)s.row * 2);
      }
}

/* One step of a program; T is unsigned, so that sums wrap. Terms do not overlap. */
template <typename T>
inline void add_terms(const T *__restrict a, int32_t ca, const T *__restrict b, int32_t cb, T *__restrict sum, ptrdiff_t length) {
  if (ca == 1 && cb == 1)
    for (ptrdiff_t e = 0; e < length; ++e) sum[e] = (T)(a[e] + b[e]);
  else if (ca == 1 && cb == -1)
    for (ptrdiff_t e = 0; e < length; ++e) sum[e] = (T)(a[e] - b[e]);
  else
    for (ptrdiff_t e = 0; e < length; ++e) sum[e] = (T)((T)ca * a[e] + (T)cb * b[e]);
}

template <typename T>
void run_sums(const fxc_sums &sums, int32_t inputs, T *terms, ptrdiff_t length) {
  const int32_t *step = sums.step;
  for (int32_t k = 0; k < sums.steps; ++k, step += 4)
    add_terms(terms + step[0] * length, step[1], terms + step[2] * length, step[3], terms + (inputs + k) * length, length);
}

}  // namespace

#endif
