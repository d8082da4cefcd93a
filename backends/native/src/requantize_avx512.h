/* Requantization of int32 accumulators to uint8 codes in 16-bit lanes, for AVX-512 kernels (numerics.py, `requantize`):

       t = sat16((v << l) >> p)    u = (t * m + 2^14) >> 15    y = clamp(sat16(sat16(sum u) + zero) >> k, lo, hi)

   The unit is the quad: four vectors of 16 accumulators that become 64 codes. vpackssdw and vpackuswb narrow them lane by
   lane, so accumulator (vector v, 128-bit lane L, element i) becomes byte 16 L + 4 v + i: its slot. A kernel that gives lane
   elements the right channels needs no shuffle: a block of 16 W channels has channel 4 W L + 4 j + i in vector j
   (requantize_channel), and a quad holds

       W = 4: one pixel               slot = channel
       W = 3: one pixel, v = 3 unused
       W = 2: two pixels, v = 2 * pixel + j
       W = 1: four pixels, v = pixel

   load_slots<W> and store_slots<W> translate between slots and the pixels' rows of channels (one vpermd, none for W = 4).

   How to use it: at packing time fill one requantize_slots per block with pack_slots<W>, and keep requantize_kind (in kernels that
   have every path: requantize_kind_of_all), reduced_left_shift and has_bounds. At run time shift the accumulators left if
   reduced_left_shift is not 0, call requantize_one, requantize_two or requantize_wide (in requantize_wide_avx512.h; the kind says
   which), and store_slots; otherwise write the (unshifted) accumulators in channel order and call requantize_row (in
   requantize_row_avx512.h), which does everything else. If the requantization has a table, lookup() the codes before storing them,
   or, without has_table_lookup(), call apply_table on the stored codes (requantize_row has applied it already).

   Everything is static: several files include this header. Requires AVX512F, BW, VL, DQ; include it after the target pragma.
   lo <= hi is assumed, as everywhere. */

#ifndef FXC_REQUANTIZE_AVX512_H
#define FXC_REQUANTIZE_AVX512_H

#include <immintrin.h>
#include <string.h>

#include "requantize_row_avx512.h"

/* How a step's accumulators are finished. */
enum requantize_path {
  REQUANTIZE_ONE,  /* one branch: requantize_one */
  REQUANTIZE_TWO,  /* a second branch of uint8 codes whose scaling fits 16 bits: requantize_two */
  REQUANTIZE_ANY,  /* everything else: requantize_row */
  REQUANTIZE_WIDE, /* a second branch of int32, or of codes whose scaling does not fit 16 bits: requantize_wide */
  REQUANTIZE_NONE, /* int32 output */
};

/* Per-channel constants of one quad in slot order (64-byte aligned). Slots without a channel hold zeros: they give code 0.
   code_*: branch 1, t = ((x + code_offset) * code_factor) >> code_right in 16 bits; code_shifts: some code_right is not 0.
   wide_*: branch 1, t = sat16(((x + wide_offset) << wide_left) >> wide_shift), not in slot order but that of load_values.
   doublings: see guard_factor. */
typedef struct {
  int32_t shift[64];
  int16_t multiplier[64], zero[64];
  uint8_t lo[64], hi[64];
  int16_t code_offset[64], code_factor[64], code_right[64], code_multiplier[64];
  int32_t wide_offset[64], wide_shift[64];
  int32_t code_shifts, doublings, wide_left, reserved[13];
} requantize_slots;

/* ------------------------------------------------------------------------------------------------------ packing */

/* Channel within a block of 16 W of element i of lane `lane` of vector j. */
static inline int requantize_channel(int W, int j, int lane, int i) { return 4 * W * lane + 4 * j + i; }

/* ((x + offset) << left) >> right as two 16-bit shifts of which one is by 0; false if a code 0..255 could overflow. */
static inline bool narrow_code_shift(const fxc_branch *b, int32_t c, int16_t *left, int16_t *right) {
  const int32_t l = b->left_shift > b->right_shift[c] ? b->left_shift - b->right_shift[c] : 0;
  const int32_t r = b->right_shift[c] > b->left_shift ? b->right_shift[c] - b->left_shift : 0;
  const int64_t lowest = b->offset[c], highest = lowest + 255;
  *left = (int16_t)l, *right = (int16_t)(r < 15 ? r : 15);
  if (b->left_shift > 30 || l > 15) return false;
  if (lowest * (1LL << b->left_shift) < INT32_MIN || highest * (1LL << b->left_shift) > INT32_MAX) return false;
  return lowest * (1LL << l) >= INT16_MIN && highest * (1LL << l) <= INT16_MAX;
}

