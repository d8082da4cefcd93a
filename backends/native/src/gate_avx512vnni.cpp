/* A tensor times a gate with AVX-512 VNNI: (a - za[c]) * (b[c] - zb[c]) where b is one row of channels for many rows of a (the end
   of squeeze-and-excitation), requantized with one branch (requantize_avx512.h).

   For a run of rows that share b, the product is g[c] * a + o[c] with g = b - zb and o = offset - g * za: one vpdpwssd per 16 codes.
   64 channels at a time; vpshufb puts channel 16 L + 4 v + i in lane L, element i of vector v: slot order. Of a last block of at
   most 32 or 16 channels, a vector takes 2 or 4 rows at once (FOLD).

   Unit: one row. Preconditions: see accepts. Reads up to 64 bytes past an input, per-channel arrays to the next multiple of 64. */

#if defined(__x86_64__)

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")

#include "kernel_row.h"
#include "loops.h"
#include "requantize_avx512.h"

namespace {

constexpr int32_t BLOCK = 64;
constexpr int32_t ROWS = FXC_INNERMOST - 1; /* the dimension of the rows that share b */

int accepts(const void *params) {
  const fxc_mul *p = (const fxc_mul *)params;
  const fxc_loops &l = p->loops;
  const fxc_requantize *q = p->requantize;
  const bool channels_inside = l.channel_dim == FXC_INNERMOST || l.size[l.channel_dim] == 1;
  const bool contiguous = l.out_stride[FXC_INNERMOST] == 1 && l.in_stride[0][FXC_INNERMOST] == 1 && l.in_stride[1][FXC_INNERMOST] == 1;
  return q && requantize_kind(q) == REQUANTIZE_ONE && channels_inside && contiguous && l.in_stride[1][ROWS] == 0 && l.size[ROWS] > 1;
}

int32_t units(const void *params) { return fxc_row_count((const fxc_loops *)params); }

/* Constants of a block, channel j of it at j; the channels of a narrow block repeat. */
struct block {
  alignas(64) int32_t factor[BLOCK], offset[BLOCK], shift[BLOCK];
  int16_t multiplier[BLOCK], zero[BLOCK];
  uint8_t lo[BLOCK], hi[BLOCK];
};

struct job {
  const fxc_mul *p;
  int32_t left_shift; /* reduced */
  bool per_channel;
};

/* 16 entries of a per-channel array from channel c on. */
__m512i entries(const job &j, const int32_t *array, int32_t c) {
  return j.per_channel ? _mm512_loadu_si512(array + c) : _mm512_set1_epi32(array[0]);
}

void store_words(const job &j, int16_t *target, const int16_t *array, int32_t c) {
  _mm256_store_si256((__m256i *)target, j.per_channel ? _mm256_loadu_si256((const __m256i *)(array + c)) : _mm256_set1_epi16(array[0]));
}

void store_bytes(const job &j, uint8_t *target, const uint8_t *array, int32_t c) {
  _mm_store_si128((__m128i *)target, j.per_channel ? _mm_loadu_si128((const __m128i *)(array + c)) : _mm_set1_epi8((char)array[0]));
}

/* Constants of the block of channels first.. for the gate row b; its channels repeat every `period`. */
void fill_block(const job &j, const uint8_t *b, int32_t first, int32_t period, block *k) {
  const fxc_requantize *q = j.p->requantize;
  const __m512i less = _mm512_set1_epi32(q->branch[0].left_shift - j.left_shift);
  for (int32_t i = 0; i < BLOCK; i += 16) {
    const int32_t c = first + i % period;
    const __m512i gate = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(b + c)));
    const __m512i factor = _mm512_sub_epi32(gate, entries(j, j.p->zero_point[1], c));
    const __m512i fixed = _mm512_mullo_epi32(factor, entries(j, j.p->zero_point[0], c));
    _mm512_store_si512(k->factor + i, factor);
    _mm512_store_si512(k->offset + i, _mm512_sub_epi32(entries(j, q->branch[0].offset, c), fixed));
    _mm512_store_si512(k->shift + i, _mm512_sub_epi32(entries(j, q->branch[0].right_shift, c), less));
    store_words(j, k->multiplier + i, q->branch[0].multiplier, c);
    store_words(j, k->zero + i, q->zero, c);
    store_bytes(j, k->lo + i, q->lo, c);
    store_bytes(j, k->hi + i, q->hi, c);
  }
}

