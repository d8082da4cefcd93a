/* Requantization of accumulators in channel order, whatever the parameters: 32-bit lanes, any number of branches, int32 output
   (numerics.py, `requantize`). What the 16-bit paths of requantize_avx512.h, which includes this file, leave out.

   Static functions only. Requires AVX512F, BW, VL, DQ. */

#ifndef FXC_REQUANTIZE_ROW_AVX512_H
#define FXC_REQUANTIZE_ROW_AVX512_H

#include <immintrin.h>

#include "fxc_kernels.h"

/* gcc 12 warns of the undefined vectors inside its own intrinsics (gcc bug 105593). */
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

static inline __m512i saturate16_epi32(__m512i v) {
  return _mm512_min_epi32(_mm512_max_epi32(v, _mm512_set1_epi32(-32768)), _mm512_set1_epi32(32767));
}

/* u of one branch for the masked ones of 16 channels from c on, in 32-bit lanes; v is the accumulator, or the element plus its
   offset. */
static inline __m512i scale_wide(const fxc_branch *b, int32_t c, __mmask16 mask, __m512i v) {
  const __m512i m = _mm512_cvtepi16_epi32(_mm256_maskz_loadu_epi16(mask, b->multiplier + c));
  v = _mm512_sll_epi32(v, _mm_cvtsi32_si128(b->left_shift));
  v = saturate16_epi32(_mm512_srav_epi32(v, _mm512_maskz_loadu_epi32(mask, b->right_shift + c)));
  return _mm512_srai_epi32(_mm512_add_epi32(_mm512_mullo_epi32(v, m), _mm512_set1_epi32(1 << 14)), 15);
}

static inline __m512i load_branch(const fxc_branch *b, const void *tensor, ptrdiff_t at, int32_t c, __mmask16 mask) {
  const __m512i x = b->wide ? _mm512_maskz_loadu_epi32(mask, (const int32_t *)tensor + at)
                            : _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, (const uint8_t *)tensor + at));
  return _mm512_add_epi32(x, _mm512_maskz_loadu_epi32(mask, b->offset + c));
}

/* Codes of the masked ones of 16 channels from c on of one pixel. */
static inline __m128i requantize_wide(const fxc_requantize *q, const void *const *in, const int32_t *stride, int32_t pixel, int32_t c,
                                      __mmask16 mask, __m512i acc) {
  __m512i y = scale_wide(&q->branch[0], c, mask, acc);
  for (int32_t i = 1; i < q->branches; ++i) {
    const fxc_branch *b = &q->branch[i];
    y = _mm512_add_epi32(y, scale_wide(b, c, mask, load_branch(b, in[i], (ptrdiff_t)pixel * stride[i] + c, c, mask)));
  }
  const __m512i zero = _mm512_cvtepi16_epi32(_mm256_maskz_loadu_epi16(mask, q->zero + c));
  y = saturate16_epi32(_mm512_add_epi32(saturate16_epi32(y), zero));
  y = _mm512_sra_epi32(y, _mm_cvtsi32_si128(q->guard_bits));
  y = _mm512_max_epi32(y, _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, q->lo + c)));
  y = _mm512_min_epi32(y, _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, q->hi + c)));
  return _mm512_cvtepi32_epi8(y);
}

/* Finishes channels first..first + count - 1 of one output pixel from accumulators in channel order (acc[0] is channel `first`;
   read up to the next multiple of 16). q NULL: int32 output. in[i], stride[i] for i >= 1: the branches; `out` and out_stride: the
   whole output. Applies the table. Reads nothing past the channels but in acc. */
static inline void requantize_row(const fxc_requantize *q, const int32_t *acc, int32_t first, int32_t count, const void *const *in,
                                  const int32_t *stride, int32_t pixel, void *out, int32_t out_stride) {
  for (int32_t c = 0; c < count; c += 16) {
    const __mmask16 mask = (__mmask16)(count - c < 16 ? (1u << (count - c)) - 1 : 0xffff);
    const __m512i v = _mm512_loadu_si512(acc + c);
    const ptrdiff_t at = (ptrdiff_t)pixel * out_stride + first + c;
    if (!q) {
      _mm512_mask_storeu_epi32((int32_t *)out + at, mask, v);
      continue;
    }
    uint8_t *codes = (uint8_t *)out + at;
    _mm_mask_storeu_epi8(codes, mask, requantize_wide(q, in, stride, pixel, first + c, mask, v));
    for (int32_t i = 0; q->table && i < count - c && i < 16; ++i) codes[i] = q->table[codes[i]];
  }
}

#endif
