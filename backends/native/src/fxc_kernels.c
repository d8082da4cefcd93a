/* Scalar kernels: portable C99, the arithmetic of numerics.py. See fxc_kernels.h for parameters and layouts. */

#include "fxc_kernels.h"

#include <stddef.h>
#include <string.h>

/* ---------------------------------------------------------------------------------------------------- arithmetic */

static int32_t wrap_add(int32_t a, int32_t b) { return (int32_t)((uint32_t)a + (uint32_t)b); }

static int32_t wrap_sub(int32_t a, int32_t b) { return (int32_t)((uint32_t)a - (uint32_t)b); }

static int32_t wrap_mul(int32_t a, int32_t b) { return (int32_t)((uint32_t)a * (uint32_t)b); }

static int32_t shift_left(int32_t value, int32_t bits) { return (int32_t)((uint32_t)value << bits); }

/* Arithmetic shifts: C leaves >> of negative numbers to the implementation. */
static int32_t shift_right(int32_t value, int32_t bits) {
  return value < 0 ? (int32_t)~(~(uint32_t)value >> bits) : (int32_t)((uint32_t)value >> bits);
}

static int64_t shift_right64(int64_t value, int64_t bits) {
  return value < 0 ? (int64_t)~(~(uint64_t)value >> bits) : (int64_t)((uint64_t)value >> bits);
}

static int32_t clamp32(int32_t value, int32_t lo, int32_t hi) { return value < lo ? lo : value > hi ? hi : value; }

static int32_t saturate16(int32_t value) { return clamp32(value, -32768, 32767); }

static int32_t saturate32(int64_t value) {
  return value < INT32_MIN ? INT32_MIN : value > INT32_MAX ? INT32_MAX : (int32_t)value;
}

/* u of one branch for channel c; value is the accumulator or code plus its offset. */
static int32_t scale_branch(const fxc_branch *branch, int32_t value, int32_t c) {
  const int32_t t = saturate16(shift_right(shift_left(value, branch->left_shift), branch->right_shift[c]));
  return shift_right(t * branch->multiplier[c] + (1 << 14), 15);
}

/* u of a branch that is a tensor: codes, or accumulators. */
static int32_t scale_element(const fxc_branch *branch, const void *tensor, ptrdiff_t at, int32_t c) {
  const int32_t value = branch->wide ? ((const int32_t *)tensor)[at] : ((const uint8_t *)tensor)[at];
  return scale_branch(branch, wrap_add(value, branch->offset[c]), c);
}

/* The last steps of a requantization, from the sum of all u. */
static uint8_t finish(const fxc_requantize *q, int32_t total, int32_t c) {
  int32_t y = saturate16(saturate16(total) + q->zero[c]);
  y = clamp32(shift_right(y, q->guard_bits), q->lo[c], q->hi[c]);
  return q->table ? q->table[y] : (uint8_t)y;
}

/* Element `to` of a kernel's output, of channel c: its accumulator as it is, or requantized together with element at[i] of each further
   branch[i]. */
static void store(const fxc_requantize *q, int32_t acc, int32_t c, const void *const *branch, const ptrdiff_t *at, void *out, ptrdiff_t to) {
  int32_t total, i;
  if (!q) {
    ((int32_t *)out)[to] = acc;
    return;
  }
  total = scale_branch(&q->branch[0], wrap_add(acc, q->branch[0].offset[c]), c);
  for (i = 1; i < q->branches; ++i) total += scale_element(&q->branch[i], branch[i], at[i], c);
  ((uint8_t *)out)[to] = finish(q, total, c);
}

/* -------------------------------------------------------------------------------------------------- kernels of pixels */

/* The accumulator of channel c at d, h, w of the output, from one image. */
typedef int32_t accumulator(const void *params, const uint8_t *image, const int32_t at[3], int32_t c);

/* An output of pixels: what convolutions, pools and resizes have in common. */
typedef struct {
  int32_t channels, image_stride, out_stride;
  const int32_t *size, *branch_stride;
  const fxc_requantize *requantize;
  int32_t raw; /* accumulators are codes */
} pixels;

/* n, d, h, w of a pixel in an output of this size. */
static void locate(int32_t pixel, const int32_t size[3], int32_t at[4]) {
  at[3] = pixel % size[2], pixel /= size[2];
  at[2] = pixel % size[1], pixel /= size[1];
  at[1] = pixel % size[0], at[0] = pixel / size[0];
}