/* The left shift that branch 0 needs when shifts of channels that are shifted right anyway are reduced first: (v << l) >> p is
   v >> (p - l) where p >= l, because v << l is proven to fit int32. Mostly 0. */
static inline int32_t reduced_left_shift(const fxc_requantize *q) {
  int32_t left = 0;
  for (int32_t c = 0; q && c < q->channels; ++c) {
    const int32_t excess = q->branch[0].left_shift - q->branch[0].right_shift[c];
    if (excess > left) left = excess;
  }
  return left;
}

/* Whether bounds other than those of a byte exist, or another reason to finish slots BOUNDED. */
static inline bool has_bounds(const fxc_requantize *q) {
  if (q && q->guard_bits < 2) return true;
  for (int32_t c = 0; q && c < q->channels; ++c)
    if (q->lo[c] != 0 || q->hi[c] != 255) return true;
  return false;
}

/* For kernels that have every path. */
static inline requantize_path requantize_kind_of_all(const fxc_requantize *q) {
  int16_t left, right;
  if (!q) return REQUANTIZE_NONE;
  if (q->branches != 2) return q->branches == 1 ? REQUANTIZE_ONE : REQUANTIZE_ANY;
  if (q->branch[1].wide) return REQUANTIZE_WIDE;
  for (int32_t c = 0; c < q->channels; ++c)
    if (!narrow_code_shift(&q->branch[1], c, &left, &right)) return REQUANTIZE_WIDE;
  return REQUANTIZE_TWO;
}

/* For kernels that have only ONE and TWO, with two guard bits or more (see guard_factor; there are nearly always 6). */
static inline requantize_path requantize_kind(const fxc_requantize *q) {
  const requantize_path path = requantize_kind_of_all(q);
  return (path == REQUANTIZE_ONE || path == REQUANTIZE_TWO) && q->guard_bits >= 2 ? path : REQUANTIZE_ANY;
}

/* Constants of channel c at accumulator (v, lane, i) of a quad. left: reduced_left_shift(q). */
static inline void pack_slot(requantize_slots *s, const fxc_requantize *q, int32_t left, int32_t c, int v, int lane, int i) {
  const int byte = 16 * lane + 4 * v + i, word = 32 * (v / 2) + 8 * lane + 4 * (v % 2) + i;
  s->shift[16 * v + 4 * lane + i] = q->branch[0].right_shift[c] - q->branch[0].left_shift + left;
  s->multiplier[word] = q->branch[0].multiplier[c];
  s->zero[word] = q->zero[c];
  s->lo[byte] = q->lo[c], s->hi[byte] = q->hi[c];
  if (q->branches != 2) return;
  s->code_multiplier[word] = q->branch[1].multiplier[c];
  if (q->branch[1].wide) return;
  int16_t code_left;
  narrow_code_shift(&q->branch[1], c, &code_left, &s->code_right[word]);
  s->code_factor[word] = (int16_t)(uint16_t)(1u << (code_left & 15)); /* 2^15 wraps, as does a shift by 15 */
  s->code_shifts |= s->code_right[word];
  s->code_offset[word] = (int16_t)q->branch[1].offset[c];
}

/* Slots of the block of 16 W channels that starts at `first`, `count` <= 16 W of them existing. q may be NULL (int32). */
template <int W>
static inline void pack_slots(requantize_slots *s, const fxc_requantize *q, int32_t first, int32_t count) {
  memset(s, 0, sizeof *s);
  if (!q) return;
  const int32_t left = reduced_left_shift(q);
  s->doublings = q->guard_bits < 2 ? 2 - q->guard_bits : 0;
  if (q->branches == 2) s->wide_left = q->branch[1].left_shift;
  for (int c = 0; q->branches == 2 && c < 64; ++c) {
    if (c % (16 * W) >= count || (W == 3 && c >= 48)) continue;
    s->wide_offset[c] = q->branch[1].offset[first + c % (16 * W)];
    s->wide_shift[c] = q->branch[1].right_shift[first + c % (16 * W)];
  }
  for (int v = 0; v < (W == 3 ? 3 : 4); ++v)
    for (int lane = 0; lane < 4; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int channel = requantize_channel(W, v % W, lane, i);
        if (channel < count) pack_slot(s, q, left, first + channel, v, lane, i);
      }
}

/* ---------------------------------------------------------------------------------------------------- arithmetic */

