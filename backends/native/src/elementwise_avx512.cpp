// Elementwise kernels in 16 lanes of AVX-512: requantization, products, tables. Parameters and meaning: fxc_kernels.h.
//
// Preconditions: rows contiguous or broadcast (fxc_rows_contiguous). Per-channel arrays run along the row, or are one entry
// per row. Over-reads: per-channel arrays up to the next multiple of 16 entries. Tensors are read and written under masks.

#if defined(__x86_64__)

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq")

#include <immintrin.h>

#include "kernel_row.h"
#include "loops.h"
#include "requantize_avx512.h"
#include "rows_avx512.h"

namespace {

// Channel entries of 16 elements: consecutive, or one for all.
struct Channels {
  int32_t first, step;
  int32_t at(int32_t x) const { return first + step * x; }
};

Channels channels_of(const fxc_loops *loops, const fxc_row &row) {
  return loops->channel_dim == FXC_INNERMOST ? Channels{0, 1} : Channels{row.channel, 0};
}

__m512i entries(const int32_t *array, Channels c, int32_t x) {
  return c.step ? _mm512_loadu_si512(array + c.at(x)) : _mm512_set1_epi32(array[c.first]);
}

__m512i entries(const int16_t *array, Channels c, int32_t x) {
  return c.step ? _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i *)(array + c.at(x)))) : _mm512_set1_epi32(array[c.first]);
}

__m512i entries(const uint8_t *array, Channels c, int32_t x) {
  return c.step ? _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(array + c.at(x)))) : _mm512_set1_epi32(array[c.first]);
}

__mmask16 lanes(int32_t count) { return (__mmask16)(count < 16 ? (1u << count) - 1 : 0xffff); }

// Elements x..x+15 of a row of codes (or int32): the row may be one broadcast element.
__m512i codes_at(const void *tensor, ptrdiff_t row, int32_t stride, int32_t x, __mmask16 mask) {
  const uint8_t *codes = (const uint8_t *)tensor + row;
  return stride ? _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, codes + x)) : _mm512_set1_epi32(*codes);
}

__m512i wide_at(const void *tensor, ptrdiff_t row, int32_t stride, int32_t x, __mmask16 mask) {
  const int32_t *values = (const int32_t *)tensor + row;
  return stride ? _mm512_maskz_loadu_epi32(mask, values + x) : _mm512_set1_epi32(*values);
}

// u of one branch: value plus offset, in 32-bit lanes.
__m512i scale(const fxc_branch *b, Channels c, int32_t x, __m512i value) {
  __m512i v = _mm512_add_epi32(value, entries(b->offset, c, x));
  v = _mm512_srav_epi32(_mm512_sll_epi32(v, _mm_cvtsi32_si128(b->left_shift)), entries(b->right_shift, c, x));
  v = _mm512_mullo_epi32(saturate16_epi32(v), entries(b->multiplier, c, x));
  return _mm512_srai_epi32(_mm512_add_epi32(v, _mm512_set1_epi32(1 << 14)), 15);
}

__m128i finish(const fxc_requantize *q, Channels c, int32_t x, __m512i total) {
  __m512i y = saturate16_epi32(_mm512_add_epi32(saturate16_epi32(total), entries(q->zero, c, x)));
  y = _mm512_sra_epi32(y, _mm_cvtsi32_si128(q->guard_bits));
  y = _mm512_max_epi32(y, entries(q->lo, c, x));
  return _mm512_cvtepi32_epi8(_mm512_min_epi32(y, entries(q->hi, c, x)));
}

// Branches first.. of a requantization, read from in[i + shift], added to `total`.
__m512i add_branches(const fxc_requantize *q, const fxc_loops *loops, const fxc_row &row, const void *const *in, int first, int shift,
                     Channels c, int32_t x, __mmask16 mask, __m512i total) {
  for (int i = first; i < q->branches; ++i) {
    const int32_t stride = loops->in_stride[i + shift][FXC_INNERMOST];
    const __m512i value = q->branch[i].wide ? wide_at(in[i + shift], row.in[i + shift], stride, x, mask)
                                            : codes_at(in[i + shift], row.in[i + shift], stride, x, mask);
    total = _mm512_add_epi32(total, scale(&q->branch[i], c, x, value));
  }
  return total;
}

// Elements x..x+31 of a row: codes or int32, or one broadcast element.
wide32 values_at(const fxc_branch &b, const void *tensor, ptrdiff_t row, int32_t stride, int32_t x, __mmask32 mask) {
  if (!stride) return same32(b.wide ? ((const int32_t *)tensor)[row] : ((const uint8_t *)tensor)[row]);
  if (!b.wide) return widen32(_mm256_maskz_loadu_epi8(mask, (const uint8_t *)tensor + row + x));
  return {wide_at(tensor, row, 1, x, (__mmask16)mask), wide_at(tensor, row, 1, x + 16, (__mmask16)(mask >> 16))};
}

// u of branch i for elements x..x+31.
__m512i branch_sum(const fxc_requantize_map &p, const void *const *in, const fxc_row &row, Channels c, int i, int32_t x, __mmask32 mask) {
  const fxc_branch &b = p.requantize->branch[i];
  const branch32 constants = c.step ? branch_at(&b, x) : branch_everywhere(&b, c.first);
  return scale32(constants, values_at(b, in[i], row.in[i], p.loops.in_stride[i][FXC_INNERMOST], x, mask));
}