static void each_pixel(const pixels *p, accumulator *accumulate, const void *params, const void *const *in, void *out, int32_t begin,
                       int32_t end) {
  int32_t pixel, at[4], c, i;
  for (pixel = begin; pixel < end; ++pixel) {
    ptrdiff_t to = (ptrdiff_t)pixel * p->out_stride, branch[FXC_MAX_BRANCHES];
    const uint8_t *image = (const uint8_t *)in[0];
    locate(pixel, p->size, at);
    image += (ptrdiff_t)at[0] * p->image_stride;
    for (c = 0; c < p->channels; ++c, ++to) {
      const int32_t acc = accumulate(params, image, at + 1, c);
      if (p->raw) {
        ((uint8_t *)out)[to] = (uint8_t)acc;
        continue;
      }
      for (i = 1; p->requantize && i < p->requantize->branches; ++i) branch[i] = (ptrdiff_t)pixel * p->branch_stride[i] + c;
      store(p->requantize, acc, c, in, branch, out, to);
    }
  }
}

/* --------------------------------------------------------------------------------------------------- convolution */

/* Taps outside the image read pad_value. */
static int32_t conv_accumulate(const void *params, const uint8_t *image, const int32_t at[3], int32_t o) {
  const fxc_conv *p = (const fxc_conv *)params;
  const int32_t depth = p->in_channels / p->groups;
  const int32_t first = o / (p->out_channels / p->groups) * depth;
  const int8_t *weight = p->weight + (ptrdiff_t)o * p->kernel[0] * p->kernel[1] * p->kernel[2] * depth;
  int32_t acc = p->bias[o], origin[3], i, j, k, c;
  for (i = 0; i < 3; ++i) origin[i] = at[i] * p->stride[i] - p->pad_before[i];
  for (i = 0; i < p->kernel[0]; ++i)
    for (j = 0; j < p->kernel[1]; ++j)
      for (k = 0; k < p->kernel[2]; ++k, weight += depth) {
        const int32_t d = origin[0] + i * p->dilation[0], h = origin[1] + j * p->dilation[1], w = origin[2] + k * p->dilation[2];
        const int inside = d >= 0 && d < p->in_size[0] && h >= 0 && h < p->in_size[1] && w >= 0 && w < p->in_size[2];
        const uint8_t *x = p->pad_value;
        if (inside)
          x = image + (ptrdiff_t)d * p->in_plane_stride + (ptrdiff_t)h * p->in_row_stride + (ptrdiff_t)w * p->in_pixel_stride;
        for (c = 0; c < depth; ++c) acc = wrap_add(acc, x[first + c] * weight[c]);
      }
  return acc;
}

void fxc_conv_scalar(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *scratch) {
  const fxc_conv *p = (const fxc_conv *)params;
  const pixels to = {p->out_channels, p->in_image_stride, p->out_pixel_stride, p->out_size, p->branch_pixel_stride, p->requantize, 0};
  (void)scratch;
  each_pixel(&to, conv_accumulate, params, in, out, begin, end);
}

/* -------------------------------------------------------------------------------------------------------- matmul */

void fxc_matmul_scalar(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *scratch) {
  const fxc_matmul *p = (const fxc_matmul *)params;
  const int32_t size[3] = {p->size[1], p->size[2], p->rows};
  int32_t row, at[4], column, k, i;
  (void)scratch;
  for (row = begin; row < end; ++row) {
    const uint8_t *a = (const uint8_t *)in[0], *b = (const uint8_t *)in[1];
    ptrdiff_t target = 0;
    locate(row, size, at);
    for (i = 0; i < 3; ++i) {
      a += (ptrdiff_t)at[i] * p->a_stride[i];
      b += (ptrdiff_t)at[i] * p->b_stride[i];
      target += (ptrdiff_t)at[i] * p->out_stride[i];
    }
    a += (ptrdiff_t)at[3] * p->a_row_stride;
    target += (ptrdiff_t)at[3] * p->out_row_stride;
    for (column = 0; column < p->columns; ++column, ++target) {
      ptrdiff_t branch[FXC_MAX_BRANCHES];
      int32_t acc = 0;
      for (k = 0; k < p->depth; ++k) {
        const int32_t x = a[(ptrdiff_t)k * p->a_depth_stride] - p->a_zero_point;
        const int32_t y = b[(ptrdiff_t)k * p->b_depth_stride + (ptrdiff_t)column * p->b_column_stride] - p->b_zero_point;
        acc = wrap_add(acc, x * y);
      }
      for (i = 1; i < FXC_MAX_BRANCHES; ++i) branch[i] = target;
      store(p->requantize, acc, column, in + 1, branch, out, target);
    }
  }
}

/* ---------------------------------------------------------------------------------------------- products in blocks */

static int32_t divide_up(int32_t a, int32_t b) { return (a + b - 1) / b; }

/* Runs a program on `inputs` terms of `length` elements each, which are followed by room for its steps. */
static void run_sums(const fxc_sums *sums, int32_t inputs, int32_t *terms, ptrdiff_t length) {
  const int32_t *step = sums->step;
  int32_t k;
  ptrdiff_t e;
  for (k = 0; k < sums->steps; ++k, step += 4) {
    const int32_t *a = terms + step[0] * length, *b = terms + step[2] * length;
    int32_t *sum = terms + (inputs + k) * length;
    for (e = 0; e < length; ++e) sum[e] = wrap_add(wrap_mul(step[1], a[e]), wrap_mul(step[3], b[e]));
  }
}