/* 16 bytes from each of four places `distance` bytes apart. */
inline __attribute__((always_inline)) __m512i load_lanes(const void *array, int distance) {
  const uint8_t *x = (const uint8_t *)array;
  __m512i v = _mm512_castsi128_si512(_mm_load_si128((const __m128i *)x));
  v = _mm512_inserti32x4(v, _mm_load_si128((const __m128i *)(x + distance)), 1);
  v = _mm512_inserti32x4(v, _mm_load_si128((const __m128i *)(x + 2 * distance)), 2);
  return _mm512_inserti32x4(v, _mm_load_si128((const __m128i *)(x + 3 * distance)), 3);
}

/* Vector v of 64 int32 in slot order: elements 16 L + 4 v + 0..3 in lane L. */
inline __attribute__((always_inline)) __m512i slots_of_ints(const int32_t *array, int v) { return load_lanes(array + 4 * v, 64); }

/* Half h of 64 int16: elements 16 L + 8 h + 0..7 in lane L. */
inline __attribute__((always_inline)) __m512i slots_of_words(const int16_t *array, int h) { return load_lanes(array + 8 * h, 32); }

/* 64 / FOLD bytes from each of FOLD rows. */
template <int FOLD>
inline __attribute__((always_inline)) __m512i load_rows(const uint8_t *x, ptrdiff_t stride) {
  if constexpr (FOLD == 1) return _mm512_loadu_si512(x);
  if constexpr (FOLD == 2)
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)x)),
                              _mm256_loadu_si256((const __m256i *)(x + stride)), 1);
  __m512i v = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)x));
  v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *)(x + stride)), 1);
  v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *)(x + 2 * stride)), 2);
  return _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *)(x + 3 * stride)), 3);
}

template <int FOLD>
inline __attribute__((always_inline)) void store_rows(uint8_t *out, ptrdiff_t stride, __mmask64 mask, __m512i y) {
  if constexpr (FOLD == 1) {
    _mm512_mask_storeu_epi8(out, mask, y);
  } else if constexpr (FOLD == 2) {
    _mm256_mask_storeu_epi8(out, (__mmask32)mask, _mm512_castsi512_si256(y));
    _mm256_mask_storeu_epi8(out + stride, (__mmask32)mask, _mm512_extracti64x4_epi64(y, 1));
  } else {
    _mm_mask_storeu_epi8(out, (__mmask16)mask, _mm512_castsi512_si128(y));
    _mm_mask_storeu_epi8(out + stride, (__mmask16)mask, _mm512_extracti32x4_epi32(y, 1));
    _mm_mask_storeu_epi8(out + 2 * stride, (__mmask16)mask, _mm512_extracti32x4_epi32(y, 2));
    _mm_mask_storeu_epi8(out + 3 * stride, (__mmask16)mask, _mm512_extracti32x4_epi32(y, 3));
  }
}

