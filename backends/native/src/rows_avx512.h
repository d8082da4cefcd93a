/* 32 consecutive elements of a row in AVX-512: loads, and the requantization of numerics.py in 16-bit lanes in the order of the row

       t = sat16(((v + offset) << l) >> p)    u = (t * m + 2^14) >> 15    y = clamp(sat16(sat16(sum u) + zero) >> k, lo, hi)

   for kernels of rows (elementwise, softmax, normalization): unlike requantize_avx512.h it needs no packed constants. The sum
   of two u saturates to what is defined; with more the order would matter. Static functions only, included after the target pragma. */

#ifndef FXC_ROWS_AVX512_H
#define FXC_ROWS_AVX512_H

#include <immintrin.h>

#include "fxc_kernels.h"

/* 32 int32. */
struct wide32 {
  __m512i a, b;
};

static inline wide32 widen32(__m256i codes) {
  return {_mm512_cvtepu8_epi32(_mm256_castsi256_si128(codes)), _mm512_cvtepu8_epi32(_mm256_extracti128_si256(codes, 1))};
}

static inline wide32 load32(const int32_t *array) { return {_mm512_loadu_si512(array), _mm512_loadu_si512(array + 16)}; }

static inline wide32 same32(int32_t value) { return {_mm512_set1_epi32(value), _mm512_set1_epi32(value)}; }

static inline __mmask32 first32(int32_t count) { return count >= 32 ? ~0u : (1u << count) - 1; }

static inline void store32(int32_t *out, __mmask32 mask, wide32 v) {
  _mm512_mask_storeu_epi32(out, (__mmask16)mask, v.a);
  _mm512_mask_storeu_epi32(out + 16, (__mmask16)(mask >> 16), v.b);
}

/* (v * multiplier + 2^(shift-1)) >> shift, v and multiplier being pairs of int16 whose products are added up; half is 2^(shift-1). */
static inline __m512i scale_row(__m512i v, __m512i multiplier, __m512i half, __m128i shift) {
  return _mm512_sra_epi32(_mm512_add_epi32(_mm512_madd_epi16(v, multiplier), half), shift);
}

/* The constants of one branch and of the end for 32 elements. */
struct branch32 {
  wide32 offset, right;
  __m512i multiplier;
  int32_t left;
};

struct finish32 {
  __m512i zero;
  __m128i guard;
  __m256i lo, hi;
};

/* Of channels c.. (read up to the next multiple of 32), or of channel c for all. */
static inline branch32 branch_at(const fxc_branch *b, int32_t c) {
  return {load32(b->offset + c), load32(b->right_shift + c), _mm512_loadu_si512(b->multiplier + c), b->left_shift};
}

static inline branch32 branch_everywhere(const fxc_branch *b, int32_t c) {
  return {same32(b->offset[c]), same32(b->right_shift[c]), _mm512_set1_epi16(b->multiplier[c]), b->left_shift};
}

static inline finish32 finish_at(const fxc_requantize *q, int32_t c) {
  return {_mm512_loadu_si512(q->zero + c), _mm_cvtsi32_si128(q->guard_bits), _mm256_loadu_si256((const __m256i *)(q->lo + c)),
          _mm256_loadu_si256((const __m256i *)(q->hi + c))};
}

static inline finish32 finish_everywhere(const fxc_requantize *q, int32_t c) {
  return {_mm512_set1_epi16(q->zero[c]), _mm_cvtsi32_si128(q->guard_bits), _mm256_set1_epi8((char)q->lo[c]),
          _mm256_set1_epi8((char)q->hi[c])};
}

/* u, 32 int16. */
static inline __m512i scale32(const branch32 &b, wide32 v) {
  v = {_mm512_add_epi32(v.a, b.offset.a), _mm512_add_epi32(v.b, b.offset.b)};
  if (b.left) {
    const __m128i left = _mm_cvtsi32_si128(b.left);
    v = {_mm512_sll_epi32(v.a, left), _mm512_sll_epi32(v.b, left)};
  }
  const __m512i t = _mm512_packs_epi32(_mm512_srav_epi32(v.a, b.right.a), _mm512_srav_epi32(v.b, b.right.b));
  return _mm512_mulhrs_epi16(_mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), t), b.multiplier);
}

/* Codes from the sum of u. */
static inline __m256i codes32(const finish32 &f, __m512i u) {
  const __m512i y = _mm512_sra_epi16(_mm512_adds_epi16(u, f.zero), f.guard);
  const __m256i codes = _mm512_cvtusepi16_epi8(_mm512_max_epi16(y, _mm512_setzero_si512()));
  return _mm256_min_epu8(_mm256_max_epu8(codes, f.lo), f.hi);
}

#endif