int64_t fxc_bilinear_linear_scratch(const fxc_bilinear_linear *p) {
  const int64_t inner = divide_up(p->depth, p->m), outer = divide_up(p->outputs, p->n);
  return 4 * ((p->m * p->p + p->encode.steps) * inner + (p->products + p->decode.steps) * outer);
}

/* Row `row`, channels of block k, minus the zero points. */
static void load_block(const fxc_bilinear_linear *p, const uint8_t *x, int32_t row, int32_t k, int32_t inner, int32_t *term) {
  int32_t c;
  for (c = 0; c < inner; ++c) {
    const int32_t channel = k * inner + c;
    const int missing = row >= p->rows || channel >= p->depth;
    term[c] = missing ? 0 : x[(ptrdiff_t)row * p->in_pixel_stride + channel] - p->zero_point[channel];
  }
}

void fxc_bilinear_linear_scalar(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *scratch) {
  const fxc_bilinear_linear *p = (const fxc_bilinear_linear *)params;
  const int32_t inner = divide_up(p->depth, p->m), outer = divide_up(p->outputs, p->n);
  int32_t *terms = (int32_t *)scratch, *products = terms + (ptrdiff_t)(p->m * p->p + p->encode.steps) * inner;
  int32_t unit, i, j, k, o, c, r;
  for (unit = begin; unit < end; ++unit) {
    for (k = 0; k < p->m; ++k)
      for (j = 0; j < p->p; ++j) load_block(p, (const uint8_t *)in[0], unit * p->p + j, k, inner, terms + (ptrdiff_t)(k * p->p + j) * inner);
    run_sums(&p->encode, p->m * p->p, terms, inner);
    for (r = 0; r < p->products; ++r)
      for (o = 0; o < outer; ++o) {
        const int32_t *x = terms + (ptrdiff_t)p->encode.result[r] * inner;
        const int16_t *w = p->weight + ((ptrdiff_t)r * outer + o) * inner;
        int32_t acc = 0;
        for (c = 0; c < inner; ++c) acc = wrap_add(acc, wrap_mul(x[c], w[c]));
        products[(ptrdiff_t)r * outer + o] = acc;
      }
    run_sums(&p->decode, p->products, products, outer);
    for (j = 0; j < p->p && unit * p->p + j < p->rows; ++j)
      for (i = 0; i < p->n; ++i)
        for (o = 0; o < outer && i * outer + o < p->outputs; ++o) {
          const int32_t channel = i * outer + o;
          const ptrdiff_t pixel = (ptrdiff_t)unit * p->p + j;
          ptrdiff_t branch[FXC_MAX_BRANCHES];
          for (c = 1; p->requantize && c < p->requantize->branches; ++c) branch[c] = pixel * p->branch_pixel_stride[c] + channel;
          store(p->requantize, wrap_add(products[(ptrdiff_t)p->decode.result[i * p->p + j] * outer + o], p->bias[channel]), channel, in,
                branch, out, pixel * p->out_pixel_stride + channel);
        }
  }
}

/* One operand as row-major blocks of height x width, minus its zero point. */
static void load_matrix(const uint8_t *x, int32_t rows, int32_t columns, int32_t row_stride, int32_t column_stride, int32_t zero_point,
                        int32_t down, int32_t across, int32_t *terms) {
  const int32_t height = divide_up(rows, down), width = divide_up(columns, across);
  int32_t i, j, r, c;
  for (i = 0; i < down; ++i)
    for (j = 0; j < across; ++j)
      for (r = i * height; r < (i + 1) * height; ++r)
        for (c = j * width; c < (j + 1) * width; ++c)
          *terms++ = r < rows && c < columns ? x[(ptrdiff_t)r * row_stride + (ptrdiff_t)c * column_stride] - zero_point : 0;
}

int64_t fxc_bilinear_matmul_scratch(const fxc_bilinear_matmul *p) {
  const int64_t n = divide_up(p->product.rows, p->n), m = divide_up(p->product.depth, p->m), k = divide_up(p->product.columns, p->p);
  return 4 * ((p->n * p->m + p->encode_a.steps) * n * m + (p->m * p->p + p->encode_b.steps) * m * k +
              (p->products + p->decode.steps) * n * k);
}