/* u of branch 0: 32 accumulators (vectors 2 h and 2 h + 1 of the quad). */
static inline __m512i scale_accumulators(const requantize_slots *s, int h, __m512i a, __m512i b) {
  a = _mm512_srav_epi32(a, _mm512_load_si512(s->shift + 32 * h));
  b = _mm512_srav_epi32(b, _mm512_load_si512(s->shift + 32 * h + 16));
  return _mm512_mulhrs_epi16(_mm512_packs_epi32(a, b), _mm512_load_si512(s->multiplier + 32 * h));
}

/* u of branch 1: 32 codes already widened to 16 bits. */
static inline __m512i scale_codes(const requantize_slots *s, int h, __m512i x) {
  __m512i t = _mm512_add_epi16(x, _mm512_load_si512(s->code_offset + 32 * h));
  t = _mm512_mullo_epi16(t, _mm512_load_si512(s->code_factor + 32 * h)); /* a shift, see guard_factor */
  if (s->code_shifts) t = _mm512_srav_epi16(t, _mm512_load_si512(s->code_right + 32 * h));
  return _mm512_mulhrs_epi16(t, _mm512_load_si512(s->code_multiplier + 32 * h));
}

/* y >> k as the high half of y * 2^(16-k): multiplications have two ports, shifts only one, and the epilogue is bound by that port.
   For k < 2, y is doubled 2 - k times before, saturating: that changes only what is beyond 255 after the shift as well. */
static inline __m512i guard_factor(const fxc_requantize *q) {
  const int32_t k = q && q->guard_bits > 2 ? q->guard_bits : 2;
  return _mm512_set1_epi16((short)(1 << (16 - k)));
}

/* 64 codes from the sums of u. BOUNDED: has_bounds. */
template <bool BOUNDED>
static inline __m512i finish_slots(const requantize_slots *s, __m512i guard, __m512i u0, __m512i u1) {
  u0 = _mm512_adds_epi16(u0, _mm512_load_si512(s->zero));
  u1 = _mm512_adds_epi16(u1, _mm512_load_si512(s->zero + 32));
  if (BOUNDED && __builtin_expect(s->doublings, 0))
    for (int32_t i = 0; i < s->doublings; ++i) u0 = _mm512_adds_epi16(u0, u0), u1 = _mm512_adds_epi16(u1, u1);
  const __m512i y = _mm512_packus_epi16(_mm512_mulhi_epi16(u0, guard), _mm512_mulhi_epi16(u1, guard));
  if constexpr (BOUNDED) return _mm512_min_epu8(_mm512_max_epu8(y, _mm512_load_si512(s->lo)), _mm512_load_si512(s->hi));
  return y;
}

/* Codes of a quad of accumulators (already shifted left by reduced_left_shift), in slot order. guard: guard_factor. */
template <bool BOUNDED>
static inline __m512i requantize_one(const requantize_slots *s, __m512i guard, __m512i v0, __m512i v1, __m512i v2, __m512i v3) {
  return finish_slots<BOUNDED>(s, guard, scale_accumulators(s, 0, v0, v1), scale_accumulators(s, 1, v2, v3));
}

/* The same with a second branch: codes x in slot order. */
template <bool BOUNDED>
static inline __m512i requantize_two(const requantize_slots *s, __m512i guard, __m512i v0, __m512i v1, __m512i v2, __m512i v3,
                                     __m512i x) {
  const __m512i none = _mm512_setzero_si512();
  const __m512i u0 = scale_codes(s, 0, _mm512_unpacklo_epi8(x, none)), u1 = scale_codes(s, 1, _mm512_unpackhi_epi8(x, none));
  return finish_slots<BOUNDED>(s, guard, _mm512_adds_epi16(u0, scale_accumulators(s, 0, v0, v1)),
                               _mm512_adds_epi16(u1, scale_accumulators(s, 1, v2, v3)));
}

/* ------------------------------------------------------------------------------------------------ loads and stores */

/* Pixels in a quad. */
constexpr static int quad_pixels(int W) { return W == 1 ? 4 : W == 2 ? 2 : 1; }

/* Mask of the `count` first channels of a block (at most 16 W). */
static inline __mmask64 channel_mask(int32_t count) { return count >= 64 ? ~0ULL : (1ULL << count) - 1; }

/* Codes of the quad_pixels(W) pixels at row, row + stride, ..., 16 W channels each, in slot order. Reads 64, 64, 32, 16 bytes of a
   pixel for W = 4, 3, 2, 1. */
