/* Convolution with 256-bit vectors, shared by conv_avx2.cpp and conv_avxvnni.cpp: conv_rows.h with a register tile of 6 pixels x 16
   channels = 12 accumulators. The includer defines, after its target pragma: element, weight_element, PART, and
   dot(acc, x, w): acc += the sum of PART products in each 32-bit lane. */

#include "requantize_avx2.h"

namespace {

constexpr int32_t TILE = 6, CODE_OFFSET = 0;

/* Copies count codes as elements; reads and writes up to 31 more. */
inline void copy_codes(element *target, const uint8_t *from, int32_t count) {
  for (int32_t i = 0; i < count; i += 32 / (int32_t)sizeof(element)) {
    if (sizeof(element) == 1)
      _mm256_storeu_si256((__m256i *)(target + i), load256(from + i));
    else
      _mm256_storeu_si256((__m256i *)(target + i), _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(from + i))));
  }
}

}  // namespace

#include "conv_rows.h"

namespace {

inline __attribute__((always_inline)) __m256i broadcast_lane(const element *x) {
  int32_t lane;
  memcpy(&lane, x, 4);
  return _mm256_set1_epi32(lane);
}

/* Accumulators of P pixels, gathered in rows at x, to `target` (P, 16 in the order of a pair). Through memory on purpose: gcc 12
   spills them inside the loop if later code wants them as structs. */
template <int P>
__attribute__((noinline)) void accumulate(const geometry &g, const block &b, const element *x, int32_t *target) {
  __m256i acc_a[P], acc_b[P];
#pragma GCC unroll 6
  for (int i = 0; i < P; ++i) acc_a[i] = load256(b.bias), acc_b[i] = load256(b.bias + 8);
  const weight_element *weight = b.weight;
  const ptrdiff_t row = g.row;
  for (int32_t k = 0; k < g.parts; ++k, x += PART, weight += GROUP * PART) {
    const __m256i wa = load256(weight), wb = load256(weight + GROUP * PART / 2);
#pragma GCC unroll 6
    for (int i = 0; i < P; ++i) {
      const __m256i v = broadcast_lane(x + i * row);
      dot(acc_a[i], v, wa);
      dot(acc_b[i], v, wb);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < P; ++i) {
    _mm256_store_si256((__m256i *)(target + GROUP * i), acc_a[i]);
    _mm256_store_si256((__m256i *)(target + GROUP * i + 8), acc_b[i]);
  }
}

typedef void (*accumulate_function)(const geometry &, const block &, const element *, int32_t *);

const accumulate_function ACCUMULATE[TILE + 1] = {NULL,          accumulate<1>, accumulate<2>, accumulate<3>,
                                                  accumulate<4>, accumulate<5>, accumulate<6>};

/* `count` <= TILE pixels from `pixel` on. */
void run_tile(const geometry &g, const block &b, const element *x, const destination &d, int32_t pixel, int32_t count) {
  alignas(32) int32_t acc[TILE * GROUP];
  ACCUMULATE[count](g, b, x, acc);
  for (int32_t i = 0; i < count; i += 2) {
    const int32_t *row = acc + GROUP * i, *next = i + 1 < count ? row + GROUP : row;
    finish_pixels(d, *b.constants, b.first, b.count, pixel + i, count - i < 2 ? 1 : 2, {load256(row), load256(row + 8)},
                  {load256(next), load256(next + 8)});
  }
}

}  // namespace