void fxc_bilinear_matmul_scalar(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *scratch) {
  const fxc_bilinear_matmul *p = (const fxc_bilinear_matmul *)params;
  const fxc_matmul *q = &p->product;
  const int32_t height = divide_up(q->rows, p->n), inner = divide_up(q->depth, p->m), width = divide_up(q->columns, p->p);
  const ptrdiff_t a_length = (ptrdiff_t)height * inner, b_length = (ptrdiff_t)inner * width, length = (ptrdiff_t)height * width;
  int32_t *a = (int32_t *)scratch, *b = a + (p->n * p->m + p->encode_a.steps) * a_length;
  int32_t *products = b + (p->m * p->p + p->encode_b.steps) * b_length;
  int32_t unit, i, r, c, k;
  for (unit = begin; unit < end; ++unit) {
    const uint8_t *x = (const uint8_t *)in[0], *y = (const uint8_t *)in[1];
    ptrdiff_t target = 0;
    int32_t rest = unit;
    for (i = 2; i >= 0; rest /= q->size[i], --i) {
      x += (ptrdiff_t)(rest % q->size[i]) * q->a_stride[i];
      y += (ptrdiff_t)(rest % q->size[i]) * q->b_stride[i];
      target += (ptrdiff_t)(rest % q->size[i]) * q->out_stride[i];
    }
    load_matrix(x, q->rows, q->depth, q->a_row_stride, q->a_depth_stride, q->a_zero_point, p->n, p->m, a);
    load_matrix(y, q->depth, q->columns, q->b_depth_stride, q->b_column_stride, q->b_zero_point, p->m, p->p, b);
    run_sums(&p->encode_a, p->n * p->m, a, a_length);
    run_sums(&p->encode_b, p->m * p->p, b, b_length);
    for (i = 0; i < p->products; ++i)
      for (r = 0; r < height; ++r)
        for (c = 0; c < width; ++c) {
          const int32_t *s = a + p->encode_a.result[i] * a_length + (ptrdiff_t)r * inner, *t = b + p->encode_b.result[i] * b_length + c;
          int32_t acc = 0;
          for (k = 0; k < inner; ++k) acc = wrap_add(acc, wrap_mul(s[k], t[(ptrdiff_t)k * width]));
          products[i * length + (ptrdiff_t)r * width + c] = acc;
        }
    run_sums(&p->decode, p->products, products, length);
    for (r = 0; r < q->rows; ++r)
      for (c = 0; c < q->columns; ++c) {
        const int32_t *block = products + p->decode.result[r / height * p->p + c / width] * length;
        const ptrdiff_t to = target + (ptrdiff_t)r * q->out_row_stride + c;
        store(q->requantize, block[(ptrdiff_t)(r % height) * width + c % width], c, in + 1, NULL, out, to);
      }
  }
}

/* --------------------------------------------------------------------------------------------------------- pools */

static int32_t pool_window(const void *params, const uint8_t *image, const int32_t at[3], int32_t c) {
  const fxc_pool *p = (const fxc_pool *)params;
  int32_t d, h, w, acc = 0, largest = 0;
  for (d = p->start[0][at[0]]; d < p->end[0][at[0]]; d += p->dilation[0])
    for (h = p->start[1][at[1]]; h < p->end[1][at[1]]; h += p->dilation[1])
      for (w = p->start[2][at[2]]; w < p->end[2][at[2]]; w += p->dilation[2]) {
        const int32_t x = image[(ptrdiff_t)d * p->in_stride[0] + (ptrdiff_t)h * p->in_stride[1] + (ptrdiff_t)w * p->in_stride[2] + c];
        if (p->maximum)
          largest = x > largest ? x : largest;
        else
          acc = wrap_add(acc, x - p->zero_point[c]);
      }
  return p->maximum ? largest : acc;
}

void fxc_pool_scalar(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *scratch) {
  const fxc_pool *p = (const fxc_pool *)params;
  const pixels to = {p->channels, p->in_image_stride, p->out_pixel_stride, p->out_size, p->branch_pixel_stride, p->requantize,
                     p->maximum && !p->requantize};
  (void)scratch;
  each_pixel(&to, pool_window, params, in, out, begin, end);
}

/* -------------------------------------------------------------------------------------------------------- resize */

/* Interpolates from dimension `dim` inwards: two neighbors where the dimension is interpolated, itself where it is not. */
static int32_t interpolate(const fxc_resize *p, const uint8_t *x, const int32_t at[3], int32_t dim, int32_t zero_point) {
  int32_t near, far, weight;
  if (dim == 3) return *x - zero_point;
  if (dim < 3 - p->dims) return interpolate(p, x + (ptrdiff_t)at[dim] * p->in_stride[dim], at, dim + 1, zero_point);
  near = interpolate(p, x + (ptrdiff_t)p->index0[dim][at[dim]] * p->in_stride[dim], at, dim + 1, zero_point);
  far = interpolate(p, x + (ptrdiff_t)p->index1[dim][at[dim]] * p->in_stride[dim], at, dim + 1, zero_point);
  weight = p->weight1[dim][at[dim]];
  return wrap_add(wrap_mul(near, (1 << p->fraction_bits) - weight), wrap_mul(far, weight));
}

