/* Products of two activations with AVX-512 VNNI (fxc_matmul): attention.

   acc = (a - a_zero_point) (b - b_zero_point), four depths per vpdpbusd lane, then the requantization of numerics.py
   (requantize_avx512.h) or int32. matmul_pack_avx512.h packs b, panel by panel, into scratch and gives the terms of the zero points.

   Register tile: 6 rows x 16 W columns, W = 1..4 vectors of the panel. Unit: one tile (matrix-major, then panels, then rows), so that a
   panel is packed once per matrix and thread.

   Preconditions: one branch; the columns of b or its rows lie side by side in memory. Over-reads: a and b up to the next multiple of 4
   bytes, per-channel arrays up to the next multiple of 16. */

#if defined(__x86_64__)

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")

#include "dot_avx512vnni.h"
#include "kernel_row.h"
#include "matmul_pack_avx512.h"
#include "requantize_avx512.h"

namespace {

constexpr int32_t ROWS = 6;

int32_t row_tiles(const fxc_matmul *p) { return (p->rows + ROWS - 1) / ROWS; }

/* Rows of a whose elements do not lie side by side are copied. */
int64_t row_bytes(const fxc_matmul *p) { return p->a_depth_stride == 1 ? 0 : (int64_t)64 * ((p->depth + 63) / 64); }

/* In scratch: this, requantize_slots of every panel, the packed panel, copied rows, the terms of all rows. */
struct room {
  int32_t terms[64], accumulators[64];
};

int32_t terms_of_rows(const fxc_matmul *p) { return row_tiles(p) * ROWS; }

struct step {
  const fxc_matmul *p;
  requantize_path path;
  int32_t left_shift;
  bool bounded;
  const uint8_t *lookup_table; /* looked up before storing; NULL: none, or applied afterwards */
  __m512i guard;
  room *place;
  requantize_slots *slots; /* (panels) */
  int8_t *packed;
  uint8_t *copied; /* (ROWS, row_bytes) */
  int32_t *row_terms; /* (terms_of_rows) */
};

size_t scratch_bytes(const void *params) {
  const fxc_matmul *p = (const fxc_matmul *)params;
  return sizeof(room) + (size_t)panels_of(p) * sizeof(requantize_slots) + (size_t)64 * PANEL_VECTORS * quads_of(p) +
         (size_t)(ROWS * row_bytes(p)) + (size_t)terms_of_rows(p) * 4;
}

/* Slots for vectors of consecutive columns: channel 16 v + 4 lane + i at accumulator (v, lane, i). */
void fill_slots(const step &s, panel n, requantize_slots *slots) {
  memset(slots, 0, sizeof *slots);
  for (int32_t c = 0; c < n.count; ++c)
    pack_slot(slots, s.p->requantize, s.left_shift, n.first + c, c / 16, c % 16 / 4, c % 4);
}

step step_of(const fxc_matmul *p, void *scratch) {
  step s;
  const fxc_requantize *q = p->requantize;
  s.p = p, s.path = requantize_kind(q), s.left_shift = reduced_left_shift(q), s.bounded = has_bounds(q), s.guard = guard_factor(q);
  s.lookup_table = q && has_table_lookup() ? q->table : nullptr;
  s.place = (room *)scratch, s.slots = (requantize_slots *)(s.place + 1);
  s.packed = (int8_t *)(s.slots + panels_of(p));
  s.copied = (uint8_t *)s.packed + (int64_t)64 * PANEL_VECTORS * quads_of(p);
  s.row_terms = (int32_t *)(s.copied + ROWS * row_bytes(p));
  for (int32_t i = 0; q && i < panels_of(p); ++i) fill_slots(s, panel_at(p, i), &s.slots[i]);
  return s;
}

/* ------------------------------------------------------------------------------------------------------------- tile */

/* Codes of one row of the panel, in order of the columns. */
inline __m512i row_codes(const step &s, const requantize_slots *slots, __m512i v0, __m512i v1, __m512i v2, __m512i v3) {
  if (__builtin_expect(s.left_shift != 0, 0)) {
    const __m128i left = _mm_cvtsi32_si128(s.left_shift);
    v0 = _mm512_sll_epi32(v0, left), v1 = _mm512_sll_epi32(v1, left);
    v2 = _mm512_sll_epi32(v2, left), v3 = _mm512_sll_epi32(v3, left);
  }
  __m512i y = s.bounded ? requantize_one<true>(slots, s.guard, v0, v1, v2, v3) : requantize_one<false>(slots, s.guard, v0, v1, v2, v3);
  if (s.lookup_table) y = lookup(s.lookup_table, y);
  return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), y);
}

/* Rows a[0..ROWS-1] (the last ones may be the same) times the panel; `count` of them are stored, from element `at` of out on. */
template <int W>
void tile(const step &s, panel n, const requantize_slots *slots, const uint8_t *const (&a)[ROWS], const int32_t *row_terms, int32_t count,
          void *out, ptrdiff_t at) {
  const ptrdiff_t bytes = (ptrdiff_t)4 * quads_of(s.p), vector = 16 * bytes;
  __m512i acc[ROWS][W];
  const uint8_t *x[ROWS];
#pragma GCC unroll 6
  for (int i = 0; i < ROWS; ++i) {
    const __m512i term = _mm512_set1_epi32(row_terms[i]);
    x[i] = a[i] + bytes;
#pragma GCC unroll 4
    for (int j = 0; j < W; ++j) acc[i][j] = _mm512_add_epi32(term, _mm512_load_si512(s.place->terms + 16 * j));
  }
  const int8_t *weight = s.packed;
  for (ptrdiff_t k = -bytes; k != 0; k += 4, weight += 64) {
    __m512i w[W];
#pragma GCC unroll 4
    for (int j = 0; j < W; ++j) w[j] = _mm512_load_si512(weight + vector * j);
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; ++i) {
      const __m512i v = broadcast4(x[i] + k);
#pragma GCC unroll 4
      for (int j = 0; j < W; ++j) dot(acc[i][j], v, w[j]);
    }
  }
  const __m512i none = _mm512_setzero_si512();
  const __mmask64 mask = channel_mask(n.count);
