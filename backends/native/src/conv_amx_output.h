/* What becomes of the accumulators of conv_amx.cpp: requantization a quad at a time. Everything is static; include it after the target
   pragma. */

#ifndef FXC_CONV_AMX_OUTPUT_H
#define FXC_CONV_AMX_OUTPUT_H

#include "conv_amx_input.h"
#include "requantize_wide_avx512.h"

namespace {

/* Accumulators (rows, W, 16) that wait for their requantization, a quad at a time. */
struct pending {
  const int32_t *accumulator;
  const row_table *rows;
  panel w;
  int32_t count; /* of rows */
};

/* Constants of a panel in registers. */
template <int W>
struct constants {
  __m512i bias[W], shift[4], multiplier[2], zero[2], lo, hi, guard;
  __m128i left_shift;
  __mmask64 mask;
};

template <int W>
inline __attribute__((always_inline)) constants<W> constants_of(const job &j, const panel &w) {
  constants<W> c;
  const requantize_slots *s = w.slots;
  for (int i = 0; i < W; ++i) c.bias[i] = _mm512_load_si512(w.bias + 16 * i);
  for (int i = 0; i < 4; ++i) c.shift[i] = _mm512_load_si512(s->shift + 16 * i);
  for (int i = 0; i < 2; ++i) c.multiplier[i] = _mm512_load_si512(s->multiplier + 32 * i), c.zero[i] = _mm512_load_si512(s->zero + 32 * i);
  c.lo = _mm512_load_si512(s->lo), c.hi = _mm512_load_si512(s->hi);
  c.guard = _mm512_set1_epi16((int16_t)j.p->requantize->guard_bits);
  c.left_shift = _mm_cvtsi32_si128(j.left_shift);
  c.mask = channel_mask(w.count);
  return c;
}

/* Codes of the quad's rows from `base` on, in slot order. */
template <int W>
inline __attribute__((always_inline)) __m512i load_codes(const uint8_t *base, const ptrdiff_t *row) {
  if constexpr (W >= 3) return load_slots<W>(base + row[0], 0);
  if constexpr (W == 2) return load_slots<W>(base + row[0], row[1] - row[0]);
  __m512i x = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)(base + row[0])));
  x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *)(base + row[1])), 1);
  x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *)(base + row[2])), 2);
  x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *)(base + row[3])), 3);
  return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), x);
}

template <int W>
inline __attribute__((always_inline)) void save_codes(uint8_t *base, const ptrdiff_t *row, __mmask64 mask, __m512i y) {
  if constexpr (W >= 3) {
    store_slots<W>(base + row[0], 0, mask, y);
  } else if constexpr (W == 2) {
    store_slots<W>(base + row[0], row[1] - row[0], mask, y);
  } else {
    y = _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), y);
    _mm_mask_storeu_epi8(base + row[0], (__mmask16)mask, _mm512_castsi512_si128(y));
    _mm_mask_storeu_epi8(base + row[1], (__mmask16)mask, _mm512_extracti32x4_epi32(y, 1));
    _mm_mask_storeu_epi8(base + row[2], (__mmask16)mask, _mm512_extracti32x4_epi32(y, 2));
    _mm_mask_storeu_epi8(base + row[3], (__mmask16)mask, _mm512_extracti32x4_epi32(y, 3));
  }
}

/* t of vector v of the quad, in 32-bit lanes. */
template <int W>
inline __attribute__((always_inline)) __m512i shift_vector(const constants<W> &c, const int32_t *acc, int v, bool shifts_left) {
  __m512i a = _mm512_add_epi32(_mm512_load_si512(acc + 16 * v), c.bias[v % W]);
  if (shifts_left) a = _mm512_sll_epi32(a, c.left_shift);
  return _mm512_srav_epi32(a, c.shift[v]);
}

inline __attribute__((always_inline)) __m512i look_up(const uint8_t *table, __m512i codes) {
  const __m512i low = _mm512_permutex2var_epi8(_mm512_loadu_si512(table), codes, _mm512_loadu_si512(table + 64));
  const __m512i high = _mm512_permutex2var_epi8(_mm512_loadu_si512(table + 128), codes, _mm512_loadu_si512(table + 192));
  return _mm512_mask_mov_epi8(low, _mm512_movepi8_mask(codes), high);
}

/* Elements of branch 1 of the quad's rows, as load_values of requantize_avx512.h gives them. */
template <int W>
inline __attribute__((always_inline)) void load_rows(__m512i (&x)[4], const uint8_t *base, const ptrdiff_t *row, bool wide) {
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) {
    const int vector = W == 3 && v == 3 ? 2 : v;
    const uint8_t *at = base + row[vector / W];
    x[v] = wide ? _mm512_loadu_si512(at + vector % W * 64) : _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(at + vector % W * 16)));
  }
}