static int32_t resize_accumulate(const void *params, const uint8_t *image, const int32_t at[3], int32_t c) {
  const fxc_resize *p = (const fxc_resize *)params;
  return interpolate(p, image + c, at, 0, p->zero_point[c]);
}

void fxc_resize_scalar(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *scratch) {
  const fxc_resize *p = (const fxc_resize *)params;
  const pixels to = {p->channels, p->in_image_stride, p->out_pixel_stride, p->out_size, p->branch_pixel_stride, p->requantize, 0};
  (void)scratch;
  each_pixel(&to, resize_accumulate, params, in, out, begin, end);
}

/* --------------------------------------------------------------------------------------------------- elementwise */

enum { LAST = FXC_MAX_DIMS - 1 };

/* A walk over the elements of some units of a loop nest: element offsets into every tensor, and the channel. */
typedef struct {
  int32_t unit, channel, index[FXC_MAX_DIMS];
  ptrdiff_t out, in[FXC_MAX_BRANCHES];
} cursor;

static void move(const fxc_loops *loops, cursor *at, int32_t dim, int32_t steps) {
  int32_t i;
  at->index[dim] += steps;
  at->out += (ptrdiff_t)steps * loops->out_stride[dim];
  for (i = 0; i < loops->inputs; ++i) at->in[i] += (ptrdiff_t)steps * loops->in_stride[i][dim];
}

/* The first element of a unit. */
static cursor first_element(const fxc_loops *loops, int32_t unit) {
  cursor at;
  int32_t rest = unit, dim;
  memset(&at, 0, sizeof at);
  at.unit = unit;
  for (dim = LAST - 1; dim >= 0; --dim) {
    move(loops, &at, dim, rest % loops->size[dim]);
    rest /= loops->size[dim];
  }
  at.channel = at.index[loops->channel_dim];
  return at;
}

/* One step along `dim`, carried into the dimensions outside it. */
static void advance(const fxc_loops *loops, cursor *at, int32_t dim) {
  for (; dim >= 0; --dim) {
    at->unit += dim == LAST - 1;
    if (at->index[dim] + 1 < loops->size[dim]) {
      move(loops, at, dim, 1);
      break;
    }
    move(loops, at, dim, -at->index[dim]);
  }
  at->channel = at->index[loops->channel_dim];
}

static void next_element(const fxc_loops *loops, cursor *at) { advance(loops, at, LAST); }

/* From the first element of a row to that of the next. */
static void next_row(const fxc_loops *loops, cursor *at) { advance(loops, at, LAST - 1); }

void fxc_requantize_scalar(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *scratch) {
  const fxc_requantize_map *p = (const fxc_requantize_map *)params;
  const fxc_requantize *q = p->requantize;
  cursor at;
  (void)scratch;
  for (at = first_element(&p->loops, begin); at.unit < end; next_element(&p->loops, &at)) {
    int32_t total = 0, i;
    for (i = 0; i < q->branches; ++i) total += scale_element(&q->branch[i], in[i], at.in[i], at.channel);
    ((uint8_t *)out)[at.out] = finish(q, total, at.channel);
  }
}

void fxc_mul_scalar(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *scratch) {
  const fxc_mul *p = (const fxc_mul *)params;
  cursor at;
  (void)scratch;
  for (at = first_element(&p->loops, begin); at.unit < end; next_element(&p->loops, &at)) {
    const int32_t a = ((const uint8_t *)in[0])[at.in[0]] - p->zero_point[0][at.channel];
    const int32_t b = ((const uint8_t *)in[1])[at.in[1]] - p->zero_point[1][at.channel];
    store(p->requantize, a * b, at.channel, in + 1, at.in + 1, out, at.out);
  }
}

void fxc_widen_scalar(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *scratch) {
  const fxc_widen *p = (const fxc_widen *)params;
  cursor at;
  (void)scratch;
  for (at = first_element(&p->loops, begin); at.unit < end; next_element(&p->loops, &at)) {
    const int32_t code = ((const uint8_t *)in[0])[at.in[0]];
    ((int32_t *)out)[at.out] = code - p->zero_point[at.channel];
  }
}

void fxc_clamp_scalar(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *scratch) {
  const fxc_clamp *p = (const fxc_clamp *)params;
  cursor at;
  (void)scratch;
  for (at = first_element(&p->loops, begin); at.unit < end; next_element(&p->loops, &at)) {
    const int32_t value = ((const int32_t *)in[0])[at.in[0]];
    const int32_t raised = value > p->lo[at.channel] ? value : p->lo[at.channel];
    ((int32_t *)out)[at.out] = raised < p->hi[at.channel] ? raised : p->hi[at.channel];
  }
}

