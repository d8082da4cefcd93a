/* Layers and products of two activations in blocks with AVX2 (fxc_bilinear_linear, fxc_bilinear_matmul): vpmaddwd on 16-bit sums of blocks, as many products per instruction as the
   layers of conv_avx2.cpp, whose codes are widened as well. See bilinear_run.h for the order of the work.

   Register tile: 6 groups x 16 columns. Packed: group_constants and bias (16, in the order of a pair) per block of 16 outputs, then the
   weights. Reads up to 64 bytes past a branch. */

#if defined(__x86_64__)

#pragma GCC push_options
#pragma GCC target("avx2")

#include <immintrin.h>

#include "kernel_row.h"
#include "requantize_avx2.h"

namespace {

constexpr int32_t ROWS = 6, COLUMNS = GROUP;

inline int32_t place(int32_t column) { return place_of(column); }

}  // namespace

#include "bilinear_blocks.h"

namespace {

/* What finishing 16 outputs of block i from a column on needs. */
struct output_block {
  group_constants constants;
  int32_t bias[GROUP];
};

output_block *output_blocks(void *packed, const block_sizes &s, int32_t i) { return (output_block *)packed + (ptrdiff_t)i * s.columns; }

int32_t outputs_from(const fxc_bilinear_linear *p, const block_sizes &s, int32_t i, int32_t column) {
  const int32_t first = i * s.outer + column, end = (i + 1) * s.outer < p->outputs ? (i + 1) * s.outer : p->outputs;
  return end - first < COLUMNS ? end - first : COLUMNS;
}

size_t constant_bytes(const fxc_bilinear_linear *p) { return (sizeof(output_block) * p->n * sizes_of(p).columns + 63) / 64 * 64; }

size_t packed_bytes(const void *params) {
  const fxc_bilinear_linear *p = (const fxc_bilinear_linear *)params;
  return constant_bytes(p) + weight_bytes(p);
}

void pack(const void *params, void *packed) {
  const fxc_bilinear_linear *p = (const fxc_bilinear_linear *)params;
  const block_sizes s = sizes_of(p);
  memset(packed, 0, constant_bytes(p));
  for (int32_t i = 0; i < p->n; ++i)
    for (int32_t column = 0; column < s.outer; column += COLUMNS) {
      output_block *b = output_blocks(packed, s, i) + column / COLUMNS;
      const int32_t first = i * s.outer + column, count = outputs_from(p, s, i, column);
      if (count <= 0) continue;
      pack_group(&b->constants, p->requantize, first, count);
      for (int32_t c = 0; c < count; ++c) b->bias[place_of(c)] = p->bias[first + c];
    }
  pack_weights(p, (int16_t *)((uint8_t *)packed + constant_bytes(p)));
}

/* One product of a tile. Through memory on purpose: see conv_tile_avx2.h. */
__attribute__((noinline)) void multiply(const int16_t *x, ptrdiff_t row, const int16_t *panel, int32_t pairs, int32_t, int32_t *tile) {
  __m256i acc_a[ROWS], acc_b[ROWS];
#pragma GCC unroll 6
  for (int i = 0; i < ROWS; ++i) acc_a[i] = acc_b[i] = _mm256_setzero_si256();
  for (int32_t k = 0; k < pairs; ++k, x += 2, panel += 2 * COLUMNS) {
    const __m256i wa = load256(panel), wb = load256(panel + COLUMNS);
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; ++i) {
      int32_t two;
      memcpy(&two, x + i * row, 4);
      const __m256i v = _mm256_set1_epi32(two);
      acc_a[i] = _mm256_add_epi32(acc_a[i], _mm256_madd_epi16(v, wa));
      acc_b[i] = _mm256_add_epi32(acc_b[i], _mm256_madd_epi16(v, wb));
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < ROWS; ++i) {
    _mm256_storeu_si256((__m256i *)(tile + COLUMNS * i), acc_a[i]);
    _mm256_storeu_si256((__m256i *)(tile + COLUMNS * i + 8), acc_b[i]);
  }
}

/* The results of ROWS groups from `group` on, outputs from `column` on of every block. */
void finish_tile(const fxc_bilinear_linear *p, const block_sizes &s, const uint8_t *packed, const void *const *in, void *out, int32_t group,
                 int32_t column, const int32_t *tiles) {
  const destination d = {p->requantize, in, p->branch_pixel_stride, out, p->out_pixel_stride};
  for (int32_t i = 0; i < p->n; ++i) {
    const output_block *b = output_blocks((void *)packed, s, i) + column / COLUMNS;
    const int32_t count = outputs_from(p, s, i, column);
    const __m256i bias_a = load256(b->bias), bias_b = load256(b->bias + 8);
    for (int32_t j = 0; j < p->p && count > 0; ++j) {
      const int32_t *tile = tiles + (ptrdiff_t)p->decode.result[i * p->p + j] * TILE_ELEMENTS;
      for (int32_t g = 0; g < ROWS && (group + g) * p->p + j < p->rows; ++g, tile += COLUMNS) {
        const pair acc = {_mm256_add_epi32(load256(tile), bias_a), _mm256_add_epi32(load256(tile + 8), bias_b)};
        finish_pixels(d, b->constants, i * s.outer + column, count, (group + g) * p->p + j, 1, acc, acc);
      }
    }
  }
}

/* Rows of a product of two activations. */
void finish_matmul(const fxc_matmul *q, int32_t first, int32_t count, int32_t row, const int32_t *acc, int32_t rows, void *out) {
  const destination d = {q->requantize, nullptr, nullptr, out, q->out_row_stride};
  group_constants constants;
  pack_group(&constants, q->requantize, first, count);
  const int32_t *offset = constants.branch[0].offset;
  for (int32_t g = 0; g < rows; ++g, acc += COLUMNS) {
    const pair total = {_mm256_add_epi32(load256(acc), load256(offset)), _mm256_add_epi32(load256(acc + 8), load256(offset + 8))};
    finish_pixels(d, constants, first, count, row + g, 1, total, total);
  }
}

}  // namespace

#include "bilinear_run.h"

extern "C" {
extern const fxc_kernel fxc_u8_bilinear_linear_6x16__avx2;
const fxc_kernel fxc_u8_bilinear_linear_6x16__avx2 = {
    "fxc_u8_bilinear_linear_6x16__avx2", "bilinear_linear", "avx2", nullptr, packed_bytes, pack, units, scratch_bytes, run,
};
extern const fxc_kernel fxc_u8_bilinear_matmul_6x16__avx2;
const fxc_kernel fxc_u8_bilinear_matmul_6x16__avx2 = {
    "fxc_u8_bilinear_matmul_6x16__avx2", "bilinear_matmul", "avx2", matmul_accepts, nullptr, nullptr, matmul_units, matmul_scratch_bytes, run_matmul,
};
}

#pragma GCC pop_options

#endif
