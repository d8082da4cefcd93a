/* Requantization of int32 accumulators to uint8 codes in 16-bit lanes, for AVX2 kernels (numerics.py, `requantize`):

       t = sat16((v << l) >> p)    u = (t * m + 2^14) >> 15    y = clamp(sat16(sat16(sum u) + zero) >> k, lo, hi)

   The unit is the group: 16 channels of one pixel in two vectors, a with channels 0-3 and 8-11, b with 4-7 and 12-15, so that
   vpackssdw puts them in order. Everything is static: several files include this header, after their target pragma. */

#ifndef FXC_REQUANTIZE_AVX2_H
#define FXC_REQUANTIZE_AVX2_H

#include <immintrin.h>
#include <string.h>

#include "requantize_scalar.h"

namespace {

constexpr int32_t GROUP = 16;

/* 16 accumulators or other int32. */
struct pair {
  __m256i a, b;
};

/* Constants of one branch for a group (32-byte aligned); channels past the last hold zeros. */
struct branch_constants {
  int32_t offset[GROUP], shift[GROUP]; /* in the order of a, b */
  int16_t multiplier[GROUP];
};

/* Constants of a group. Only two branches are kept: more take requantize_scalar. */
struct group_constants {
  branch_constants branch[2];
  int16_t zero[GROUP];
  uint8_t lo[2 * GROUP], hi[2 * GROUP]; /* twice: two pixels are finished at a time */
};

/* Place of channel c in (a, b). */
inline int32_t place_of(int32_t c) { return c % 8 / 4 * 8 + c / 8 * 4 + c % 4; }

/* Channels first..first + count - 1 <= first + 15. q may be NULL (int32 output). */
void pack_group(group_constants *g, const fxc_requantize *q, int32_t first, int32_t count) {
  memset(g, 0, sizeof *g);
  for (int32_t c = 0; q && c < count; ++c) {
    for (int32_t i = 0; i < q->branches && i < 2; ++i) {
      g->branch[i].offset[place_of(c)] = q->branch[i].offset[first + c];
      g->branch[i].shift[place_of(c)] = q->branch[i].right_shift[first + c];
      g->branch[i].multiplier[c] = q->branch[i].multiplier[first + c];
    }
    g->zero[c] = q->zero[first + c];
    g->lo[c] = g->lo[GROUP + c] = q->lo[first + c];
    g->hi[c] = g->hi[GROUP + c] = q->hi[first + c];
  }
}

inline __m256i load256(const void *from) { return _mm256_loadu_si256((const __m256i *)from); }

/* u of 16 channels, in channel order. */
inline __m256i scale_pair(const branch_constants &c, __m128i left, pair v) {
  v.a = _mm256_srav_epi32(_mm256_sll_epi32(v.a, left), load256(c.shift));
  v.b = _mm256_srav_epi32(_mm256_sll_epi32(v.b, left), load256(c.shift + 8));
  return _mm256_mulhrs_epi16(_mm256_packs_epi32(v.a, v.b), load256(c.multiplier));
}

/* 16 elements of another branch: codes, or int32 if wide; reads no more than 16 elements. */
inline pair load_branch(const void *tensor, ptrdiff_t at, bool wide) {
  if (wide) {
    const __m256i low = load256((const int32_t *)tensor + at), high = load256((const int32_t *)tensor + at + 8);
    return {_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31)};
  }
  const __m128i x = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i *)((const uint8_t *)tensor + at)), 0xd8);
  return {_mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(_mm_unpackhi_epi64(x, x))};
}

inline void store_group(uint8_t *out, int32_t count, __m128i codes, const uint8_t *table) {
  if (count == GROUP && !table) {
    _mm_storeu_si128((__m128i *)out, codes);
    return;
  }
  uint8_t row[GROUP];
  _mm_storeu_si128((__m128i *)row, codes);
  for (int32_t c = 0; c < count; ++c) out[c] = table ? table[row[c]] : row[c];
}

/* 16 accumulators in channel order. */
inline void spill_pair(int32_t *out, pair v) {
  _mm256_storeu_si256((__m256i *)out, _mm256_permute2x128_si256(v.a, v.b, 0x20));
  _mm256_storeu_si256((__m256i *)(out + 8), _mm256_permute2x128_si256(v.a, v.b, 0x31));
}

inline __m256i sum_branches(const destination &d, const group_constants &g, int32_t first, int32_t pixel, pair acc) {
  const __m256i u = scale_pair(g.branch[0], _mm_cvtsi32_si128(d.q->branch[0].left_shift), acc);
  if (d.q->branches == 1) return u;
  pair x = load_branch(d.in[1], (ptrdiff_t)pixel * d.stride[1] + first, d.q->branch[1].wide != 0);
  x.a = _mm256_add_epi32(x.a, load256(g.branch[1].offset)), x.b = _mm256_add_epi32(x.b, load256(g.branch[1].offset + 8));
  return _mm256_adds_epi16(u, scale_pair(g.branch[1], _mm_cvtsi32_si128(d.q->branch[1].left_shift), x));
}

/* int32 output, or more branches than two: one pixel. */
void finish_any(const destination &d, int32_t first, int32_t count, int32_t pixel, pair acc) {
  int32_t row[GROUP];
  spill_pair(row, acc);
  if (d.q)
    requantize_scalar(d, row, first, count, pixel);
  else
    memcpy((int32_t *)d.out + (ptrdiff_t)pixel * d.out_stride + first, row, (size_t)count * 4);
}

/* Finishes channels first.. of `pixels` (1 or 2) neighboring pixels. */
inline void finish_pixels(const destination &d, const group_constants &g, int32_t first, int32_t count, int32_t pixel, int32_t pixels,
                          pair acc0, pair acc1) {
  if (!d.q || d.q->branches > 2) {
    finish_any(d, first, count, pixel, acc0);
    if (pixels > 1) finish_any(d, first, count, pixel + 1, acc1);
    return;
  }
  const __m128i guard = _mm_cvtsi32_si128(d.q->guard_bits);
  const __m256i zero = load256(g.zero), u0 = sum_branches(d, g, first, pixel, acc0);
  const __m256i u1 = pixels > 1 ? sum_branches(d, g, first, pixel + 1, acc1) : u0;
  const __m256i y0 = _mm256_sra_epi16(_mm256_adds_epi16(u0, zero), guard), y1 = _mm256_sra_epi16(_mm256_adds_epi16(u1, zero), guard);
  __m256i y = _mm256_permute4x64_epi64(_mm256_packus_epi16(y0, y1), 0xd8); /* pixel 0, pixel 1 */
  y = _mm256_min_epu8(_mm256_max_epu8(y, load256(g.lo)), load256(g.hi));
  uint8_t *out = (uint8_t *)d.out + (ptrdiff_t)pixel * d.out_stride + first;
  store_group(out, count, _mm256_castsi256_si128(y), d.q->table);
  if (pixels > 1) store_group(out + d.out_stride, count, _mm256_extracti128_si256(y, 1), d.q->table);
}

}  // namespace

#endif
