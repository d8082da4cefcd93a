/* The strips of depthwise_avx512vnni.cpp: S neighboring outputs of 64 channels share the quads of their input columns. Everything is static;
   include it after the target pragma. */

#ifndef FXC_DEPTHWISE_STRIP_AVX512VNNI_H
#define FXC_DEPTHWISE_STRIP_AVX512VNNI_H

#include "kernel_row.h"
#include "requantize_avx512.h"

namespace {

constexpr int32_t BLOCK = 64;

/* Input columns of a strip, and the row length of its pointer table. */
constexpr int32_t strip_columns(int32_t S, int32_t K, int32_t stride) { return (S - 1) * stride + K; }
constexpr int32_t round8(int32_t columns) { return (columns + 7) / 8 * 8; }

/* `strips` successive strips of one block. Input: column c of row r at pointer[r * round8(columns) + c] + offset (one strip), or,
   inside the image, at row[r] + offset + c * pixel. Output: codes at out + i * out_stride, or accumulators (one strip). */
struct strip {
  requantize_path path;
  int32_t left_shift, bounded, quads, width, strips;
  bool square; /* as many kernel rows as columns */
  const uint8_t *const *pointer;
  const uint8_t *const *row; /* NULL: take pointer */
  ptrdiff_t offset, pixel;
  const int32_t *bias;
  const requantize_slots *slots;
  const int8_t *weight;
  __mmask64 mask;
  __m512i guard;
  const uint8_t *lookup_table; /* looked up before storing; NULL: none, or applied afterwards */
  uint8_t *out;
  const uint8_t *branch;
  ptrdiff_t out_stride, branch_stride;
  int32_t *accumulators;
};

/* acc += x * w. Inline assembly because gcc 12 spills the accumulators of the intrinsic. */
inline __attribute__((always_inline)) void dot(__m512i &acc, __m512i x, const int8_t *w) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(x), "m"(*(const __m512i *)w));
}

/* 64 / FOLD bytes from each of FOLD places `distance` bytes apart. */
template <int FOLD>
inline __attribute__((always_inline)) __m512i load_folds(const uint8_t *x, ptrdiff_t distance) {
  if constexpr (FOLD == 1) return _mm512_loadu_si512(x);
  if constexpr (FOLD == 2)
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)x)),
                              _mm256_loadu_si256((const __m256i *)(x + distance)), 1);
  __m512i v = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)x));
  v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *)(x + distance)), 1);
  v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *)(x + 2 * distance)), 2);
  return _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *)(x + 3 * distance)), 3);
}

template <int FOLD>
inline __attribute__((always_inline)) void store_folds(uint8_t *out, ptrdiff_t distance, __mmask64 mask, __m512i y) {
  if constexpr (FOLD == 1) {
    _mm512_mask_storeu_epi8(out, mask, y);
  } else if constexpr (FOLD == 2) {
    _mm256_mask_storeu_epi8(out, (__mmask32)mask, _mm512_castsi512_si256(y));
    _mm256_mask_storeu_epi8(out + distance, (__mmask32)mask, _mm512_extracti64x4_epi64(y, 1));
  } else {
    _mm_mask_storeu_epi8(out, (__mmask16)mask, _mm512_castsi512_si128(y));
    _mm_mask_storeu_epi8(out + distance, (__mmask16)mask, _mm512_extracti32x4_epi32(y, 1));
    _mm_mask_storeu_epi8(out + 2 * distance, (__mmask16)mask, _mm512_extracti32x4_epi32(y, 2));
    _mm_mask_storeu_epi8(out + 3 * distance, (__mmask16)mask, _mm512_extracti32x4_epi32(y, 3));
  }
}

/* Bytes of four rows as quads. */
inline __attribute__((always_inline)) void interleave(__m512i (&v)[4], __m512i x0, __m512i x1, __m512i x2, __m512i x3) {
  const __m512i low01 = _mm512_unpacklo_epi8(x0, x1), low23 = _mm512_unpacklo_epi8(x2, x3);
  const __m512i high01 = _mm512_unpackhi_epi8(x0, x1), high23 = _mm512_unpackhi_epi8(x2, x3);
  v[0] = _mm512_unpacklo_epi16(low01, low23), v[1] = _mm512_unpackhi_epi16(low01, low23);
  v[2] = _mm512_unpacklo_epi16(high01, high23), v[3] = _mm512_unpackhi_epi16(high01, high23);
}

/* acc += the quads v of input column C at the S outputs that it reaches. */
template <int S, int K, int STRIDE, int C>
inline __attribute__((always_inline)) void accumulate_column(__m512i (&acc)[S][4], const __m512i (&v)[4], const int8_t *weight) {
#pragma GCC unroll 4
  for (int s = 0; s < S; ++s)
    if (C >= s * STRIDE && C < s * STRIDE + K)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) dot(acc[s][i], v[i], weight + (C - s * STRIDE) * 256 + i * 64);
}

/* acc += kernel rows of width K at S outputs, from input column C on (recursion: gcc does not reliably unroll a loop). In the
   border (FOLD = 0), row points to four rows of the pointer table; inside, to four row addresses, and columns are `pixel` apart.
   ROWS of the four have weights that are not zero: the others take any bytes. */
