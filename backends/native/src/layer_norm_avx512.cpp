// Normalization of rows in AVX-512 (fxc_layer_norm, reference_normalization.py): two passes over the codes of a row, 32 at a time; what
// is computed once per row (fxc_layer_norm_scale) is the portable code.
//
// Preconditions: rows contiguous (fxc_rows_contiguous); at most two branches, the second not broadcast along the row. Over-reads:
// per-channel arrays up to the next multiple of 32. Tensors are read and written under masks.

#if defined(__x86_64__)

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq")

#include "kernel_row.h"
#include "loops.h"
#include "requantize_avx512.h"
#include "rows_avx512.h"

namespace {

constexpr int32_t CHUNK = 1 << 18;  // codes whose squares fit the int32 lanes: CHUNK / 32 * 2 * 255^2 < 2^31

struct Sums {
  int64_t total, squares;
};

Sums sums_of(const uint8_t *codes, int32_t n) {
  Sums sums = {0, 0};
  for (int32_t begin = 0; begin < n; begin += CHUNK) {
    const int32_t end = n - begin < CHUNK ? n : begin + CHUNK;
    __m512i total = _mm512_setzero_si512(), squares = _mm512_setzero_si512();
    for (int32_t x = begin; x < end; x += 32) {
      const __m512i q = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(first32(end - x), codes + x));
      total = _mm512_add_epi32(total, _mm512_madd_epi16(q, _mm512_set1_epi16(1)));
      squares = _mm512_add_epi32(squares, _mm512_madd_epi16(q, q));
    }
    sums.total += _mm512_reduce_add_epi64(_mm512_add_epi64(_mm512_cvtepi32_epi64(_mm512_castsi512_si256(total)),
                                                           _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(total, 1))));
    sums.squares += _mm512_reduce_add_epi64(_mm512_add_epi64(_mm512_cvtepi32_epi64(_mm512_castsi512_si256(squares)),
                                                             _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(squares, 1))));
  }
  return sums;
}

// Elements of the second branch.
wide32 branch_values(const fxc_branch &b, const void *tensor, ptrdiff_t at, __mmask32 mask) {
  if (!b.wide) return widen32(_mm256_maskz_loadu_epi8(mask, (const uint8_t *)tensor + at));
  const int32_t *values = (const int32_t *)tensor + at;
  return {_mm512_maskz_loadu_epi32((__mmask16)mask, values), _mm512_maskz_loadu_epi32((__mmask16)(mask >> 16), values + 16)};
}

void normalize(const fxc_layer_norm &p, const void *const *in, const fxc_row &row, void *out) {
  const fxc_requantize *q = p.requantize;
  const uint8_t *codes = (const uint8_t *)in[0] + row.in[0];
  const int32_t n = p.loops.size[FXC_INNERMOST];
  const Sums sums = sums_of(codes, n);
  const fxc_row_scale scale = fxc_layer_norm_scale(&p, sums.total, sums.squares);
  const __m512i mean = _mm512_set1_epi32(scale.mean), multiplier = _mm512_set1_epi32(scale.multiplier);
  const __m512i half = _mm512_set1_epi32(1 << (scale.shift - 1));
  const __m128i shift = _mm_cvtsi32_si128(scale.shift);
  for (int32_t x = 0; x < n; x += 32) {
    const __mmask32 mask = first32(n - x);
    wide32 v = widen32(_mm256_maskz_loadu_epi8(mask, codes + x));
    v.a = scale_row(_mm512_sub_epi32(_mm512_slli_epi32(v.a, 7), mean), multiplier, half, shift);
    v.b = scale_row(_mm512_sub_epi32(_mm512_slli_epi32(v.b, 7), mean), multiplier, half, shift);
    if (!q) {
      store32((int32_t *)out + row.out + x, mask, v);
      continue;
    }
    __m512i u = scale32(branch_at(&q->branch[0], x), v);
    if (q->branches == 2)
      u = _mm512_adds_epi16(u, scale32(branch_at(&q->branch[1], x), branch_values(q->branch[1], in[1], row.in[1] + x, mask)));
    _mm256_mask_storeu_epi8((uint8_t *)out + row.out + x, mask, codes32(finish_at(q, x), u));
  }
  if (q && q->table) apply_table(q->table, (uint8_t *)out + row.out, 1, 0, n);
}

void run_layer_norm(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *) {
  const fxc_layer_norm &p = *(const fxc_layer_norm *)params;
  fxc_row row = fxc_row_at(&p.loops, begin);
  for (int32_t unit = begin; unit < end; fxc_next_row(&p.loops, &row, ++unit)) normalize(p, in, row, out);
}

int accepts(const void *params) {
  const fxc_layer_norm &p = *(const fxc_layer_norm *)params;
  const int32_t branches = p.requantize ? p.requantize->branches : 1;
  const bool flat = p.loops.size[FXC_INNERMOST] > 1;
  for (int32_t i = 0; i < branches && flat; ++i)
    if (p.loops.in_stride[i][FXC_INNERMOST] != 1) return 0;
  return branches <= 2 && fxc_rows_contiguous(&p.loops);
}

int32_t units(const void *params) { return fxc_row_count((const fxc_loops *)params); }

}  // namespace

#pragma GCC pop_options

extern "C" {
extern const fxc_kernel fxc_u8_layer_norm__avx512 = {"fxc_u8_layer_norm__avx512", "layer_norm", "avx512vnni", accepts, nullptr, nullptr,
                                                     units, nullptr, run_layer_norm};
}

#endif
