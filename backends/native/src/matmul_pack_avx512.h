/* The right operand of a product of two activations, packed on the fly for kernels that multiply groups of four: `panels` of up to
   64 columns, each in scratch while the rows pass (for AVX-512 kernels; requires VNNI for the column sums).

   Packed panel: vectors of 16 columns, each (depth / 4 rounded up, 16 columns, 4) int8, zero where there is no depth: what a kernel reads
   past the rows of a is multiplied by 0. Codes are stored as b' = b - 128, because vpdpbusd wants signed numbers:

       sum (a - za) (b - zb) = sum a b' + (128 - zb) sum a - za (sum b' + depth (128 - zb))

   The last term depends on the column only; it comes with the panel, together with the requantization's offset.

   Static functions only, included after the target pragma. Columns and rows of b are read up to the next multiple of 4 bytes. */

#ifndef FXC_MATMUL_PACK_AVX512_H
#define FXC_MATMUL_PACK_AVX512_H

#include <immintrin.h>
#include <stddef.h>
#include <string.h>

#include "fxc_kernels.h"

constexpr static int32_t PANEL_VECTORS = 4;

static inline int32_t quads_of(const fxc_matmul *p) { return (p->depth + 3) / 4; }

static inline int32_t column_vectors(const fxc_matmul *p) { return (p->columns + 15) / 16; }

static inline int32_t panels_of(const fxc_matmul *p) { return (column_vectors(p) + PANEL_VECTORS - 1) / PANEL_VECTORS; }

/* Columns first..first + count - 1 in `vectors` vectors; panels are as even as they can be, so that none is narrow. */
struct panel {
  int32_t first, count, vectors;
};

static inline panel panel_at(const fxc_matmul *p, int32_t index) {
  const int32_t begin = column_vectors(p) * index / panels_of(p), end = column_vectors(p) * (index + 1) / panels_of(p);
  const int32_t last = 16 * end < p->columns ? 16 * end : p->columns;
  return {16 * begin, last - 16 * begin, end - begin};
}

/* Where matrix `index` of the batch starts, given the three strides of a tensor. */
static inline ptrdiff_t matrix_offset(const fxc_matmul *p, int32_t index, const int32_t stride[3]) {
  ptrdiff_t offset = 0;
  for (int dim = 2; dim >= 0; --dim) {
    offset += (ptrdiff_t)(index % p->size[dim]) * stride[dim];
    index /= p->size[dim];
  }
  return offset;
}

static inline int32_t matrices_of(const fxc_matmul *p) { return p->size[0] * p->size[1] * p->size[2]; }

/* Codes of `count` columns from b on, depth 4 * quad .. 4 * quad + 3 of `rest` that exist, four bytes per column. */
static inline __m512i load_quad(const fxc_matmul *p, const uint8_t *b, int32_t rest, int32_t count, __m512i index) {
  const __mmask16 mask = (__mmask16)((1u << count) - 1);
  if (p->b_depth_stride == 1) return _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), mask, index, b, 1);
  __m128i row[4]; /* 16 columns of one depth */
  for (int k = 0; k < 4; ++k)
    row[k] = k < rest ? _mm_maskz_loadu_epi8(mask, b + (ptrdiff_t)k * p->b_depth_stride) : _mm_setzero_si128();
  __m512i x = _mm512_inserti32x4(_mm512_castsi128_si512(row[0]), row[1], 1);
  x = _mm512_inserti32x4(_mm512_inserti32x4(x, row[2], 2), row[3], 3);
  x = _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), x);
  return _mm512_shuffle_epi8(x, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)));
}

/* Packs `count` columns from b on; returns the sums of b'. */
static inline __m512i pack_columns(const fxc_matmul *p, const uint8_t *b, int32_t count, int8_t *packed) {
  const __m512i index = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                           _mm512_set1_epi32(p->b_column_stride));
  __m512i sums = _mm512_setzero_si512();
  for (int32_t k = 0; k < p->depth; k += 4, b += 4 * (ptrdiff_t)p->b_depth_stride, packed += 64) {
    const int32_t rest = p->depth - k;
    const __m512i kept = _mm512_set1_epi32(rest < 4 ? (1 << (8 * rest)) - 1 : -1);
    const __m512i flip = _mm512_and_si512(_mm512_set1_epi8(-128), kept);
    const __m512i x = _mm512_xor_si512(_mm512_and_si512(load_quad(p, b, rest, count, index), kept), flip);
    _mm512_store_si512(packed, x);
    sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), x);
  }
  return sums;
}

/* Packs a panel of matrix b, and the terms of its columns (64): what does not depend on the row. */
static inline void pack_panel(const fxc_matmul *p, const uint8_t *b, panel n, int8_t *packed, int32_t *terms) {
  const __m512i rest = _mm512_set1_epi32((int32_t)((uint32_t)p->depth * (uint32_t)(128 - p->b_zero_point)));
  for (int32_t j = 0; j < n.vectors; ++j) {
    const int32_t first = n.first + 16 * j, count = n.count - 16 * j < 16 ? n.count - 16 * j : 16;
    __m512i term = pack_columns(p, b + (ptrdiff_t)first * p->b_column_stride, count, packed + (ptrdiff_t)64 * quads_of(p) * j);
    term = _mm512_mullo_epi32(_mm512_add_epi32(term, rest), _mm512_set1_epi32(-p->a_zero_point));
    if (p->requantize) term = _mm512_add_epi32(term, _mm512_loadu_si512(p->requantize->branch[0].offset + first));
    _mm512_store_si512(terms + 16 * j, term);
  }
}

/* (128 - zb) sum of a row (its elements side by side): what does not depend on the column. */
static inline int32_t row_term(const fxc_matmul *p, const uint8_t *a) {
  __m512i sums = _mm512_setzero_si512();
  for (int32_t k = 0; k < p->depth; k += 64) {
    const __mmask64 mask = p->depth - k < 64 ? (1ULL << (p->depth - k)) - 1 : ~0ULL;
    sums = _mm512_add_epi64(sums, _mm512_sad_epu8(_mm512_maskz_loadu_epi8(mask, a + k), _mm512_setzero_si512()));
  }
  return (int32_t)((uint32_t)_mm512_reduce_add_epi64(sums) * (uint32_t)(128 - p->b_zero_point));
}

#endif
