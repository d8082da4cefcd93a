/* Layers and products of two activations in blocks with AVX-512 VNNI (fxc_bilinear_linear, fxc_bilinear_matmul): sums of blocks are 16-bit numbers, two per vpdpwssd lane; half the
   products per instruction of the 8-bit layers. See bilinear_run.h for the order of the work.

   Register tile: 6 groups x 16 W columns. Over-reads: bias up to the next multiple of 16. */

#if defined(__x86_64__)

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")

#include <immintrin.h>

#include "kernel_row.h"
#include "requantize_row_avx512.h"

namespace {

constexpr int32_t ROWS = 6, COLUMNS = 64;

inline int32_t place(int32_t column) { return column; }

}  // namespace

#include "bilinear_blocks.h"

namespace {

/* acc += x * w over pairs. Inline assembly as in dot_avx512vnni.h. */
inline __attribute__((always_inline)) void dot(__m512i &acc, __m512i x, __m512i w) {
  __asm__("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(x), "v"(w));
}

inline __attribute__((always_inline)) __m512i broadcast_pair(const int16_t *x) {
  int32_t value;
  memcpy(&value, x, 4);
  return _mm512_set1_epi32(value);
}

/* 16 W columns of a product of a tile. */
template <int W>
void multiply_columns(const int16_t *x, ptrdiff_t row, const int16_t *panel, int32_t pairs, int32_t *tile) {
  __m512i acc[ROWS][W];
#pragma GCC unroll 6
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < W; ++j) acc[i][j] = _mm512_setzero_si512();
  for (int32_t k = 0; k < pairs; ++k, x += 2, panel += 2 * COLUMNS) {
    __m512i w[W];
#pragma GCC unroll 4
    for (int j = 0; j < W; ++j) w[j] = _mm512_loadu_si512(panel + 32 * j);
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; ++i) {
      const __m512i v = broadcast_pair(x + i * row);
#pragma GCC unroll 4
      for (int j = 0; j < W; ++j) dot(acc[i][j], v, w[j]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < W; ++j) _mm512_storeu_si512(tile + COLUMNS * i + 16 * j, acc[i][j]);
}

typedef void (*multiply_function)(const int16_t *, ptrdiff_t, const int16_t *, int32_t, int32_t *);
const multiply_function MULTIPLY[5] = {nullptr, multiply_columns<1>, multiply_columns<2>, multiply_columns<3>, multiply_columns<4>};

void multiply(const int16_t *x, ptrdiff_t row, const int16_t *panel, int32_t pairs, int32_t columns, int32_t *tile) {
  MULTIPLY[columns < COLUMNS ? (columns + 15) / 16 : 4](x, row, panel, pairs, tile);
}

/* `count` outputs from `first` on of one row, from accumulators in order. */
void finish_row(const fxc_bilinear_linear *p, const void *const *in, void *out, int32_t row, int32_t first, int32_t count, const int32_t *acc) {
  int32_t total[COLUMNS];
  for (int32_t c = 0; c < count; c += 16)
    _mm512_storeu_si512(total + c, _mm512_add_epi32(_mm512_loadu_si512(acc + c), _mm512_loadu_si512(p->bias + first + c)));
  requantize_row(p->requantize, total, first, count, in, p->branch_pixel_stride, row, out, p->out_pixel_stride);
}

/* The results of ROWS groups from `group` on, outputs from `column` on of every block. */
void finish_tile(const fxc_bilinear_linear *p, const block_sizes &s, const uint8_t *, const void *const *in, void *out, int32_t group,
                 int32_t column, const int32_t *tiles) {
  for (int32_t i = 0; i < p->n; ++i)
    for (int32_t j = 0; j < p->p; ++j) {
      const int32_t *tile = tiles + (ptrdiff_t)p->decode.result[i * p->p + j] * TILE_ELEMENTS;
      const int32_t first = i * s.outer + column, end = (i + 1) * s.outer < p->outputs ? (i + 1) * s.outer : p->outputs;
      const int32_t count = end - first < COLUMNS ? end - first : COLUMNS;
      for (int32_t g = 0; g < ROWS && (group + g) * p->p + j < p->rows; ++g)
        finish_row(p, in, out, (group + g) * p->p + j, first, count, tile + COLUMNS * g);
    }
}

/* Rows of a product of two activations. */
void finish_matmul(const fxc_matmul *q, int32_t first, int32_t count, int32_t row, const int32_t *acc, int32_t rows, void *out) {
  for (int32_t g = 0; g < rows; ++g, acc += COLUMNS) {
    int32_t total[COLUMNS];
    for (int32_t c = 0; c < count; c += 16) {
      const __mmask16 mask = (__mmask16)(count - c < 16 ? (1u << (count - c)) - 1 : 0xffff);
      const __m512i offset = q->requantize ? _mm512_maskz_loadu_epi32(mask, q->requantize->branch[0].offset + first + c) : _mm512_setzero_si512();
      _mm512_storeu_si512(total + c, _mm512_add_epi32(_mm512_loadu_si512(acc + c), offset));
    }
    requantize_row(q->requantize, total, first, count, nullptr, nullptr, row + g, out, q->out_row_stride);
  }
}

size_t constant_bytes(const fxc_bilinear_linear *) { return 0; }

size_t packed_bytes(const void *params) { return weight_bytes((const fxc_bilinear_linear *)params); }

void pack(const void *params, void *packed) { pack_weights((const fxc_bilinear_linear *)params, (int16_t *)packed); }

}  // namespace

#include "bilinear_run.h"

extern "C" {
extern const fxc_kernel fxc_u8_bilinear_linear_6x64__avx512vnni;
const fxc_kernel fxc_u8_bilinear_linear_6x64__avx512vnni = {
    "fxc_u8_bilinear_linear_6x64__avx512vnni", "bilinear_linear", "avx512vnni", nullptr, packed_bytes, pack, units, scratch_bytes, run,
};
extern const fxc_kernel fxc_u8_bilinear_matmul_6x64__avx512vnni;
const fxc_kernel fxc_u8_bilinear_matmul_6x64__avx512vnni = {
    "fxc_u8_bilinear_matmul_6x64__avx512vnni", "bilinear_matmul", "avx512vnni", matmul_accepts, nullptr, nullptr, matmul_units,
    matmul_scratch_bytes, run_matmul,
};
}

#pragma GCC pop_options

#endif
