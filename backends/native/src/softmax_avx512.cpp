// Softmax of rows in AVX-512 (fxc_softmax, reference_normalization.py).
//
// The result of an element depends on its row and on one byte, the distance of its code from the row's largest. So three passes over 64
// codes at a time do: the largest; the sum of the exponentials, looked up as three planes of bytes (they have at most 23 bits); and the
// results, looked up in a table of the row, which has an entry per distance that occurs.
//
// Preconditions: rows contiguous (fxc_rows_contiguous); a requantization that is the same for all elements, of one branch; VBMI, for
// the lookups (other processors take the AVX2 kernel). Tensors are read and written under masks.

#if defined(__x86_64__)

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq")

#include "kernel_row.h"
#include "loops.h"
#include "requantize_avx512.h"
#include "rows_avx512.h"

namespace {

constexpr int DISTANCES = 256;
constexpr int32_t HALF = 1 << 14;

// In scratch. planes: bytes of fxc_softmax's table; rounded: its entries t in 0..2^15, as pairs (t - 2^14, 2^14) of 16-bit numbers whose
// product with (m, m) is t m; row, codes: results of one row by distance.
struct Tables {
  uint8_t planes[3][DISTANCES];
  int32_t rounded[DISTANCES], row[DISTANCES];
  uint8_t codes[DISTANCES];
};

size_t scratch_bytes(const void *) { return sizeof(Tables); }

struct Step {
  const fxc_softmax *p;
  Tables *tables;
  branch32 branch;
  finish32 finish;
  __m512i excluded;  // code of what takes no part
};

__m256i requantize_everywhere(const Step &s, wide32 v) { return codes32(s.finish, scale32(s.branch, v)); }

Step step_of(const fxc_softmax *p, void *scratch) {
  Step s = {p, (Tables *)scratch, {}, {}, _mm512_setzero_si512()};
  const int coarse = p->table_bits - 15;
  for (int d = 0; d < DISTANCES; ++d) {
    for (int plane = 0; plane < 3; ++plane) s.tables->planes[plane][d] = (uint8_t)(p->table[d] >> (8 * plane));
    const int32_t t = (p->table[d] + ((1 << coarse) >> 1)) >> coarse;
    s.tables->rounded[d] = (int32_t)((uint32_t)(t - HALF) & 0xffff) | HALF << 16;
  }
  if (p->requantize) {
    s.branch = branch_everywhere(&p->requantize->branch[0], 0), s.finish = finish_everywhere(p->requantize, 0);
    const __m256i code = requantize_everywhere(s, same32(0));
    s.excluded = _mm512_inserti64x4(_mm512_castsi256_si512(code), code, 1);
    if (p->requantize->table) s.excluded = lookup(p->requantize->table, s.excluded);
  }
  return s;
}

struct Row {
  const uint8_t *codes, *mask;  // mask: NULL, or elements of mask_bytes, mask_stride of them apart (0: one element for all)
  int32_t n, mask_bytes, mask_stride;
};

Row row_at(const fxc_softmax *p, const void *const *in, const fxc_row &at) {
  Row r = {(const uint8_t *)in[0] + at.in[0], nullptr, p->loops.size[FXC_INNERMOST], p->mask_bytes, 0};
  if (p->mask_bytes) {
    r.mask = (const uint8_t *)in[1] + at.in[1] * p->mask_bytes;
    r.mask_stride = p->loops.in_stride[1][FXC_INNERMOST];
  }
  return r;
}

// Which of the elements x..x+63 take part.
__mmask64 taking_part(const Row &r, int32_t x) {
  const __mmask64 exist = channel_mask(r.n - x);
  if (!r.mask) return exist;
  const uint8_t *bytes = r.mask + (ptrdiff_t)x * r.mask_stride * r.mask_bytes;
  if (r.mask_stride == 0 || r.n == 1) {
    uint8_t any = 0;
    for (int i = 0; i < r.mask_bytes; ++i) any |= bytes[i];
    return any ? exist : 0;
  }
  const int lanes = 64 / r.mask_bytes;  // of one vector
  __mmask64 kept = 0;
  for (int first = 0; first < 64 && x + first < r.n; first += lanes, bytes += 64) {
    const __mmask64 here = exist >> first & (~0ULL >> (64 - lanes));
    if (r.mask_bytes == 1) kept = _mm512_mask_test_epi8_mask(here, _mm512_maskz_loadu_epi8(here, bytes), _mm512_set1_epi8(-1));
    if (r.mask_bytes == 4)
      kept |= (__mmask64)_mm512_test_epi32_mask(_mm512_maskz_loadu_epi32((__mmask16)here, bytes), _mm512_set1_epi32(-1)) << first;
    if (r.mask_bytes == 8)
      kept |= (__mmask64)_mm512_test_epi64_mask(_mm512_maskz_loadu_epi64((__mmask8)here, bytes), _mm512_set1_epi64(-1)) << first;
  }
  return kept;
}

uint8_t smallest(__m512i v) {
  const __m256i half = _mm256_min_epu8(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
  const __m128i q = _mm_min_epu8(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  return (uint8_t)_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_min_epu8(q, _mm_srli_epi16(q, 8))));
}

struct Range {
  uint8_t largest, smallest;
};

Range range_of(const Row &r) {
  const __m512i ones = _mm512_set1_epi8(-1);
  __m512i low = ones, high = ones; /* high: of the complements */
  for (int32_t x = 0; x < r.n; x += 64) {
    const __mmask64 kept = taking_part(r, x);
    const __m512i q = _mm512_mask_loadu_epi8(ones, kept, r.codes + x);
    low = _mm512_min_epu8(low, q);
    high = _mm512_mask_min_epu8(high, kept, high, _mm512_xor_si512(q, ones));
  }
  return {(uint8_t)~smallest(high), smallest(low)};
}

int32_t sum_of_exponentials(const Step &s, const Row &r, uint8_t largest) {
  __m512i sums[3] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
  for (int32_t x = 0; x < r.n; x += 64) {
    const __mmask64 kept = taking_part(r, x);
    const __m512i d = _mm512_subs_epu8(_mm512_set1_epi8((char)largest), _mm512_maskz_loadu_epi8(kept, r.codes + x));
    for (int i = 0; i < 3; ++i) {
      const __m512i bytes = _mm512_maskz_mov_epi8(kept, lookup(s.tables->planes[i], d));
      sums[i] = _mm512_add_epi64(sums[i], _mm512_sad_epu8(bytes, _mm512_setzero_si512()));
    }
  }
  const __m512i total = _mm512_add_epi64(_mm512_add_epi64(sums[0], _mm512_slli_epi64(sums[1], 8)), _mm512_slli_epi64(sums[2], 16));
  return (int32_t)_mm512_reduce_add_epi64(total);
}

// Results by distance, 0..last: int32, and codes if they are requantized.
void fill_row_table(const Step &s, fxc_row_scale scale, int last) {
  if (scale.multiplier == 2 * HALF) scale.multiplier = HALF, --scale.shift;  // the same, and fits 16 bits: the shift is at least 6
  const __m512i multiplier = _mm512_set1_epi16((short)scale.multiplier), half = _mm512_set1_epi32(1 << (scale.shift - 1));
  const __m128i shift = _mm_cvtsi32_si128(scale.shift);
  for (int d = 0; d <= last; d += 32) {
    wide32 v = load32(s.tables->rounded + d);
    v = {scale_row(v.a, multiplier, half, shift), scale_row(v.b, multiplier, half, shift)};
    if (s.p->requantize)
      _mm256_storeu_si256((__m256i *)(s.tables->codes + d), requantize_everywhere(s, v));
    else
      store32(s.tables->row + d, ~0u, v);
  }
  if (s.p->requantize && s.p->requantize->table) apply_table(s.p->requantize->table, s.tables->codes, 1, 0, last + 1);
}

void store_codes(const Step &s, const Row &r, uint8_t largest, uint8_t *out) {
  for (int32_t x = 0; x < r.n; x += 64) {
    const __mmask64 kept = taking_part(r, x);
    const __m512i d = _mm512_subs_epu8(_mm512_set1_epi8((char)largest), _mm512_maskz_loadu_epi8(kept, r.codes + x));
    _mm512_mask_storeu_epi8(out + x, channel_mask(r.n - x), _mm512_mask_mov_epi8(s.excluded, kept, lookup(s.tables->codes, d)));
  }
}

void store_wide(const Step &s, const Row &r, uint8_t largest, int32_t *out) {
  for (int32_t x = 0; x < r.n; x += 64) {
    const __mmask64 kept = taking_part(r, x), exist = channel_mask(r.n - x);
    for (int first = 0; first < 64; first += 16) {
      const __mmask16 here = (__mmask16)(kept >> first);
      const __m512i q = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(here, r.codes + x + first));
      const __m512i d = _mm512_sub_epi32(_mm512_set1_epi32(largest), q);
      const __m512i v = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), here, d, s.tables->row, 4);
      _mm512_mask_storeu_epi32(out + x + first, (__mmask16)(exist >> first), v);
    }
  }
}