// A row in 16-bit lanes: one or two branches.
void requantize_row16(const fxc_requantize_map &p, const void *const *in, const fxc_row &row, Channels c, uint8_t *y) {
  const fxc_requantize *q = p.requantize;
  const int32_t width = p.loops.size[FXC_INNERMOST];
  for (int32_t x = 0; x < width; x += 32) {
    const __mmask32 mask = first32(width - x);
    __m512i u = branch_sum(p, in, row, c, 0, x, mask);
    if (q->branches == 2) u = _mm512_adds_epi16(u, branch_sum(p, in, row, c, 1, x, mask));
    _mm256_mask_storeu_epi8(y + x, mask, codes32(c.step ? finish_at(q, x) : finish_everywhere(q, c.first), u));
  }
}

// A row in 32-bit lanes: any number of branches.
void requantize_row32(const fxc_requantize_map &p, const void *const *in, const fxc_row &row, Channels c, uint8_t *y) {
  const int32_t width = p.loops.size[FXC_INNERMOST];
  for (int32_t x = 0; x < width; x += 16) {
    const __mmask16 mask = lanes(width - x);
    const __m512i total = add_branches(p.requantize, &p.loops, row, in, 0, 0, c, x, mask, _mm512_setzero_si512());
    _mm_mask_storeu_epi8(y + x, mask, finish(p.requantize, c, x, total));
  }
}

void run_requantize(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *) {
  const fxc_requantize_map &p = *(const fxc_requantize_map *)params;
  fxc_row row = fxc_row_at(&p.loops, begin);
  for (int32_t unit = begin; unit < end; fxc_next_row(&p.loops, &row, ++unit)) {
    uint8_t *y = (uint8_t *)out + row.out;
    if (p.requantize->branches <= 2)
      requantize_row16(p, in, row, channels_of(&p.loops, row), y);
    else
      requantize_row32(p, in, row, channels_of(&p.loops, row), y);
    if (p.requantize->table) apply_table(p.requantize->table, y, 1, 0, p.loops.size[FXC_INNERMOST]);
  }
}

void run_mul(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *) {
  const fxc_mul *p = (const fxc_mul *)params;
  const fxc_requantize *q = p->requantize;
  const int32_t width = p->loops.size[FXC_INNERMOST];
  const int32_t *stride_a = p->loops.in_stride[0], *stride_b = p->loops.in_stride[1];
  for (int32_t unit = begin; unit < end; ++unit) {
    const fxc_row row = fxc_row_at(&p->loops, unit);
    const Channels c = channels_of(&p->loops, row);
    for (int32_t x = 0; x < width; x += 16) {
      const __mmask16 mask = lanes(width - x);
      const __m512i a = _mm512_sub_epi32(codes_at(in[0], row.in[0], stride_a[FXC_INNERMOST], x, mask), entries(p->zero_point[0], c, x));
      const __m512i b = _mm512_sub_epi32(codes_at(in[1], row.in[1], stride_b[FXC_INNERMOST], x, mask), entries(p->zero_point[1], c, x));
      const __m512i product = _mm512_mullo_epi32(a, b);
      if (!q) {
        _mm512_mask_storeu_epi32((int32_t *)out + row.out + x, mask, product);
        continue;
      }
      const __m512i total = add_branches(q, &p->loops, row, in, 1, 1, c, x, mask, scale(&q->branch[0], c, x, product));
      _mm_mask_storeu_epi8((uint8_t *)out + row.out + x, mask, finish(q, c, x, total));
    }
    if (q && q->table) apply_table(q->table, (uint8_t *)out + row.out, 1, 0, width);
  }
}

void run_table(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *) {
  const fxc_table *p = (const fxc_table *)params;
  const int32_t width = p->loops.size[FXC_INNERMOST];
  for (int32_t unit = begin; unit < end; ++unit) {
    const fxc_row row = fxc_row_at(&p->loops, unit);
    memcpy((uint8_t *)out + row.out, (const uint8_t *)in[0] + row.in[0], (size_t)width);
    apply_table((const uint8_t *)p->table, (uint8_t *)out + row.out, 1, 0, width);
  }
}

// Every parameter struct here begins with its loop nest.
int accepts_rows(const void *params) { return fxc_rows_contiguous((const fxc_loops *)params); }

int accepts_table(const void *params) {
  const fxc_table *p = (const fxc_table *)params;
  return accepts_rows(params) && p->loops.in_stride[0][FXC_INNERMOST] == 1 && !p->per_channel && !p->wide;
}

int32_t row_units(const void *params) { return fxc_row_count((const fxc_loops *)params); }

}  // namespace

#pragma GCC pop_options

extern "C" {
extern const fxc_kernel fxc_s32_requantize__avx512 = {
    "fxc_s32_requantize__avx512", "requantize", "avx512vnni", accepts_rows, nullptr, nullptr, row_units, nullptr, run_requantize};
extern const fxc_kernel fxc_u8_mul__avx512 = {"fxc_u8_mul__avx512", "mul", "avx512vnni", accepts_rows, nullptr, nullptr,
                                              row_units, nullptr, run_mul};
extern const fxc_kernel fxc_u8_table__avx512 = {"fxc_u8_table__avx512", "table", "avx512vnni", accepts_table, nullptr, nullptr,
                                                row_units, nullptr, run_table};
}

#endif