/* Codes 16 L + 4 v + i as int32, times the factors, plus the offsets; shifted. */
inline __attribute__((always_inline)) __m512i scale_vector(__m512i x, __m512i take, __m512i factor, __m512i acc, __m128i left, bool shifts_left,
                                                           __m512i shift) {
  __asm__("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(_mm512_shuffle_epi8(x, take)), "v"(factor));
  if (shifts_left) acc = _mm512_sll_epi32(acc, left);
  return _mm512_srav_epi32(acc, shift);
}

/* vpshufb indices: bytes 4 v + i of a lane, each followed by three zero bytes. */
inline __attribute__((always_inline)) __m512i take_bytes(int v) {
  const int first = (int)0x80808000;
  return _mm512_add_epi32(_mm512_broadcast_i32x4(_mm_setr_epi32(first, first + 1, first + 2, first + 3)), _mm512_set1_epi32(4 * v));
}

/* `groups` times FOLD rows of a block. */
template <int FOLD, bool TABLE>
void run_block(const job &j, const block &k, const uint8_t *a, ptrdiff_t a_stride, uint8_t *out, ptrdiff_t out_stride, int32_t groups,
               __mmask64 mask) {
  const fxc_requantize *q = j.p->requantize;
  __m512i factor[4], offset[4], shift[4], take[4];
  for (int v = 0; v < 4; ++v) {
    take[v] = take_bytes(v), factor[v] = slots_of_ints(k.factor, v);
    offset[v] = slots_of_ints(k.offset, v), shift[v] = slots_of_ints(k.shift, v);
  }
  const __m512i multiplier[2] = {slots_of_words(k.multiplier, 0), slots_of_words(k.multiplier, 1)};
  const __m512i zero[2] = {slots_of_words(k.zero, 0), slots_of_words(k.zero, 1)};
  const __m512i lo = _mm512_load_si512(k.lo), hi = _mm512_load_si512(k.hi), guard = guard_factor(q);
  const __m128i left = _mm_cvtsi32_si128(j.left_shift);
  const bool shifts_left = j.left_shift != 0;
  for (int32_t i = 0; i < groups; ++i, a += FOLD * a_stride, out += FOLD * out_stride) {
    const __m512i x = load_rows<FOLD>(a, a_stride);
    __m512i t[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) t[v] = scale_vector(x, take[v], factor[v], offset[v], left, shifts_left, shift[v]);
    const __m512i u0 = _mm512_mulhrs_epi16(_mm512_packs_epi32(t[0], t[1]), multiplier[0]);
    const __m512i u1 = _mm512_mulhrs_epi16(_mm512_packs_epi32(t[2], t[3]), multiplier[1]);
    const __m512i y0 = _mm512_mulhi_epi16(_mm512_adds_epi16(u0, zero[0]), guard);
    const __m512i y1 = _mm512_mulhi_epi16(_mm512_adds_epi16(u1, zero[1]), guard);
    __m512i y = _mm512_min_epu8(_mm512_max_epu8(_mm512_packus_epi16(y0, y1), lo), hi);
    if constexpr (TABLE) y = lookup(q->table, y);
    store_rows<FOLD>(out, out_stride, mask, y);
  }
}

template <int FOLD>
void run_rows(const job &j, const block &k, const uint8_t *a, ptrdiff_t a_stride, uint8_t *out, ptrdiff_t out_stride, int32_t rows,
              int32_t channels) {
  const __mmask64 mask = channel_mask(channels);
  const fxc_requantize *q = j.p->requantize;
  const int32_t groups = rows / FOLD, rest = rows % FOLD;
  const bool table = q->table && has_table_lookup();
  (table ? run_block<FOLD, true> : run_block<FOLD, false>)(j, k, a, a_stride, out, out_stride, groups, mask);
  a += groups * FOLD * a_stride;
  uint8_t *last = out + groups * FOLD * out_stride;
  if (rest) (table ? run_block<1, true> : run_block<1, false>)(j, k, a, a_stride, last, out_stride, rest, mask);
  if (q->table && !table) apply_table(q->table, out, rows, (int32_t)out_stride, channels);
}

void run(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *) {
  const fxc_mul *p = (const fxc_mul *)params;
  const fxc_loops &l = p->loops;
  const job j = {p, reduced_left_shift(p->requantize), l.channel_dim == FXC_INNERMOST};
  const int32_t width = l.size[FXC_INNERMOST];
  for (int32_t unit = begin; unit < end;) {
    const int32_t left = l.size[ROWS] - unit % l.size[ROWS], rows = left < end - unit ? left : end - unit;
    const fxc_row at = fxc_row_at(&l, unit);
    for (int32_t c = 0; c < width; c += BLOCK) {
      const int32_t channels = width - c < BLOCK ? width - c : BLOCK, fold = channels <= 16 ? 4 : channels <= 32 ? 2 : 1;
      block k;
      fill_block(j, (const uint8_t *)in[1] + at.in[1], c, BLOCK / fold, &k);
      const auto function = fold == 4 ? run_rows<4> : fold == 2 ? run_rows<2> : run_rows<1>;
      function(j, k, (const uint8_t *)in[0] + at.in[0] + c, l.in_stride[0][ROWS], (uint8_t *)out + at.out + c, l.out_stride[ROWS], rows,
               channels);
    }
    unit += rows;
  }
}

}  // namespace

#pragma GCC pop_options

extern "C" {
extern const fxc_kernel fxc_u8_gate__avx512vnni = {"fxc_u8_gate__avx512vnni", "mul", "avx512vnni", accepts, nullptr, nullptr,
                                                   units, nullptr, run};
}

#endif