void run_softmax(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *scratch) {
  const fxc_softmax *p = (const fxc_softmax *)params;
  const Step s = step_of(p, scratch);
  fxc_row at = fxc_row_at(&p->loops, begin);
  for (int32_t unit = begin; unit < end; fxc_next_row(&p->loops, &at, ++unit)) {
    const Row r = row_at(p, in, at);
    const Range range = range_of(r);
    fill_row_table(s, fxc_softmax_scale(p, sum_of_exponentials(s, r, range.largest)), range.largest - range.smallest);
    if (p->requantize)
      store_codes(s, r, range.largest, (uint8_t *)out + at.out);
    else
      store_wide(s, r, range.largest, (int32_t *)out + at.out);
  }
}

// All channels are requantized alike.
bool is_uniform(const fxc_requantize *q) {
  const fxc_branch &b = q->branch[0];
  for (int32_t c = 1; c < q->channels; ++c)
    if (b.offset[c] != b.offset[0] || b.right_shift[c] != b.right_shift[0] || b.multiplier[c] != b.multiplier[0] ||
        q->zero[c] != q->zero[0] || q->lo[c] != q->lo[0] || q->hi[c] != q->hi[0])
      return false;
  return true;
}

int accepts(const void *params) {
  const fxc_softmax *p = (const fxc_softmax *)params;
  const bool flat = p->loops.size[FXC_INNERMOST] == 1 || p->loops.in_stride[0][FXC_INNERMOST] == 1;
  if (!has_table_lookup() || !flat || !fxc_rows_contiguous(&p->loops)) return 0;
  return !p->requantize || (p->requantize->branches == 1 && is_uniform(p->requantize));
}

int32_t units(const void *params) { return fxc_row_count((const fxc_loops *)params); }

}  // namespace

#pragma GCC pop_options

extern "C" {
extern const fxc_kernel fxc_u8_softmax__avx512 = {"fxc_u8_softmax__avx512", "softmax", "avx512vnni", accepts, nullptr, nullptr,
                                                  units, scratch_bytes, run_softmax};
}

#endif
