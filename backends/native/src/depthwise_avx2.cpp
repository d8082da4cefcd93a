/* Depthwise convolution with AVX2: groups == in_channels == out_channels; any kernel, stride, dilation, padding.

   acc[c] = bias[c] + sum over taps of weight[c] * x[c]; then the requantization of numerics.py (requantize_avx2.h) or int32.
   16 channels at a time: the codes of two taps are widened to 16 bits and interleaved, so that vpmaddwd sums them in 32 bits, in
   the order of requantize_avx2.h. An odd last tap is paired with itself and weight 0. Taps in the border read pad values.

   Unit: one output pixel. Packed, per 16 channels: bias (in that order), group_constants, weights (pair of taps, a and b, 8
   channels, 2 taps) int16. Reads up to 64 bytes past an input and a branch; pad values up to the next multiple of 64. */

#if defined(__x86_64__)

#pragma GCC push_options
#pragma GCC target("avx2")

#include "kernel_row.h"
#include "requantize_avx2.h"

namespace {

int32_t taps_of(const fxc_conv *p) { return p->kernel[0] * p->kernel[1] * p->kernel[2]; }

int32_t tap_pairs(const fxc_conv *p) { return (taps_of(p) + 1) / 2; }

int64_t block_bytes(const fxc_conv *p) { return (64 + (int64_t)sizeof(group_constants) + 64 * tap_pairs(p) + 63) / 64 * 64; }

int32_t blocks_of(const fxc_conv *p) { return (p->out_channels + GROUP - 1) / GROUP; }

int accepts(const void *params) {
  const fxc_conv *p = (const fxc_conv *)params;
  return p->groups == p->in_channels && p->groups == p->out_channels;
}

size_t packed_bytes(const void *params) {
  const fxc_conv *p = (const fxc_conv *)params;
  return (size_t)(blocks_of(p) * block_bytes(p));
}

struct block {
  const int32_t *bias;
  const group_constants *constants;
  const int16_t *weight;
  int32_t first, count; /* channels */
};

block block_at(const fxc_conv *p, const uint8_t *packed, int32_t index) {
  const uint8_t *start = packed + index * block_bytes(p);
  const group_constants *constants = (const group_constants *)(start + 64);
  const int32_t left = p->out_channels - index * GROUP;
  return {(const int32_t *)start, constants, (const int16_t *)(constants + 1), index * GROUP, left < GROUP ? left : GROUP};
}

void pack(const void *params, void *packed) {
  const fxc_conv *p = (const fxc_conv *)params;
  const int32_t taps = taps_of(p);
  memset(packed, 0, packed_bytes(params));
  for (int32_t i = 0; i < blocks_of(p); ++i) {
    const block b = block_at(p, (const uint8_t *)packed, i);
    pack_group((group_constants *)b.constants, p->requantize, b.first, b.count);
    for (int32_t c = 0; c < b.count; ++c) {
      ((int32_t *)b.bias)[place_of(c)] = p->bias[b.first + c];
      for (int32_t t = 0; t < taps; ++t)
        ((int16_t *)b.weight)[32 * (t / 2) + 2 * place_of(c) + t % 2] = p->weight[(int64_t)(b.first + c) * taps + t];
    }
  }
}

int32_t units(const void *params) {
  const fxc_conv *p = (const fxc_conv *)params;
  return p->batch * p->out_size[0] * p->out_size[1] * p->out_size[2];
}

/* Two pixels' pointers, a pair of taps each. */
size_t scratch_bytes(const void *params) { return (size_t)(2 * 2 * tap_pairs((const fxc_conv *)params)) * sizeof(uint8_t *); }

/* Pointers of the taps of one output pixel. */
void find_taps(const fxc_conv *p, const uint8_t *x, int32_t pixel, const uint8_t **tap) {
  int32_t at[4], rest = pixel, count = 0;
  for (int i = 3; i > 0; --i) at[i] = rest % p->out_size[i - 1], rest /= p->out_size[i - 1];
  x += (ptrdiff_t)rest * p->in_image_stride;
  for (int32_t a = 0; a < p->kernel[0]; ++a)
    for (int32_t b = 0; b < p->kernel[1]; ++b)
      for (int32_t c = 0; c < p->kernel[2]; ++c) {
        const int32_t d = at[1] * p->stride[0] - p->pad_before[0] + a * p->dilation[0];
        const int32_t h = at[2] * p->stride[1] - p->pad_before[1] + b * p->dilation[1];
        const int32_t w = at[3] * p->stride[2] - p->pad_before[2] + c * p->dilation[2];
        const bool inside = d >= 0 && d < p->in_size[0] && h >= 0 && h < p->in_size[1] && w >= 0 && w < p->in_size[2];
        const ptrdiff_t offset = (ptrdiff_t)d * p->in_plane_stride + (ptrdiff_t)h * p->in_row_stride + (ptrdiff_t)w * p->in_pixel_stride;
        tap[count++] = inside ? x + offset : p->pad_value;
      }
  if (count % 2 != 0) tap[count] = tap[count - 1];
}

inline __m256i widen(const uint8_t *x) { return _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)x)); }

/* Accumulators of one pixel and block. */
inline pair accumulate(const block &b, const uint8_t *const *tap, int32_t pairs) {
  __m256i acc_a = load256(b.bias), acc_b = load256(b.bias + 8);
  for (int32_t i = 0; i < pairs; ++i) {
    const __m256i x = widen(tap[2 * i] + b.first), y = widen(tap[2 * i + 1] + b.first);
    acc_a = _mm256_add_epi32(acc_a, _mm256_madd_epi16(_mm256_unpacklo_epi16(x, y), load256(b.weight + 32 * i)));
    acc_b = _mm256_add_epi32(acc_b, _mm256_madd_epi16(_mm256_unpackhi_epi16(x, y), load256(b.weight + 32 * i + 16)));
  }
  return {acc_a, acc_b};
}

void run(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *scratch) {
  const fxc_conv *p = (const fxc_conv *)params;
  const destination d = {p->requantize, in, p->branch_pixel_stride, out, p->out_pixel_stride};
  const int32_t pairs = tap_pairs(p), blocks = blocks_of(p);
  const uint8_t **tap = (const uint8_t **)scratch, **next = tap + 2 * pairs;
  for (int32_t pixel = begin; pixel < end; pixel += 2) {
    const int32_t count = end - pixel < 2 ? 1 : 2;
    find_taps(p, (const uint8_t *)in[0], pixel, tap);
    if (count == 2) find_taps(p, (const uint8_t *)in[0], pixel + 1, next);
    for (int32_t i = 0; i < blocks; ++i) {
      const block b = block_at(p, (const uint8_t *)p->weight, i);
      const pair acc = accumulate(b, tap, pairs);
      finish_pixels(d, *b.constants, b.first, b.count, pixel, count, acc, count == 2 ? accumulate(b, next, pairs) : acc);
    }
  }
}

}  // namespace

extern "C" {
extern const fxc_kernel fxc_u8_depthwise_2x16__avx2;
const fxc_kernel fxc_u8_depthwise_2x16__avx2 = {
    "fxc_u8_depthwise_2x16__avx2", "conv", "avx2", accepts, packed_bytes, pack, units, scratch_bytes, run,
};
}

#pragma GCC pop_options

#endif
