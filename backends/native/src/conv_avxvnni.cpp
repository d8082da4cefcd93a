/* Convolution with AVX-VNNI (256-bit vpdpbusd without AVX-512). See conv_tile_avx2.h. */

#if defined(__x86_64__)

#pragma GCC push_options
#pragma GCC target("avx2,avxvnni")

#include <immintrin.h>
#include <stdint.h>

namespace {

typedef uint8_t element;
typedef int8_t weight_element;
constexpr int32_t PART = 4;

/* Inline assembly because gcc 12 spills the accumulators of the intrinsic. */
inline __attribute__((always_inline)) void dot(__m256i &acc, __m256i x, __m256i w) {
  __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(x), "x"(w));
}

}  // namespace

#include "conv_tile_avx2.h"

extern "C" {
extern const fxc_kernel fxc_u8_conv_6x16__avxvnni;
const fxc_kernel fxc_u8_conv_6x16__avxvnni = {
    "fxc_u8_conv_6x16__avxvnni", "conv", "avxvnni", NULL, packed_bytes, pack, units, scratch_bytes, run,
};
}

#pragma GCC pop_options

#endif