template <int S, int K, int STRIDE, int FOLD, int ROWS, int C = 0>
inline __attribute__((always_inline)) void accumulate(__m512i (&acc)[S][4], const uint8_t *const *row, ptrdiff_t offset,
                                                      ptrdiff_t pixel, const int8_t *weight) {
  constexpr int width = strip_columns(S, K, STRIDE), step = FOLD ? 1 : round8(width), folds = FOLD ? FOLD : 1;
  if constexpr (C < width) {
    const uint8_t *const *at = FOLD ? row : row + C;
    const ptrdiff_t distance = S * STRIDE * pixel;
    const __m512i x0 = load_folds<folds>(at[0] + offset, distance);
    const __m512i x1 = ROWS > 1 ? load_folds<folds>(at[step] + offset, distance) : x0;
    const __m512i x2 = ROWS > 2 ? load_folds<folds>(at[2 * step] + offset, distance) : x0;
    const __m512i x3 = ROWS > 3 ? load_folds<folds>(at[3 * step] + offset, distance) : x1;
    __m512i v[4];
    interleave(v, x0, x1, x2, x3);
    accumulate_column<S, K, STRIDE, C>(acc, v, weight);
    accumulate<S, K, STRIDE, FOLD, ROWS, C + 1>(acc, row, FOLD ? offset + pixel : offset, pixel, weight);
  }
}

/* acc += all kernel rows. Square kernels of height K need no loads for the rows that their last quad lacks. */
template <int S, int K, int STRIDE, int FOLD>
inline __attribute__((always_inline)) void accumulate_quads(__m512i (&acc)[S][4], const strip &t, const uint8_t *const *row,
                                                            ptrdiff_t offset) {
  constexpr int step = 4 * (FOLD ? 1 : round8(strip_columns(S, K, STRIDE)));
  const int8_t *weight = t.weight;
  const int32_t whole = t.square ? K / 4 : t.quads;
  for (int32_t q = 0; q < whole; ++q, row += step, weight += 256 * K)
    accumulate<S, K, STRIDE, FOLD, 4>(acc, row, offset, t.pixel, weight);
  if (t.square) accumulate<S, K, STRIDE, FOLD, K % 4>(acc, row, offset, t.pixel, weight);
}

/* The same for one output and any width. */
inline __attribute__((always_inline)) void accumulate_any(__m512i (&acc)[1][4], const strip &t, ptrdiff_t offset) {
  const int32_t columns = round8(t.width);
  const uint8_t *const *row = t.pointer;
  const int8_t *weight = t.weight;
  for (int32_t q = 0; q < t.quads; ++q, row += 4 * columns)
    for (int32_t c = 0; c < t.width; ++c, weight += 256) {
      __m512i v[4];
      interleave(v, load_folds<1>(row[c] + offset, 0), load_folds<1>(row[columns + c] + offset, 0),
                 load_folds<1>(row[2 * columns + c] + offset, 0), load_folds<1>(row[3 * columns + c] + offset, 0));
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) dot(acc[0][i], v[i], weight + i * 64);
    }
}

template <int S, int FOLD, bool TWO, bool BOUNDED>
inline __attribute__((always_inline)) void store_codes(__m512i (&acc)[S][4], const strip &t, int32_t index) {
  if (__builtin_expect(t.left_shift != 0, 0)) {
    const __m128i left = _mm_cvtsi32_si128(t.left_shift);
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) acc[s][i] = _mm512_sll_epi32(acc[s][i], left);
  }
  const __m512i guard = t.guard;
  const uint8_t *branch = t.branch + (ptrdiff_t)index * FOLD * S * t.branch_stride;
  __m512i y[S]; /* all before the first store, which might alias the constants */
#pragma GCC unroll 4
  for (int s = 0; s < S; ++s, branch += t.branch_stride)
    y[s] = TWO ? requantize_two<BOUNDED>(t.slots, guard, acc[s][0], acc[s][1], acc[s][2], acc[s][3],
                                         load_folds<FOLD>(branch, S * t.branch_stride))
               : requantize_one<BOUNDED>(t.slots, guard, acc[s][0], acc[s][1], acc[s][2], acc[s][3]);
  if (t.lookup_table) {
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) y[s] = lookup(t.lookup_table, y[s]);
  }
  const ptrdiff_t stride = t.out_stride;
  const __mmask64 mask = t.mask;
  uint8_t *out = t.out + (ptrdiff_t)index * FOLD * S * stride;
#pragma GCC unroll 4
  for (int s = 0; s < S; ++s, out += stride) store_folds<FOLD>(out, S * stride, mask, y[s]);
}

template <int S, int FOLD>
inline __attribute__((always_inline)) void finish(__m512i (&acc)[S][4], const strip &t, int32_t index) {
  if (t.path == REQUANTIZE_ONE && !t.bounded) {
    store_codes<S, FOLD, false, false>(acc, t, index);
  } else if (t.path == REQUANTIZE_ONE) {
    store_codes<S, FOLD, false, true>(acc, t, index);
  } else if (t.path == REQUANTIZE_TWO) {
    store_codes<S, FOLD, true, true>(acc, t, index);
  } else {
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) spill_accumulators(t.accumulators + s * BLOCK, 4, i, acc[s][i]);
  }
}

/* K = 0: one output, any width. FOLD > 1: t.strips counts groups of FOLD strips, inside the image. */
template <int S, int K, int STRIDE, int FOLD>
void run_strips(const strip &t) {
  for (int32_t index = 0; index < t.strips; ++index) {
    __m512i acc[S][4];
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) acc[s][i] = _mm512_load_si512(t.bias + 16 * i);
    const ptrdiff_t offset = t.offset + (ptrdiff_t)index * FOLD * S * STRIDE * t.pixel;
    if constexpr (K == 0)
      accumulate_any(acc, t, offset);
    else if (FOLD > 1 || t.row)
      accumulate_quads<S, K, STRIDE, FOLD>(acc, t, t.row, offset);
    else
      accumulate_quads<S, K, STRIDE, 0>(acc, t, t.pointer, offset);
    finish<S, FOLD>(acc, t, index);
  }
}

}  // namespace

#endif