void fxc_rescale_scalar(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *scratch) {
  const fxc_rescale *p = (const fxc_rescale *)params;
  cursor at;
  (void)scratch;
  for (at = first_element(&p->loops, begin); at.unit < end; next_element(&p->loops, &at)) {
    int64_t total = 0;
    int32_t i;
    for (i = 0; i < p->loops.inputs; ++i) {
      const int64_t shift = p->shift[i][at.channel];
      const int64_t product = ((const int32_t *)in[i])[at.in[i]] * p->multiplier[i][at.channel];
      total += shift_right64(product + ((int64_t)1 << (shift - 1)), shift);
    }
    ((int32_t *)out)[at.out] = saturate32(total);
  }
}

void fxc_table_scalar(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *scratch) {
  const fxc_table *p = (const fxc_table *)params;
  cursor at;
  (void)scratch;
  for (at = first_element(&p->loops, begin); at.unit < end; next_element(&p->loops, &at)) {
    const int32_t code = ((const uint8_t *)in[0])[at.in[0]];
    const ptrdiff_t entry = code + (p->per_channel ? 256 * (ptrdiff_t)at.channel : 0);
    if (p->wide)
      ((int32_t *)out)[at.out] = ((const int32_t *)p->table)[entry];
    else
      ((uint8_t *)out)[at.out] = ((const uint8_t *)p->table)[entry];
  }
}

/* memcpy of a known size compiles to a load and a store, and keeps clear of aliasing and alignment rules. */
static void copy_element(void *out, ptrdiff_t to, const void *in, ptrdiff_t from, int32_t bytes) {
  if (bytes == 1)
    ((uint8_t *)out)[to] = ((const uint8_t *)in)[from];
  else if (bytes == 4)
    memcpy((uint8_t *)out + 4 * to, (const uint8_t *)in + 4 * from, 4);
  else
    memcpy((uint8_t *)out + 8 * to, (const uint8_t *)in + 8 * from, 8);
}

void fxc_copy_scalar(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *scratch) {
  const fxc_copy *p = (const fxc_copy *)params;
  const fxc_loops *loops = &p->loops;
  const int32_t dim = p->index_dim, width = loops->size[LAST], from_step = loops->in_stride[0][LAST], to_step = loops->out_stride[LAST];
  const int contiguous = !(p->index && dim == LAST) && from_step == 1 && to_step == 1;
  cursor at;
  int32_t x;
  (void)scratch;
  for (at = first_element(loops, begin); at.unit < end; next_row(loops, &at)) {
    ptrdiff_t from = at.in[0];
    if (p->index && dim != LAST) from += (ptrdiff_t)(p->index[at.index[dim]] - at.index[dim]) * loops->in_stride[0][dim];
    if (contiguous) {
      memcpy((uint8_t *)out + at.out * p->element_bytes, (const uint8_t *)in[0] + from * p->element_bytes,
             (size_t)width * (size_t)p->element_bytes);
      continue;
    }
    for (x = 0; x < width; ++x) {
      const ptrdiff_t source = p->index && dim == LAST ? p->index[x] : x;
      copy_element(out, at.out + (ptrdiff_t)x * to_step, in[0], from + source * from_step, p->element_bytes);
    }
  }
}

void fxc_fill_scalar(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *scratch) {
  const fxc_fill *p = (const fxc_fill *)params;
  const int alike = p->element_bytes == 1 && p->loops.channel_dim != LAST && p->loops.out_stride[LAST] == 1; /* a row */
  cursor at;
  (void)in;
  (void)scratch;
  if (alike) {
    for (at = first_element(&p->loops, begin); at.unit < end; next_row(&p->loops, &at))
      memset((uint8_t *)out + at.out, p->value[at.channel], (size_t)p->loops.size[LAST]);
    return;
  }
  for (at = first_element(&p->loops, begin); at.unit < end; next_element(&p->loops, &at)) {
    if (p->element_bytes == 1)
      ((uint8_t *)out)[at.out] = (uint8_t)p->value[at.channel];
    else
      ((int32_t *)out)[at.out] = p->value[at.channel];
  }
}

void fxc_sum_scalar(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *scratch) {
  const fxc_sum *p = (const fxc_sum *)params;
  const int32_t count = wrap_mul(p->reduced_size[0], wrap_mul(p->reduced_size[1], p->reduced_size[2]));
  cursor at;
  (void)scratch;
  for (at = first_element(&p->loops, begin); at.unit < end; next_element(&p->loops, &at)) {
    const uint8_t *base = (const uint8_t *)in[0] + at.in[0];
    int32_t acc = 0, i, j, k;
    for (i = 0; i < p->reduced_size[0]; ++i)
      for (j = 0; j < p->reduced_size[1]; ++j)
        for (k = 0; k < p->reduced_size[2]; ++k)
          acc = wrap_add(acc, base[(ptrdiff_t)i * p->reduced_stride[0] + (ptrdiff_t)j * p->reduced_stride[1] +
                                   (ptrdiff_t)k * p->reduced_stride[2]]);
    acc = wrap_sub(acc, wrap_mul(p->zero_point[at.channel], count));
    store(p->requantize, acc, at.channel, in, at.in, out, at.out);
  }
}

