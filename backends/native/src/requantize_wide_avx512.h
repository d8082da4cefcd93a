/* A second branch of any kind beside requantize_avx512.h: int32 accumulators, or codes whose scaling does not fit 16 bits.

   It is shifted in 32-bit lanes in the order of the channels, narrowed, and then brought into slot order. Static functions only; include it
   after the target pragma. */

#ifndef FXC_REQUANTIZE_WIDE_AVX512_H
#define FXC_REQUANTIZE_WIDE_AVX512_H

#include "requantize_avx512.h"

/* Elements of branch 1 for the quad_pixels(W) pixels at row, row + stride, ...: x[0..3] hold 16 channels each, in their order. WIDE: int32,
   else codes; row and stride count elements. Reads 16 W elements of a pixel. */
template <int W>
static inline void load_values(__m512i (&x)[4], const void *tensor, ptrdiff_t row, ptrdiff_t stride, bool wide) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const ptrdiff_t at = row + (W == 1 ? i * stride : W == 2 ? i / 2 * stride + i % 2 * 16 : W == 3 && i == 3 ? 32 : 16 * i);
    x[i] = wide ? _mm512_loadu_si512((const int32_t *)tensor + at)
                : _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)((const uint8_t *)tensor + at)));
  }
}

/* Slots 32 h..32 h + 31 of a = packs(x0, x1), b = packs(x2, x3), where x0..x3 are 16 channels each in their order (load_values): quad
   words, of which a holds (x0, lane 0), (x1, lane 0), (x0, lane 1), ... */
template <int W, int H>
static inline __m512i value_order(__m512i a, __m512i b) {
  if constexpr (W == 1) return H == 0 ? a : b;
  if constexpr (W == 2) return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), H == 0 ? a : b);
  if constexpr (W == 3 && H == 0) return _mm512_permutex2var_epi64(a, _mm512_setr_epi64(0, 2, 6, 1, 5, 7, 10, 12), b);
  if constexpr (W == 3) return _mm512_permutex2var_epi64(a, _mm512_setr_epi64(4, 4, 3, 3, 8, 8, 14, 14), b);
  if constexpr (H == 0) return _mm512_permutex2var_epi64(a, _mm512_setr_epi64(0, 2, 1, 3, 8, 10, 9, 11), b);
  return _mm512_permutex2var_epi64(a, _mm512_setr_epi64(4, 6, 5, 7, 12, 14, 13, 15), b);
}

/* Branch 1 in 32 bits: x as load_values gives it, u0 and u1 in slot order. */
template <int W>
static inline void scale_values(const requantize_slots *s, __m512i (&x)[4], __m512i *u0, __m512i *u1) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm512_add_epi32(x[i], _mm512_load_si512(s->wide_offset + 16 * i));
    if (s->wide_left) x[i] = _mm512_sll_epi32(x[i], _mm_cvtsi32_si128(s->wide_left));
    x[i] = _mm512_srav_epi32(x[i], _mm512_load_si512(s->wide_shift + 16 * i));
  }
  const __m512i a = _mm512_packs_epi32(x[0], x[1]), b = _mm512_packs_epi32(x[2], x[3]);
  *u0 = _mm512_mulhrs_epi16(value_order<W, 0>(a, b), _mm512_load_si512(s->code_multiplier));
  *u1 = _mm512_mulhrs_epi16(value_order<W, 1>(a, b), _mm512_load_si512(s->code_multiplier + 32));
}

/* requantize_one with a second branch of any elements x. */
template <int W, bool BOUNDED>
static inline __m512i requantize_wide(const requantize_slots *s, __m512i guard, __m512i v0, __m512i v1, __m512i v2, __m512i v3,
                                      __m512i (&x)[4]) {
  __m512i u0, u1;
  scale_values<W>(s, x, &u0, &u1);
  return finish_slots<BOUNDED>(s, guard, _mm512_adds_epi16(u0, scale_accumulators(s, 0, v0, v1)),
                               _mm512_adds_epi16(u1, scale_accumulators(s, 1, v2, v3)));
}

#endif
