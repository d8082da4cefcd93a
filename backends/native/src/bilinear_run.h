/* The order of the work of fxc_bilinear_linear and fxc_bilinear_matmul, for every instruction set. Everything is static; include it after
   bilinear_blocks.h. The includer defines before:

     multiply(x, row, panel, pairs, columns, tile)     one product of a tile: ROWS rows x, `row` elements apart, times a panel
     constant_bytes(p)                                 what stands in front of the packed panels of a linear layer
     finish_tile(p, s, packed, in, out, group, column, tiles)
     finish_matmul(q, first, count, row, acc, rows, out)   `rows` rows from `row` on, columns from `first` on; acc as multiply left it */

#ifndef FXC_BILINEAR_RUN_H
#define FXC_BILINEAR_RUN_H

namespace {

void run(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *scratch) {
  const fxc_bilinear_linear *p = (const fxc_bilinear_linear *)params;
  const block_sizes s = sizes_of(p);
  const ptrdiff_t length = (ptrdiff_t)UNIT_GROUPS * s.row;
  const uint8_t *packed = (const uint8_t *)p->weight;
  int16_t *terms = (int16_t *)scratch;
  int32_t *tiles = (int32_t *)(terms + s.terms * length);
  for (int32_t unit = begin; unit < end; ++unit) {
    const int32_t first = unit * UNIT_GROUPS, last = first + UNIT_GROUPS < s.groups ? first + UNIT_GROUPS : s.groups;
    load_terms(p, s, (const uint8_t *)in[0], first, terms);
    run_sums(p->encode, p->m * p->p, (uint16_t *)terms, length);
    const int16_t *panels = (const int16_t *)(packed + constant_bytes(p));
    for (int32_t column = 0; column < s.outer; column += COLUMNS, panels += p->products * panel_elements(s.pairs))
      for (int32_t group = first; group < last; group += ROWS) {
        for (int32_t r = 0; r < p->products; ++r)
          multiply(terms + p->encode.result[r] * length + (ptrdiff_t)(group - first) * s.row, s.row, panels + r * panel_elements(s.pairs),
                   s.pairs, s.outer - column, tiles + (ptrdiff_t)r * TILE_ELEMENTS);
        run_sums(p->decode, p->products, (uint32_t *)tiles, TILE_ELEMENTS);
        finish_tile(p, s, packed, in, out, group, column, tiles);
      }
  }
}

/* -------------------------------------------------------------------------------------- products of two activations */

/* Blocks of a are height x inner, blocks of b inner x width. The sums of a are kept for a whole matrix, those of b for COLUMNS columns,
   which is the layout of a panel: sums of panels are panels of sums. */
struct matmul_sizes {
  int32_t height, inner, width, row, pairs;
  ptrdiff_t a_length, panel;
};

inline matmul_sizes sizes_of(const fxc_bilinear_matmul *p) {
  matmul_sizes s;
  s.height = (p->product.rows + p->n - 1) / p->n, s.inner = (p->product.depth + p->m - 1) / p->m;
  s.width = (p->product.columns + p->p - 1) / p->p;
  s.row = (s.inner + 31) / 32 * 32, s.pairs = (s.inner + 1) / 2;
  s.a_length = (ptrdiff_t)(s.height + ROWS - 1) / ROWS * ROWS * s.row, s.panel = panel_elements(s.pairs);
  return s;
}

size_t matmul_scratch_bytes(const void *params) {
  const fxc_bilinear_matmul *p = (const fxc_bilinear_matmul *)params;
  const matmul_sizes s = sizes_of(p);
  return 4 * (size_t)(p->products + p->decode.steps) * TILE_ELEMENTS + 2 * (size_t)(p->m * p->p + p->encode_b.steps) * s.panel +
         2 * (size_t)(p->n * p->m + p->encode_a.steps) * s.a_length;
}

int32_t matmul_units(const void *params) {
  const fxc_matmul *q = &((const fxc_bilinear_matmul *)params)->product;
  return q->size[0] * q->size[1] * q->size[2];
}

int matmul_accepts(const void *params) {
  const fxc_requantize *q = ((const fxc_bilinear_matmul *)params)->product.requantize;
  return !q || q->branches == 1;
}

/* The blocks (i, k) of a minus its zero point, rows and channels that are missing 0. */
void load_a(const fxc_bilinear_matmul *p, const matmul_sizes &s, const uint8_t *a, int16_t *terms) {
  const fxc_matmul *q = &p->product;
  memset(terms, 0, sizeof(int16_t) * (size_t)(p->n * p->m) * s.a_length);
  for (int32_t i = 0; i < p->n; ++i)
    for (int32_t k = 0; k < p->m; ++k, terms += s.a_length)
      for (int32_t r = 0; r < s.height && i * s.height + r < q->rows; ++r) {
        const uint8_t *x = a + (ptrdiff_t)(i * s.height + r) * q->a_row_stride + (ptrdiff_t)k * s.inner * q->a_depth_stride;
        const int32_t left = q->depth - k * s.inner, count = left < s.inner ? left : s.inner;
        int16_t *row = terms + (ptrdiff_t)r * s.row;
        if (q->a_depth_stride == 1)
          for (int32_t c = 0; c < count; ++c) row[c] = (int16_t)(x[c] - q->a_zero_point);
        else
          for (int32_t c = 0; c < count; ++c) row[c] = (int16_t)(x[(ptrdiff_t)c * q->a_depth_stride] - q->a_zero_point);
      }
}

/* Columns `column` .. of the blocks (k, j) of b minus its zero point, as panels. */
void load_b(const fxc_bilinear_matmul *p, const matmul_sizes &s, const uint8_t *b, int32_t column, int16_t *panels) {
  const fxc_matmul *q = &p->product;
  memset(panels, 0, sizeof(int16_t) * (size_t)(p->m * p->p) * s.panel);
  for (int32_t k = 0; k < p->m; ++k)
    for (int32_t j = 0; j < p->p; ++j, panels += s.panel) {
      const int32_t first = j * s.width + column, left = q->columns - first, within = s.width - column;
      int32_t count = within < COLUMNS ? within : COLUMNS;
      if (left < count) count = left;
      for (int32_t r = 0; r < s.inner && k * s.inner + r < q->depth; ++r) {
        const uint8_t *x = b + (ptrdiff_t)(k * s.inner + r) * q->b_depth_stride + (ptrdiff_t)first * q->b_column_stride;
        int16_t *target = panels + (ptrdiff_t)r / 2 * 2 * COLUMNS + r % 2;
        for (int32_t c = 0; c < count; ++c) target[2 * place(c)] = (int16_t)(x[(ptrdiff_t)c * q->b_column_stride] - q->b_zero_point);
      }
    }
}

/* The results of rows `row` .. row + ROWS - 1 and columns `column` .. of every block. */
void finish_matmul_tile(const fxc_bilinear_matmul *p, const matmul_sizes &s, int32_t row, int32_t column, const int32_t *tiles, void *out) {
  const fxc_matmul *q = &p->product;
  for (int32_t i = 0; i < p->n; ++i)
    for (int32_t j = 0; j < p->p; ++j) {
      const int32_t first = j * s.width + column, start = i * s.height + row;
      int32_t count = s.width - column < COLUMNS ? s.width - column : COLUMNS, rows = s.height - row < ROWS ? s.height - row : ROWS;
      if (q->columns - first < count) count = q->columns - first;
      if (q->rows - start < rows) rows = q->rows - start;
      if (count > 0 && rows > 0) finish_matmul(q, first, count, start, tiles + (ptrdiff_t)p->decode.result[i * p->p + j] * TILE_ELEMENTS, rows, out);
    }
}

void run_matmul(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *scratch) {
  const fxc_bilinear_matmul *p = (const fxc_bilinear_matmul *)params;
  const fxc_matmul *q = &p->product;
  const matmul_sizes s = sizes_of(p);
  int32_t *tiles = (int32_t *)scratch;
  int16_t *panels = (int16_t *)(tiles + (ptrdiff_t)(p->products + p->decode.steps) * TILE_ELEMENTS);
  int16_t *rows = panels + (p->m * p->p + p->encode_b.steps) * s.panel;
  for (int32_t unit = begin; unit < end; ++unit) {
    ptrdiff_t a = 0, b = 0, target = 0;
    int32_t rest = unit;
    for (int32_t i = 2; i >= 0; rest /= q->size[i], --i) {
      const ptrdiff_t at = rest % q->size[i];
      a += at * q->a_stride[i], b += at * q->b_stride[i], target += at * q->out_stride[i];
    }
    void *result = (uint8_t *)out + target * (q->requantize ? 1 : 4);
    load_a(p, s, (const uint8_t *)in[0] + a, rows);
    run_sums(p->encode_a, p->n * p->m, (uint16_t *)rows, s.a_length);
    for (int32_t column = 0; column < s.width; column += COLUMNS) {
      load_b(p, s, (const uint8_t *)in[1] + b, column, panels);
      run_sums(p->encode_b, p->m * p->p, (uint16_t *)panels, s.panel);
      for (int32_t row = 0; row < s.height; row += ROWS) {
        for (int32_t r = 0; r < p->products; ++r)
          multiply(rows + p->encode_a.result[r] * s.a_length + (ptrdiff_t)row * s.row, s.row, panels + p->encode_b.result[r] * s.panel, s.pairs,
                   s.width - column, tiles + (ptrdiff_t)r * TILE_ELEMENTS);
        run_sums(p->decode, p->products, (uint32_t *)tiles, TILE_ELEMENTS);
        finish_matmul_tile(p, s, row, column, tiles, result);
      }
    }
  }
}

}  // namespace

#endif