/* ------------------------------------------------------------------------------------------- softmax, normalization */

static int32_t bit_length(uint64_t value) {
  int32_t bits = 0, step;
  for (step = 32; step; step >>= 1)
    if (value >> step) bits += step, value >>= step;
  return bits + (value != 0);
}

/* y of one element: (value * multiplier + 2^(shift-1)) >> shift. */
static int32_t scale_row(fxc_row_scale row, int32_t value) {
  return shift_right(wrap_add(wrap_mul(value, row.multiplier), 1 << (row.shift - 1)), row.shift);
}

fxc_row_scale fxc_softmax_scale(const fxc_softmax *p, int32_t total) {
  const int32_t bits = bit_length((uint32_t)total);
  fxc_row_scale row = {0, 0, 1};
  if (total > 0) row.multiplier = (int32_t)(((int64_t)1 << (bits + 14)) / total);
  if (bits + 5 - p->table_bits > 1) row.shift = bits + 5 - p->table_bits;
  return row;
}

/* Whether element x of a row takes part. */
static int takes_part(const fxc_softmax *p, const void *const *in, const cursor *row, int32_t x) {
  const ptrdiff_t at = row->in[1] + (ptrdiff_t)x * p->loops.in_stride[1][LAST];
  if (!p->mask_bytes) return 1;
  if (p->mask_bytes == 1) return ((const uint8_t *)in[1])[at] != 0;
  return p->mask_bytes == 4 ? ((const int32_t *)in[1])[at] != 0 : ((const int64_t *)in[1])[at] != 0;
}

void fxc_softmax_scalar(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *scratch) {
  const fxc_softmax *p = (const fxc_softmax *)params;
  const int32_t n = p->loops.size[LAST], coarse = p->table_bits - 15;
  const ptrdiff_t step = p->loops.in_stride[0][LAST];
  cursor row;
  int32_t x;
  (void)scratch;
  for (row = first_element(&p->loops, begin); row.unit < end; next_row(&p->loops, &row)) {
    const uint8_t *codes = (const uint8_t *)in[0] + row.in[0];
    int32_t largest = -1, total = 0;
    fxc_row_scale scale;
    for (x = 0; x < n; ++x)
      if (codes[x * step] > largest && takes_part(p, in, &row, x)) largest = codes[x * step];
    for (x = 0; x < n; ++x)
      if (takes_part(p, in, &row, x)) total = wrap_add(total, p->table[largest - codes[x * step]]);
    scale = fxc_softmax_scale(p, total);
    for (x = 0; x < n; ++x) {
      const int32_t e = takes_part(p, in, &row, x) ? p->table[largest - codes[x * step]] : 0;
      const int32_t t = shift_right(e + ((1 << coarse) >> 1), coarse);
      store(p->requantize, scale_row(scale, t), x, NULL, NULL, out, row.out + (ptrdiff_t)x * p->loops.out_stride[LAST]);
    }
  }
}

/* floor(sqrt(v)), 2^60 <= v < 2^62: Newton's steps from above. The first, from 1.5 2^30, needs no division and is at most 9 % off; the
   fourth 2^-36. */
static int64_t integer_root(int64_t v) {
  int64_t root = ((int64_t)3 << 28) + (v >> 30) / 3;
  int32_t i;
  for (i = 0; i < 3; ++i) root = (root + v / root) >> 1;
  return root * root > v ? root - 1 : root;
}

/* m, s with 2^(fraction_bits - 7) n / sqrt(v) ~ m / 2^s; m = 0 where s would leave 1..31, and for v = 0. */
static int32_t inverse_root(int64_t v, int64_t n, int32_t fraction_bits, int32_t *s) {
  const int32_t half = (62 - bit_length((uint64_t)v)) >> 1, c = 62 - bit_length((uint64_t)n);
  const int64_t root = v ? integer_root(v << (2 * half)) : 1, g = (n << c) / root;
  const int32_t excess = bit_length((uint64_t)g) - 15;
  const int32_t m = (int32_t)((g + ((int64_t)1 << (excess - 1))) >> excess), carry = (m >> 15) & 1;
  *s = c - half - (fraction_bits - 7) - excess - carry;
  if (v > 0 && *s >= 1 && *s <= 31) return m >> carry;
  *s = 1;
  return 0;
}

/* floor(a / b) for b > 0. */
static int64_t floor_divide(int64_t a, int64_t b) { return a / b - (a % b < 0); }

