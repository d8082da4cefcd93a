/* Convolution with AVX2. See conv_tile_avx2.h.

   vpmaddubsw saturates its sums of two products at 16 bits (255 * 127 * 2 does not fit), so codes and weights are widened to 16
   bits and multiplied with vpmaddwd, whose sums of two fit 32 bits. */

#if defined(__x86_64__)

#pragma GCC push_options
#pragma GCC target("avx2")

#include <immintrin.h>
#include <stdint.h>

namespace {

typedef uint16_t element;
typedef int16_t weight_element;
constexpr int32_t PART = 2;

inline __attribute__((always_inline)) void dot(__m256i &acc, __m256i x, __m256i w) {
  acc = _mm256_add_epi32(acc, _mm256_madd_epi16(x, w));
}

}  // namespace

#include "conv_tile_avx2.h"

extern "C" {
extern const fxc_kernel fxc_u8_conv_6x16__avx2;
const fxc_kernel fxc_u8_conv_6x16__avx2 = {
    "fxc_u8_conv_6x16__avx2", "conv", "avx2", NULL, packed_bytes, pack, units, scratch_bytes, run,
};
}

#pragma GCC pop_options

#endif
