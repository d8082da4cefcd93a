// Pools and interpolation in AVX-512: 64 channels of one output pixel at a time. Parameters and meaning: fxc_kernels.h.
//
// Preconditions: none beyond those of the parameters. Over-reads: activations up to 64 bytes past the last channel, per-channel
// arrays up to the next multiple of 64 entries.

#if defined(__x86_64__)

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq")

#include <immintrin.h>

#include "kernel_row.h"
#include "requantize_avx512.h"

namespace {

// n, d, h, w of an output pixel.
struct Position {
  int32_t n, at[3];
};

Position locate(int32_t pixel, const int32_t size[3]) {
  Position p;
  for (int dim = 2; dim >= 0; --dim) p.at[dim] = pixel % size[dim], pixel /= size[dim];
  p.n = pixel;
  return p;
}

// Calls visit(pointer to the first channel) for every element of a pixel's window; returns how many there were.
template <typename Visit>
inline int32_t for_window(const fxc_pool &p, const uint8_t *image, const Position &pos, Visit visit) {
  int32_t count = 0;
  for (int32_t d = p.start[0][pos.at[0]]; d < p.end[0][pos.at[0]]; d += p.dilation[0])
    for (int32_t h = p.start[1][pos.at[1]]; h < p.end[1][pos.at[1]]; h += p.dilation[1])
      for (int32_t w = p.start[2][pos.at[2]]; w < p.end[2][pos.at[2]]; w += p.dilation[2], ++count)
        visit(image + (ptrdiff_t)d * p.in_stride[0] + (ptrdiff_t)h * p.in_stride[1] + (ptrdiff_t)w * p.in_stride[2]);
  return count;
}

void max_pixel(const fxc_pool &p, const uint8_t *image, const Position &pos, uint8_t *out) {
  for (int32_t c = 0; c < p.channels; c += 64) {
    __m512i largest = _mm512_setzero_si512();
    for_window(p, image, pos, [&](const uint8_t *x) { largest = _mm512_max_epu8(largest, _mm512_loadu_si512(x + c)); });
    _mm512_mask_storeu_epi8(out + c, channel_mask(p.channels - c), largest);
  }
}

// Sums of 64 channels in channel order, zero points taken off.
void sum_block(const fxc_pool &p, const uint8_t *image, const Position &pos, int32_t c, int32_t *sums) {
  __m512i acc[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
  const int32_t count = for_window(p, image, pos, [&](const uint8_t *x) {
    for (int i = 0; i < 4; ++i)
      acc[i] = _mm512_add_epi32(acc[i], _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(x + c + 16 * i))));
  });
  for (int i = 0; i < 4; ++i) {
    const __m512i zero = _mm512_mullo_epi32(_mm512_loadu_si512(p.zero_point + c + 16 * i), _mm512_set1_epi32(count));
    _mm512_storeu_si512(sums + 16 * i, _mm512_sub_epi32(acc[i], zero));
  }
}

// The row's offset of branch 0, which convolutions have in their bias.
void add_offset(const fxc_requantize *q, int32_t c, int32_t *sums) {
  for (int i = 0; q && i < 64; i += 16)
    _mm512_storeu_si512(sums + i, _mm512_add_epi32(_mm512_loadu_si512(sums + i), _mm512_loadu_si512(q->branch[0].offset + c + i)));
}

void run_pool(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *) {
  const fxc_pool &p = *(const fxc_pool *)params;
  alignas(64) int32_t sums[64];
  for (int32_t pixel = begin; pixel < end; ++pixel) {
    const Position pos = locate(pixel, p.out_size);
    const uint8_t *image = (const uint8_t *)in[0] + (ptrdiff_t)pos.n * p.in_image_stride;
    if (p.maximum) {
      max_pixel(p, image, pos, (uint8_t *)out + (ptrdiff_t)pixel * p.out_pixel_stride);
      continue;
    }
    for (int32_t c = 0; c < p.channels; c += 64) {
      const int32_t count = p.channels - c < 64 ? p.channels - c : 64;
      sum_block(p, image, pos, c, sums);
      add_offset(p.requantize, c, sums);
      requantize_row(p.requantize, sums, c, count, in, p.branch_pixel_stride, pixel, out, p.out_pixel_stride);
    }
  }
}

int accepts_pool(const void *params) {
  const fxc_pool &p = *(const fxc_pool *)params;
  return !p.maximum || !p.requantize;
}

int32_t pool_units(const void *params) {
  const fxc_pool &p = *(const fxc_pool *)params;
  return p.batch * p.out_size[0] * p.out_size[1] * p.out_size[2];
}

// ------------------------------------------------------------------------------------------------------- resize

// 16 channels of the interpolation from dimension `dim` inwards.
template <int dim>
inline __m512i interpolate(const fxc_resize &p, const uint8_t *x, const Position &pos, __m512i zero) {
  if constexpr (dim == 3) {
    return _mm512_sub_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)x)), zero);
  } else {
    const int32_t at = pos.at[dim];
    if (dim < 3 - p.dims) return interpolate<dim + 1>(p, x + (ptrdiff_t)at * p.in_stride[dim], pos, zero);
    const __m512i near = interpolate<dim + 1>(p, x + (ptrdiff_t)p.index0[dim][at] * p.in_stride[dim], pos, zero);
    const __m512i far = interpolate<dim + 1>(p, x + (ptrdiff_t)p.index1[dim][at] * p.in_stride[dim], pos, zero);
    const int32_t weight = p.weight1[dim][at];
    return _mm512_add_epi32(_mm512_mullo_epi32(near, _mm512_set1_epi32((1 << p.fraction_bits) - weight)),
                            _mm512_mullo_epi32(far, _mm512_set1_epi32(weight)));
  }
}

void run_resize(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *) {
  const fxc_resize &p = *(const fxc_resize *)params;
  alignas(64) int32_t sums[16];
  for (int32_t pixel = begin; pixel < end; ++pixel) {
    const Position pos = locate(pixel, p.out_size);
    const uint8_t *image = (const uint8_t *)in[0] + (ptrdiff_t)pos.n * p.in_image_stride;
    for (int32_t c = 0; c < p.channels; c += 16) {
      __m512i acc = interpolate<0>(p, image + c, pos, _mm512_loadu_si512(p.zero_point + c));
      if (p.requantize) acc = _mm512_add_epi32(acc, _mm512_loadu_si512(p.requantize->branch[0].offset + c));
      _mm512_store_si512(sums, acc);
      const int32_t count = p.channels - c < 16 ? p.channels - c : 16;
      requantize_row(p.requantize, sums, c, count, in, p.branch_pixel_stride, pixel, out, p.out_pixel_stride);
    }
  }
}

int32_t resize_units(const void *params) {
  const fxc_resize &p = *(const fxc_resize *)params;
  return p.batch * p.out_size[0] * p.out_size[1] * p.out_size[2];
}

}  // namespace

#pragma GCC pop_options

extern "C" {
extern const fxc_kernel fxc_u8_pool__avx512 = {"fxc_u8_pool__avx512", "pool", "avx512vnni", accepts_pool, nullptr, nullptr,
                                               pool_units, nullptr, run_pool};
extern const fxc_kernel fxc_u8_resize__avx512 = {"fxc_u8_resize__avx512", "resize", "avx512vnni", nullptr, nullptr, nullptr,
                                                 resize_units, nullptr, run_resize};
}

#endif
