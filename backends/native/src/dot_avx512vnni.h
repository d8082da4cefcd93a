/* The step of the AVX-512 VNNI products: four uint8 codes of a row, broadcast, times 16 columns of four int8 weights.

   Include it after the target pragma. */

#ifndef FXC_DOT_AVX512VNNI_H
#define FXC_DOT_AVX512VNNI_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace {

/* acc += x * w over groups of 4. Inline assembly because gcc 12 spills the accumulators of the intrinsic. */
inline __attribute__((always_inline)) void dot(__m512i &acc, __m512i x, __m512i w) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(x), "v"(w));
}

inline __attribute__((always_inline)) __m512i broadcast4(const uint8_t *x) {
  int32_t value;
  memcpy(&value, x, 4);
  return _mm512_set1_epi32(value);
}

}  // namespace

#endif
