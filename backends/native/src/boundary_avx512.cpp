// Quantization of float inputs in AVX-512; see boundary.h for the meaning.
//
// Two layouts: rows contiguous on both sides, and images whose 1..4 channel planes become interleaved pixels (channels last).
// Preconditions: uint8 codes. No over-reads; writes under masks.

#if defined(__x86_64__)

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq")

#include <immintrin.h>

#include "boundary.h"
#include "loops.h"

/* gcc 12 warns of the undefined vectors inside its own intrinsics (gcc bug 105593). */
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace boundary {  // a name that tells these functions from the integer kernels in the symbol table
namespace {

enum { kMaxPlanes = 4 };

struct Codes {
  __m512 lo, hi;  // bounds before the zero point is added
  __m512 inverse_scale;
  __m512i zero_point;
};

Codes codes_of(const fxc_quantize *p, int32_t c) {
  return {_mm512_set1_ps((float)(p->lo - p->zero_point[c])), _mm512_set1_ps((float)(p->hi - p->zero_point[c])),
          _mm512_set1_ps(p->inverse_scale[c]), _mm512_set1_epi32(p->zero_point[c])};
}

// 16 codes; NaNs are counted and become the lower bound.
__m128i quantize(const Codes &q, __m512 x, __mmask16 mask, int32_t *nans) {
  *nans += __builtin_popcount(_mm512_mask_cmp_ps_mask(mask, x, x, _CMP_UNORD_Q));
  const __m512 scaled = _mm512_mul_ps(x, q.inverse_scale);
  const __m512 bounded = _mm512_min_ps(_mm512_max_ps(scaled, q.lo), q.hi);  // max(NaN, lo) is lo
  return _mm512_cvtepi32_epi8(_mm512_add_epi32(_mm512_cvtps_epi32(bounded), q.zero_point));
}

__mmask16 lanes(int32_t count) { return (__mmask16)(count < 16 ? (1u << count) - 1 : 0xffff); }

int32_t quantize_row(const fxc_quantize *p, const fxc_row &row, const float *x, uint8_t *y) {
  const Codes q = codes_of(p, row.channel);
  int32_t nans = 0;
  for (int32_t i = 0; i < p->loops.size[FXC_INNERMOST]; i += 16) {
    const __mmask16 mask = lanes(p->loops.size[FXC_INNERMOST] - i);
    _mm_mask_storeu_epi8(y + i, mask, quantize(q, _mm512_maskz_loadu_ps(mask, x + i), mask, &nans));
  }
  return nans;
}

// `count` pixels whose channels lie in planes `step` floats apart, to pixels of `channels` codes.
int32_t quantize_pixels(const fxc_quantize *p, const float *x, ptrdiff_t step, uint8_t *y, int32_t count) {
  const int32_t channels = p->loops.size[FXC_INNERMOST];
  const bool per_channel = p->loops.channel_dim == FXC_INNERMOST;
  Codes q[kMaxPlanes];
  for (int32_t c = 0; c < channels; ++c) q[c] = codes_of(p, per_channel ? c : 0);
  int32_t nans = 0;
  alignas(16) uint8_t planes[kMaxPlanes][16];
  for (int32_t i = 0; i < count; i += 16) {
    const __mmask16 mask = lanes(count - i);
    for (int32_t c = 0; c < channels; ++c)
      _mm_store_si128((__m128i *)planes[c], quantize(q[c], _mm512_maskz_loadu_ps(mask, x + c * step + i), mask, &nans));
    const int32_t n = count - i < 16 ? count - i : 16;
    if (channels == 3) {  // the common case, with a constant trip count
      for (int32_t j = 0; j < n; ++j, y += 3) y[0] = planes[0][j], y[1] = planes[1][j], y[2] = planes[2][j];
    } else {
      for (int32_t j = 0; j < n; ++j)
        for (int32_t c = 0; c < channels; ++c) *y++ = planes[c][j];
    }
  }
  return nans;
}

bool is_planar(const fxc_loops &loops) {
  const int32_t channels = loops.size[FXC_INNERMOST];
  return channels <= kMaxPlanes && loops.out_stride[FXC_INNERMOST] == 1 && loops.in_stride[0][FXC_INNERMOST - 1] == 1 &&
         loops.out_stride[FXC_INNERMOST - 1] == channels && loops.size[FXC_INNERMOST - 1] > 1 &&
         (loops.channel_dim == FXC_INNERMOST || loops.channel_dim == 0);
}

bool is_contiguous(const fxc_loops &loops) {
  return loops.in_stride[0][FXC_INNERMOST] == 1 && loops.out_stride[FXC_INNERMOST] == 1 && loops.channel_dim != FXC_INNERMOST;
}

void run(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *) {
  const fxc_quantize *p = (const fxc_quantize *)params;
  const int32_t pixels = p->loops.size[FXC_INNERMOST - 1];
  const bool contiguous = is_contiguous(p->loops);
  int32_t nans = 0;
  for (int32_t unit = begin; unit < end;) {
    const fxc_row row = fxc_row_at(&p->loops, unit);
    const float *x = (const float *)in[0] + row.in[0];
    uint8_t *y = (uint8_t *)out + row.out;
    if (contiguous) {
      nans += quantize_row(p, row, x, y);
      ++unit;
    } else {
      const int32_t left = pixels - unit % pixels, count = left < end - unit ? left : end - unit;
      nans += quantize_pixels(p, x, p->loops.in_stride[0][FXC_INNERMOST], y, count);
      unit += count;
    }
  }
  if (nans) __atomic_fetch_add((int32_t *)(uintptr_t)in[1], nans, __ATOMIC_RELAXED);
}

int accepts(const void *params) {
  const fxc_quantize *p = (const fxc_quantize *)params;
  return p->lo >= 0 && (is_contiguous(p->loops) || is_planar(p->loops));
}

int32_t units(const void *params) { return fxc_row_count((const fxc_loops *)params); }

}  // namespace
}  // namespace boundary

#pragma GCC pop_options

extern "C" {
extern const fxc_kernel fxc_quantize__avx512;
const fxc_kernel fxc_quantize__avx512 = {"fxc_f32_quantize__avx512", "quantize", "avx512vnni", boundary::accepts, nullptr, nullptr, boundary::units,
                                         nullptr, boundary::run};
}

#endif