template <int W>
static inline __m512i load_slots(const uint8_t *row, ptrdiff_t stride) {
  if constexpr (W == 4) return _mm512_loadu_si512(row);
  if constexpr (W == 3)
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 1, 2, 12, 3, 4, 5, 12, 6, 7, 8, 12, 9, 10, 11, 12), _mm512_loadu_si512(row));
  if constexpr (W == 2) {
    const __m512i x = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)row)),
                                         _mm256_loadu_si256((const __m256i *)(row + stride)), 1);
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15), x);
  }
  __m512i x = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)row));
  x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *)(row + stride)), 1);
  x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *)(row + 2 * stride)), 2);
  x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *)(row + 3 * stride)), 3);
  return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), x);
}

/* Stores the codes y (slot order) of a quad to the pixels at row, row + stride, ...; the mask selects channels (channel_mask). */
template <int W>
static inline void store_slots(uint8_t *row, ptrdiff_t stride, __mmask64 mask, __m512i y) {
  if constexpr (W == 4) {
    _mm512_mask_storeu_epi8(row, mask, y);
  } else if constexpr (W == 3) {
    y = _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 3, 3, 3, 3), y);
    _mm512_mask_storeu_epi8(row, mask, y);
  } else if constexpr (W == 2) {
    y = _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15), y);
    _mm256_mask_storeu_epi8(row, (__mmask32)mask, _mm512_castsi512_si256(y));
    _mm256_mask_storeu_epi8(row + stride, (__mmask32)mask, _mm512_extracti64x4_epi64(y, 1));
  } else {
    y = _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), y);
    _mm_mask_storeu_epi8(row, (__mmask16)mask, _mm512_castsi512_si128(y));
    _mm_mask_storeu_epi8(row + stride, (__mmask16)mask, _mm512_extracti32x4_epi32(y, 1));
    _mm_mask_storeu_epi8(row + 2 * stride, (__mmask16)mask, _mm512_extracti32x4_epi32(y, 2));
    _mm_mask_storeu_epi8(row + 3 * stride, (__mmask16)mask, _mm512_extracti32x4_epi32(y, 3));
  }
}

/* Vector j of a block of 16 W accumulators, written to its place in a buffer of 16 W int32 in channel order. */
static inline void spill_accumulators(int32_t *block, int W, int j, __m512i v) {
  _mm_storeu_si128((__m128i *)(block + requantize_channel(W, j, 0, 0)), _mm512_castsi512_si128(v));
  _mm_storeu_si128((__m128i *)(block + requantize_channel(W, j, 1, 0)), _mm512_extracti32x4_epi32(v, 1));
  _mm_storeu_si128((__m128i *)(block + requantize_channel(W, j, 2, 0)), _mm512_extracti32x4_epi32(v, 2));
  _mm_storeu_si128((__m128i *)(block + requantize_channel(W, j, 3, 0)), _mm512_extracti32x4_epi32(v, 3));
}

/* ----------------------------------------------------------------------------------------------------------- tables */

/* table[y] of 64 codes. VBMI instructions, which not every VNNI processor has: call only if has_table_lookup(). In assembly, so
   that it can be inlined into functions for AVX-512 BW. */
static inline __attribute__((always_inline)) __m512i lookup(const uint8_t *table, __m512i y) {
  __m512i low = y, high = y;
  __asm__("vpermi2b %2, %1, %0" : "+v"(low) : "v"(_mm512_loadu_si512(table)), "v"(_mm512_loadu_si512(table + 64)));
  __asm__("vpermi2b %2, %1, %0" : "+v"(high) : "v"(_mm512_loadu_si512(table + 128)), "v"(_mm512_loadu_si512(table + 192)));
  return _mm512_mask_mov_epi8(low, _mm512_movepi8_mask(y), high);
}

static inline bool has_table_lookup() { return __builtin_cpu_supports("avx512vbmi"); }

/* codes[r][0..count - 1] -> table[code] in place, rows `stride` bytes apart, on any processor. */
static inline void apply_table(const uint8_t *table, uint8_t *codes, int32_t rows, int32_t stride, int32_t count) {
  const bool fast = has_table_lookup();
  for (int32_t r = 0; r < rows; ++r, codes += stride) {
    for (int32_t c = 0; fast && c < count; c += 64) {
      const __mmask64 mask = channel_mask(count - c);
      _mm512_mask_storeu_epi8(codes + c, mask, lookup(table, _mm512_maskz_loadu_epi8(mask, codes + c)));
    }
    for (int32_t c = 0; !fast && c < count; ++c) codes[c] = table[codes[c]];
  }
}

#endif