/* Requantizes and stores quad i. branch: branch 1 at the panel's first channel, or NULL; out: likewise. */
template <int W, requantize_path PATH>
inline __attribute__((always_inline)) void store_codes(const job &j, const pending &d, const constants<W> &c, int32_t i,
                                                       const uint8_t *branch, uint8_t *out, bool shifts_left) {
  const int32_t *acc = d.accumulator + 16 * W * quad_pixels(W) * i;
  const ptrdiff_t *branch_row = d.rows->branch + quad_pixels(W) * i;
  const __m512i t0 = shift_vector<W>(c, acc, 0, shifts_left), t1 = shift_vector<W>(c, acc, 1, shifts_left);
  const __m512i t2 = shift_vector<W>(c, acc, 2, shifts_left), t3 = W == 3 ? t2 : shift_vector<W>(c, acc, 3, shifts_left);
  __m512i u0 = _mm512_mulhrs_epi16(_mm512_packs_epi32(t0, t1), c.multiplier[0]);
  __m512i u1 = _mm512_mulhrs_epi16(_mm512_packs_epi32(t2, t3), c.multiplier[1]);
  if constexpr (PATH == REQUANTIZE_WIDE) {
    __m512i x[4], x0, x1;
    load_rows<W>(x, branch, branch_row, j.branch_bytes == 4);
    scale_values<W>(d.w.slots, x, &x0, &x1);
    u0 = _mm512_adds_epi16(x0, u0), u1 = _mm512_adds_epi16(x1, u1);
  }
  if constexpr (PATH == REQUANTIZE_TWO) {
    const __m512i x = load_codes<W>(branch, branch_row), none = _mm512_setzero_si512();
    u0 = _mm512_adds_epi16(scale_codes(d.w.slots, 0, _mm512_unpacklo_epi8(x, none)), u0);
    u1 = _mm512_adds_epi16(scale_codes(d.w.slots, 1, _mm512_unpackhi_epi8(x, none)), u1);
  }
  u0 = _mm512_srav_epi16(_mm512_adds_epi16(u0, c.zero[0]), c.guard);
  u1 = _mm512_srav_epi16(_mm512_adds_epi16(u1, c.zero[1]), c.guard);
  __m512i y = _mm512_min_epu8(_mm512_max_epu8(_mm512_packus_epi16(u0, u1), c.lo), c.hi);
  if (j.p->requantize->table) y = look_up(j.p->requantize->table, y);
  save_codes<W>(out, d.rows->out + quad_pixels(W) * i, c.mask, y);
}

/* int32 output of quad i: the columns of a panel stand in the order of the channels. */
template <int W>
inline __attribute__((always_inline)) void store_accumulators(const job &j, const pending &d, int32_t i) {
  for (int32_t r = quad_pixels(W) * i; r < quad_pixels(W) * (i + 1); ++r) {
    if (d.rows->pixel[r] == DROPPED) continue;
    int32_t *out = (int32_t *)j.out + (ptrdiff_t)d.rows->pixel[r] * j.p->out_pixel_stride + d.w.first;
    for (int v = 0; v < W; ++v) {
      const __m512i a = _mm512_add_epi32(_mm512_load_si512(d.accumulator + 16 * (W * r + v)), _mm512_load_si512(d.w.bias + 16 * v));
      _mm512_mask_storeu_epi32(out + 16 * v, (__mmask16)(channel_mask(d.w.count) >> 16 * v), a);
    }
  }
}

/* Everything else: adds the bias, restores the channel order. */
__attribute__((noinline)) void store_any(const job &j, const pending &d, int32_t i) {
  const int32_t W = d.w.W, rows = quad_pixels(W);
  for (int32_t r = rows * i; r < rows * i + rows; ++r) {
    alignas(64) int32_t acc[64];
    if (d.rows->pixel[r] == DROPPED) continue;
    for (int32_t v = 0; v < W; ++v)
      spill_accumulators(acc, W, v, _mm512_add_epi32(_mm512_load_si512(d.accumulator + 16 * (W * r + v)),
                                                     _mm512_load_si512(d.w.bias + 16 * v)));
    requantize_row(j.p->requantize, acc, d.w.first, d.w.count, j.in, j.p->branch_pixel_stride, d.rows->pixel[r], j.out,
                   j.p->out_pixel_stride);
  }
}

}  // namespace

#endif
