// Products of two activations with AVX2 (fxc_matmul): codes minus their zero points are 9-bit numbers, so both operands are widened to 16
// bits and multiplied with vpmaddwd, whose sums of two fit 32 bits; then requantize_avx2.h or int32.
//
// Register tile: 6 rows x 16 columns. Packed on the fly in scratch: 16 columns of b as (depth / 2 rounded up, 16 columns, 2), and the rows
// of a tile. Unit: one tile (matrix-major, then columns, then rows), so that columns are packed once per matrix and thread.
//
// Precondition: one branch. No over-reads.

#if defined(__x86_64__)

#pragma GCC push_options
#pragma GCC target("avx2")

#include <immintrin.h>

#include "kernel_row.h"
#include "requantize_avx2.h"

namespace {

constexpr int32_t ROWS = 6;

int32_t pairs_of(const fxc_matmul *p) { return (p->depth + 1) / 2; }

int32_t row_tiles(const fxc_matmul *p) { return (p->rows + ROWS - 1) / ROWS; }

int32_t column_groups(const fxc_matmul *p) { return (p->columns + GROUP - 1) / GROUP; }

// In scratch, followed by the packed columns and rows.
struct room {
  alignas(32) int32_t acc[ROWS * GROUP];
  group_constants constants;
};

struct step {
  const fxc_matmul *p;
  room *place;
  int16_t *columns, *rows;
};

size_t scratch_bytes(const void *params) {
  const fxc_matmul *p = (const fxc_matmul *)params;
  return sizeof(room) + 32 + sizeof(int16_t) * 2 * (size_t)pairs_of(p) * (GROUP + ROWS);
}

ptrdiff_t matrix_offset(const fxc_matmul *p, int32_t index, const int32_t stride[3]) {
  ptrdiff_t offset = 0;
  for (int dim = 2; dim >= 0; index /= p->size[dim], --dim) offset += (ptrdiff_t)(index % p->size[dim]) * stride[dim];
  return offset;
}

// Columns first..first + count - 1 of b and their requantization.
void pack_columns(const step &s, const uint8_t *b, int32_t first, int32_t count) {
  const fxc_matmul *p = s.p;
  pack_group(&s.place->constants, p->requantize, first, count);
  memset(s.columns, 0, sizeof(int16_t) * 2 * GROUP * (size_t)pairs_of(p));
  for (int32_t c = 0; c < count; ++c) {
    const uint8_t *x = b + (ptrdiff_t)(first + c) * p->b_column_stride;
    int16_t *target = s.columns + 2 * place_of(c);
    for (int32_t k = 0; k < p->depth; ++k, x += p->b_depth_stride)
      target[k / 2 * 2 * GROUP + k % 2] = (int16_t)(*x - p->b_zero_point);
  }
}

void pack_row(const step &s, const uint8_t *a, int32_t i) {
  int16_t *target = s.rows + 2 * i * pairs_of(s.p);
  const int32_t depth = s.p->depth, stride = s.p->a_depth_stride, zero = s.p->a_zero_point;
  target[2 * pairs_of(s.p) - 1] = 0;
  if (stride == 1)
    for (int32_t k = 0; k < depth; ++k) target[k] = (int16_t)(a[k] - zero);
  else
    for (int32_t k = 0; k < depth; ++k) target[k] = (int16_t)(a[(ptrdiff_t)k * stride] - zero);
}

// All rows of the tile times the columns, to place->acc. Through memory on purpose: see conv_tile_avx2.h.
__attribute__((noinline)) void accumulate(const step &s) {
  __m256i acc_a[ROWS], acc_b[ROWS];
  const int32_t *offset = s.place->constants.branch[0].offset;
#pragma GCC unroll 6
  for (int i = 0; i < ROWS; ++i) acc_a[i] = load256(offset), acc_b[i] = load256(offset + 8);
  const int16_t *x = s.rows, *w = s.columns;
  const int32_t pairs = pairs_of(s.p);
  for (int32_t k = 0; k < pairs; ++k, x += 2, w += 2 * GROUP) {
    const __m256i wa = load256(w), wb = load256(w + GROUP);
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; ++i) {
      int32_t two;
      memcpy(&two, x + 2 * i * pairs, 4);
      const __m256i v = _mm256_set1_epi32(two);
      acc_a[i] = _mm256_add_epi32(acc_a[i], _mm256_madd_epi16(v, wa));
      acc_b[i] = _mm256_add_epi32(acc_b[i], _mm256_madd_epi16(v, wb));
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < ROWS; ++i) {
    _mm256_store_si256((__m256i *)(s.place->acc + GROUP * i), acc_a[i]);
    _mm256_store_si256((__m256i *)(s.place->acc + GROUP * i + 8), acc_b[i]);
  }
}

void run_tile(const step &s, const uint8_t *a, int32_t first_row, int32_t first, int32_t count, const destination &d) {
  const int32_t rows = s.p->rows - first_row < ROWS ? s.p->rows - first_row : ROWS;
  for (int32_t i = 0; i < ROWS; ++i) pack_row(s, a + (ptrdiff_t)(first_row + (i < rows ? i : 0)) * s.p->a_row_stride, i);
  accumulate(s);
  for (int32_t i = 0; i < rows; i += 2) {
    const int32_t *row = s.place->acc + GROUP * i, *next = row + GROUP;
    finish_pixels(d, s.place->constants, first, count, first_row + i, rows - i < 2 ? 1 : 2, {load256(row), load256(row + 8)},
                  {load256(next), load256(next + 8)});
  }
}

void run(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *scratch) {
  const fxc_matmul *p = (const fxc_matmul *)params;
  room *place = (room *)scratch;
  int16_t *columns = (int16_t *)(place + 1);
  const step s = {p, place, columns, columns + 2 * GROUP * pairs_of(p)};
  const int32_t tiles = row_tiles(p), groups = column_groups(p);
  for (int32_t unit = begin; unit < end; ++unit) {
    const int32_t first = unit / tiles % groups * GROUP, matrix = unit / tiles / groups;
    const int32_t count = p->columns - first < GROUP ? p->columns - first : GROUP;
    if (unit == begin || unit % tiles == 0) pack_columns(s, (const uint8_t *)in[1] + matrix_offset(p, matrix, p->b_stride), first, count);
    uint8_t *result = (uint8_t *)out + matrix_offset(p, matrix, p->out_stride) * (p->requantize ? 1 : 4);
    run_tile(s, (const uint8_t *)in[0] + matrix_offset(p, matrix, p->a_stride), unit % tiles * ROWS, first, count,
             {p->requantize, nullptr, nullptr, result, p->out_row_stride});
  }
}

int accepts(const void *params) {
  const fxc_matmul *p = (const fxc_matmul *)params;
  return !p->requantize || p->requantize->branches == 1;
}

int32_t units(const void *params) {
  const fxc_matmul *p = (const fxc_matmul *)params;
  return p->size[0] * p->size[1] * p->size[2] * column_groups(p) * row_tiles(p);
}

}  // namespace

#pragma GCC pop_options

extern "C" {
extern const fxc_kernel fxc_u8_matmul_6x16__avx2 = {"fxc_u8_matmul_6x16__avx2", "matmul", "avx2", accepts, nullptr,
                                                    nullptr, units, scratch_bytes, run};
}

#endif