fxc_row_scale fxc_layer_norm_scale(const fxc_layer_norm *p, int64_t total, int64_t squares) {
  const int64_t n = p->loops.size[LAST], zero = p->zero_point;
  fxc_row_scale row;
  if (p->use_zero_point) {
    row.mean = (int32_t)(128 * zero);
    row.multiplier = inverse_root(n * (squares - 2 * zero * total + n * zero * zero) + p->epsilon, n, p->fraction_bits, &row.shift);
  } else {
    row.mean = (int32_t)floor_divide(total * 128 + n / 2, n);
    row.multiplier = inverse_root(n * squares - total * total + p->epsilon, n, p->fraction_bits, &row.shift);
  }
  return row;
}

void fxc_layer_norm_scalar(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *scratch) {
  const fxc_layer_norm *p = (const fxc_layer_norm *)params;
  const ptrdiff_t step = p->loops.in_stride[0][LAST];
  cursor row;
  (void)scratch;
  for (row = first_element(&p->loops, begin); row.unit < end; next_row(&p->loops, &row)) {
    const uint8_t *codes = (const uint8_t *)in[0] + row.in[0];
    int64_t total = 0, squares = 0;
    fxc_row_scale scale;
    cursor at = row;
    int32_t x;
    for (x = 0; x < p->loops.size[LAST]; ++x) total += codes[x * step], squares += codes[x * step] * codes[x * step];
    scale = fxc_layer_norm_scale(p, total, squares);
    for (x = 0; x < p->loops.size[LAST]; ++x, move(&p->loops, &at, LAST, 1)) {
      const int32_t y = scale_row(scale, ((const uint8_t *)in[0])[at.in[0]] * 128 - scale.mean);
      store(p->requantize, y, x, in, at.in, out, at.out);
    }
  }
}

void fxc_embedding_scalar(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *scratch) {
  const fxc_embedding *p = (const fxc_embedding *)params;
  const size_t width = (size_t)p->loops.size[LAST] * (size_t)p->element_bytes;
  cursor row;
  int32_t bad = 0;
  (void)scratch;
  for (row = first_element(&p->loops, begin); row.unit < end; next_row(&p->loops, &row)) {
    const int64_t index = ((const int64_t *)in[1])[row.in[1]];
    uint8_t *y = (uint8_t *)out + row.out * p->element_bytes;
    if (index >= 0 && index < p->rows) {
      memcpy(y, (const uint8_t *)in[0] + index * p->row_stride * p->element_bytes, width);
    } else {
      memset(y, 0, width);
      ++bad;
    }
  }
  if (bad) { /* threads may lose counts to each other, never the fact that there were any */
    int32_t *counter = (int32_t *)(uintptr_t)in[2];
    *counter += bad;
  }
}

/* ------------------------------------------------------------------------------------------------ indices and masks */

static int64_t load_integer(const void *tensor, ptrdiff_t at, int32_t bytes) {
  if (bytes == 1) return ((const uint8_t *)tensor)[at] != 0;
  return bytes == 4 ? ((const int32_t *)tensor)[at] : ((const int64_t *)tensor)[at];
}

static void store_integer(void *tensor, ptrdiff_t at, int32_t bytes, int64_t value) {
  if (bytes == 1)
    ((uint8_t *)tensor)[at] = value != 0;
  else if (bytes == 4)
    ((int32_t *)tensor)[at] = (int32_t)(uint32_t)(uint64_t)value;
  else
    ((int64_t *)tensor)[at] = value;
}

static int64_t combine(int32_t operation, int64_t a, int64_t b) {
  switch (operation) {
    case FXC_NE: return a != b;
    case FXC_EQ: return a == b;
    case FXC_NOT: return a == 0;
    case FXC_AND: return a && b;
    case FXC_OR: return a || b;
    case FXC_ADD: return (int64_t)((uint64_t)a + (uint64_t)b);
    case FXC_SUB: return (int64_t)((uint64_t)a - (uint64_t)b);
    case FXC_MUL: return (int64_t)((uint64_t)a * (uint64_t)b);
    default: return a;
  }
}

void fxc_logic_scalar(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *scratch) {
  const fxc_logic *p = (const fxc_logic *)params;
  uint64_t running = 0;
  cursor at;
  (void)scratch;
  for (at = first_element(&p->loops, begin); at.unit < end; next_element(&p->loops, &at)) {
    const int64_t a = load_integer(in[0], at.in[0], p->in_bytes[0]);
    const int64_t b = p->loops.inputs > 1 ? load_integer(in[1], at.in[1], p->in_bytes[1]) : p->scalar;
    running = (at.index[LAST] ? running : 0) + (uint64_t)a;
    store_integer(out, at.out, p->out_bytes, p->operation == FXC_CUMSUM ? (int64_t)running : combine(p->operation, a, b));
  }
}