#pragma GCC unroll 6
  for (int i = 0; i < ROWS; ++i) {
    if (i >= count) return;
    if (s.path == REQUANTIZE_ONE) {
      uint8_t *codes = (uint8_t *)out + at;
      const __m512i v1 = W > 1 ? acc[i][1 % W] : none, v2 = W > 2 ? acc[i][2 % W] : none, v3 = W > 3 ? acc[i][3 % W] : none;
      _mm512_mask_storeu_epi8(codes, mask, row_codes(s, slots, acc[i][0], v1, v2, v3));
      if (s.p->requantize->table && !s.lookup_table) apply_table(s.p->requantize->table, codes, 1, 0, n.count);
    } else if (!s.p->requantize) {
#pragma GCC unroll 4
      for (int j = 0; j < W; ++j) _mm512_mask_storeu_epi32((int32_t *)out + at + 16 * j, (__mmask16)(mask >> (16 * j)), acc[i][j]);
    } else {
#pragma GCC unroll 4
      for (int j = 0; j < W; ++j) _mm512_store_si512(s.place->accumulators + 16 * j, acc[i][j]);
      requantize_row(s.p->requantize, s.place->accumulators, n.first, n.count, nullptr, nullptr, 0, (uint8_t *)out + at - n.first, 0);
    }
    at += s.p->out_row_stride;
  }
}

/* -------------------------------------------------------------------------------------------------------------- run */

/* Row `row` of matrix a, copied to place i of the tile if need be. */
const uint8_t *row_at(const step &s, const uint8_t *a, int32_t row, int i) {
  const fxc_matmul *p = s.p;
  const uint8_t *x = a + (ptrdiff_t)row * p->a_row_stride;
  if (p->a_depth_stride == 1) return x;
  uint8_t *copy = s.copied + i * row_bytes(p);
  for (int32_t k = 0; k < p->depth; ++k) copy[k] = x[(ptrdiff_t)k * p->a_depth_stride];
  return copy;
}

/* The terms of all rows of matrix a. */
void fill_row_terms(const step &s, const uint8_t *a) {
  for (int32_t row = 0; row < s.p->rows; ++row) s.row_terms[row] = s.p->b_zero_point == 128 ? 0 : row_term(s.p, row_at(s, a, row, 0));
}

void run_tile(const step &s, const uint8_t *a, int32_t first, int32_t index, panel n, void *out, ptrdiff_t at) {
  const int32_t count = s.p->rows - first < ROWS ? s.p->rows - first : ROWS;
  const uint8_t *rows[ROWS];
  for (int32_t i = 0; i < ROWS; ++i) rows[i] = i < count ? row_at(s, a, first + i, i) : rows[count - 1];
  at += (ptrdiff_t)first * s.p->out_row_stride + n.first;
  const int32_t *terms = s.row_terms + first;
  if (n.vectors == 4) tile<4>(s, n, &s.slots[index], rows, terms, count, out, at);
  if (n.vectors == 3) tile<3>(s, n, &s.slots[index], rows, terms, count, out, at);
  if (n.vectors == 2) tile<2>(s, n, &s.slots[index], rows, terms, count, out, at);
  if (n.vectors == 1) tile<1>(s, n, &s.slots[index], rows, terms, count, out, at);
}

void run(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *scratch) {
  const fxc_matmul *p = (const fxc_matmul *)params;
  const step s = step_of(p, scratch);
  const int32_t tiles = row_tiles(p), panels = panels_of(p);
  const uint8_t *a = nullptr, *b = nullptr;
  ptrdiff_t at = 0;
  int32_t row = begin % tiles, index = begin / tiles % panels, matrix = begin / tiles / panels; /* of the unit */
  for (int32_t unit = begin; unit < end; ++unit) {
    if (unit == begin || (row == 0 && index == 0)) {
      a = (const uint8_t *)in[0] + matrix_offset(p, matrix, p->a_stride);
      b = (const uint8_t *)in[1] + matrix_offset(p, matrix, p->b_stride);
      at = matrix_offset(p, matrix, p->out_stride);
      fill_row_terms(s, a);
    }
    const panel n = panel_at(p, index);
    if (unit == begin || row == 0) pack_panel(p, b, n, s.packed, s.place->terms);
    run_tile(s, a, row * ROWS, index, n, out, at);
    if (++row == tiles) row = 0, ++index;
    if (index == panels) index = 0, ++matrix;
  }
}

int accepts(const void *params) {
  const fxc_matmul *p = (const fxc_matmul *)params;
  return (!p->requantize || p->requantize->branches == 1) && (p->b_depth_stride == 1 || p->b_column_stride == 1);
}

int32_t units(const void *params) {
  const fxc_matmul *p = (const fxc_matmul *)params;
  return matrices_of(p) * panels_of(p) * row_tiles(p);
}

}  // namespace

#pragma GCC pop_options

extern "C" {
extern const fxc_kernel fxc_u8_matmul_6x64__avx512vnni = {"fxc_u8_matmul_6x64__avx512vnni", "matmul", "avx512vnni", accepts, nullptr,
                                                          nullptr, units, scratch_bytes, run};
}

#endif
