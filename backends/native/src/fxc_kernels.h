/* The kernels of the integer dialect: parameters and scalar implementations (C99, no float, no malloc, no libm).

   numerics.py defines the arithmetic; every kernel computes the same bits as fxcompress/reference_*.py. The SIMD kernels of
   the native library take the same parameters, and the C exporter emits this file and fxc_kernels.c as they are.

   Tensors are channels last: an activation (N, C, D, H, W) lies in memory as (N, D, H, W, C), C contiguous. Strides and
   sizes count elements. All sums wrap like two's complement int32 (computed in uint32_t: signed overflow is undefined).

   Every kernel has one signature:

       void kernel(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *scratch)

   It computes the work units begin..end-1 (what a unit is stands with each parameter struct; any split into ranges gives the
   same result, so threads share a step by ranges). `in` lists the input tensors in the order stated there. `scratch` is
   private to the calling thread.

   Reads past the end: per-channel arrays are read element by element here; SIMD kernels read them up to the next multiple of
   64 elements, and may read up to 64 bytes past any activation, which the native plan provides room for. */

#ifndef FXC_KERNELS_H
#define FXC_KERNELS_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FXC_MAX_DIMS 6
#define FXC_MAX_BRANCHES 16

/* -------------------------------------------------------------------------------------------------- requantization */

/* One branch of a requantization: t = sat16(((v + offset) << left_shift) >> right_shift); u = (t * multiplier + 2^14) >> 15
   with v the int32 accumulator or the uint8 code. `offset` is the rounding constant r, minus the zero point for codes; a
   kernel that has a bias (convolution) has r folded into the bias and an offset of zeros that it does not read.
   0 <= left_shift, 0 <= right_shift <= 31, 2^14 <= |multiplier| < 2^15 or 0. */
typedef struct {
  const int32_t *offset;      /* (channels) */
  const int32_t *right_shift; /* (channels) p */
  const int16_t *multiplier;  /* (channels) m */
  int32_t left_shift;         /* l */
  int32_t wide;               /* 0: uint8 codes; 1: int32 accumulators (branches after the first, and generic steps) */
} fxc_branch;

/* y = clamp(sat16(sat16(sum of u) + zero) >> guard_bits, lo, hi); with a table, table[y]. */
typedef struct {
  int32_t branches;         /* 1..FXC_MAX_BRANCHES; branch 0 is what the kernel itself computes, the others are tensors */
  int32_t channels;         /* length of the per-channel arrays */
  int32_t guard_bits;       /* k, 0..6 */
  int32_t reserved;
  const fxc_branch *branch; /* (branches) */
  const int16_t *zero;      /* (channels) (zero_point << k) + 2^(k-1) */
  const uint8_t *lo, *hi;   /* (channels) bounds of the codes */
  const uint8_t *table;     /* NULL, or 256 codes: an elementwise function applied last */
} fxc_requantize;

/* --------------------------------------------------------------------------------------------------- convolution */

/* Convolution in 1..3 spatial dimensions (index 0 depth, 1 height, 2 width; missing ones have size 1), linear layers (one
   pixel per row) and depthwise convolution (groups == in_channels == out_channels).

   acc[o] = bias[o] + sum over taps and channels of weight * x, border pixels hold pad_value; then requantized to uint8 if
   `requantize` is set, else stored as int32.
   in[0] x uint8; in[i] for i >= 1: branch i of the requantization, uint8 codes (int32 if `wide`) shaped like the output,
   with pixel stride branch_pixel_stride[i]. out: uint8 or int32, pixel p at p * out_pixel_stride.
   weight: rows (out_channels, kernel d, h, w, in_channels / groups) int8 for the scalar kernel; other kernels pack their own.
   Proven before: |bias| + sum |weight| * 255 fits int32 with the left shift of branch 0.
   Unit: one output pixel (n, d, h, w order, batch * output pixels in all). */
typedef struct {
  int32_t batch, in_channels, out_channels, groups;
  int32_t in_size[3], out_size[3], kernel[3], stride[3], dilation[3], pad_before[3];
  int32_t in_image_stride, in_plane_stride, in_row_stride, in_pixel_stride; /* elements from one n, d, h, w to the next */
  int32_t out_pixel_stride;
  int32_t branch_pixel_stride[FXC_MAX_BRANCHES];
  int32_t reserved;
  const int8_t *weight;
  const int32_t *bias;              /* (out_channels) with zero point and rounding constant folded in */
  const uint8_t *pad_value;         /* (in_channels) */
  const fxc_requantize *requantize; /* NULL: int32 output */
} fxc_conv;

void fxc_conv_scalar(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *scratch);

/* -------------------------------------------------------------------------------------------------------- matmul */

/* acc = (a - a_zero_point) @ (b - b_zero_point), batched; in[0] a uint8 (rows, depth), in[1] b uint8 (depth, columns), in[1 + i]
   branch i of the requantization, laid out like the output. Channels of the requantization are the columns.
   Unit: one output row (batch * rows in all; batch dimensions in order, size[0] outermost). */
typedef struct {
  int32_t size[3], rows, columns, depth;
  int32_t a_stride[3], a_row_stride, a_depth_stride;
  int32_t b_stride[3], b_depth_stride, b_column_stride;
  int32_t out_stride[3], out_row_stride;
  int32_t a_zero_point, b_zero_point;
  const fxc_requantize *requantize; /* NULL: int32 output */
} fxc_matmul;

void fxc_matmul_scalar(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *scratch);

/* ---------------------------------------------------------------------------------------------- products in blocks */

/* A straight-line program for sums of terms: step k computes term inputs + k = ci t_i + cj t_j from (i, ci, j, cj); result r is term
   result[r]. Wraps. */
typedef struct {
  int32_t steps, results;
  const int32_t *step;   /* (steps, 4) */
  const int32_t *result; /* (results) */
} fxc_sums;

/* A linear layer by a bilinear algorithm for blocks n x m (of the weight) and m x p (of x^T) with `products` products
   (reference_bilinear.py). Row r of x belongs to block r % p; channels are cut into m blocks of ceil(depth / m), outputs into n blocks of
   ceil(outputs / n). What is missing is 0. Sums of blocks fit int16 (proven); products and their sums wrap.
   in[0] x uint8, row r at r * in_pixel_stride; in[i], out, branches as in fxc_conv.
   encode: terms (m, p) of x - zero_point to the operands of the products. decode: terms (products) to the blocks (n, p).
   weight: (products, ceil(outputs / n), ceil(depth / m)) sums of blocks for the scalar kernel; other kernels pack their own.
   Unit of the scalar kernel: p rows. */
typedef struct {
  int32_t rows, depth, outputs, n, m, p, products, in_pixel_stride, out_pixel_stride;
  int32_t branch_pixel_stride[FXC_MAX_BRANCHES], reserved;
  fxc_sums encode, decode;
  const int32_t *zero_point;        /* (depth) */
  const int16_t *weight;
  const int32_t *bias;              /* (outputs) with the rounding constant folded in */
  const fxc_requantize *requantize; /* NULL: int32 output */
} fxc_bilinear_linear;

/* A batched product of two activations in blocks; blocks follow each other in every dimension. Unit: one matrix of the batch. */
typedef struct {
  fxc_matmul product;
  int32_t n, m, p, products;
  fxc_sums encode_a, encode_b, decode;
} fxc_bilinear_matmul;

int64_t fxc_bilinear_linear_scratch(const fxc_bilinear_linear *params); /* bytes */
int64_t fxc_bilinear_matmul_scratch(const fxc_bilinear_matmul *params);
void fxc_bilinear_linear_scalar(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *scratch);
void fxc_bilinear_matmul_scalar(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *scratch);

/* --------------------------------------------------------------------------------------------------------- pools */

/* Sum (minus the zero points) or maximum over windows: window i of dimension d covers start[d][i], + dilation[d], ... < end[d][i].
   Windows are clipped to the image; an empty one gives 0. Average pools, adaptive pools and means are sums.
   in[0] uint8; in[i] branch i as in fxc_conv. out: the maximum as uint8; the sum requantized, or as int32.
   Unit: one output pixel. */
typedef struct {
  int32_t batch, channels;
  int32_t out_size[3], dilation[3];
  int32_t in_image_stride, in_stride[3];
  int32_t out_pixel_stride, maximum;
  int32_t branch_pixel_stride[FXC_MAX_BRANCHES];
  const int32_t *start[3], *end[3]; /* (out_size[d]) */
  const int32_t *zero_point;        /* (channels); sums only */
  const fxc_requantize *requantize; /* NULL: int32 sums, or the maximum */
} fxc_pool;

void fxc_pool_scalar(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *scratch);

/* -------------------------------------------------------------------------------------------------------- resize */

/* Linear interpolation of x - zero_point along the last `dims` of depth, height, width: (2^f - w1) * x[index0] + w1 * x[index1]
   along each, without rounding. The other dimensions keep their size. Unit: one output pixel. */
typedef struct {
  int32_t batch, channels, dims, fraction_bits;
  int32_t out_size[3];
  int32_t in_image_stride, in_stride[3];
  int32_t out_pixel_stride, reserved;
  int32_t branch_pixel_stride[FXC_MAX_BRANCHES];
  const int32_t *index0[3], *index1[3], *weight1[3]; /* (out_size[d]) for the interpolated dimensions */
  const int32_t *zero_point;                         /* (channels) */
  const fxc_requantize *requantize;                  /* NULL: int32 output */
} fxc_resize;

void fxc_resize_scalar(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *scratch);

/* --------------------------------------------------------------------------------------------------- elementwise */

/* The loop nest of every elementwise kernel: an output of FXC_MAX_DIMS dimensions (innermost last, missing ones of size 1 in front)
   and strided inputs (stride 0 broadcasts). Per-channel arrays are indexed by dimension `channel_dim`; they have as many entries
   as that dimension. Unit: one innermost row (product of all other sizes). */
typedef struct {
  int32_t size[FXC_MAX_DIMS], out_stride[FXC_MAX_DIMS];
  int32_t in_stride[FXC_MAX_BRANCHES][FXC_MAX_DIMS];
  int32_t inputs, channel_dim;
} fxc_loops;

/* Requantization of the sum of all inputs: input i is branch i (codes, or int32 if `wide`). */
typedef struct {
  fxc_loops loops;
  const fxc_requantize *requantize;
} fxc_requantize_map;

/* (in[0] - zero_point[0]) * (in[1] - zero_point[1]), int32, or requantized with in[1 + i] as branch i. */
typedef struct {
  fxc_loops loops;
  const int32_t *zero_point[2]; /* (channels) */
  const fxc_requantize *requantize;
} fxc_mul;

/* int32 x - zero_point of codes. */
typedef struct {
  fxc_loops loops;
  const int32_t *zero_point; /* (channels) */
} fxc_widen;

/* min(max(x, lo), hi) of int32. */
typedef struct {
  fxc_loops loops;
  const int32_t *lo, *hi; /* (channels) */
} fxc_clamp;

/* sat32(sum of (in[i] * multiplier[i] + 2^(shift[i]-1)) >> shift[i]) of int32 inputs: the 31-bit form of numerics.py. */
typedef struct {
  fxc_loops loops;
  const int64_t *multiplier[FXC_MAX_BRANCHES]; /* (channels) */
  const int64_t *shift[FXC_MAX_BRANCHES];      /* (channels), 1..62 */
} fxc_rescale;

/* table[x]: 256 entries, or 256 per channel; uint8 or int32 entries. */
typedef struct {
  fxc_loops loops;
  const void *table;
  int32_t per_channel, wide;
} fxc_table;

/* The input elsewhere: any movement of values. element_bytes 1, 4 or 8; index, if set, selects along dimension index_dim of the
   output: element i of it comes from index[i]. */
typedef struct {
  fxc_loops loops;
  const int32_t *index;
  int32_t index_dim, element_bytes;
} fxc_copy;

/* value[channel] everywhere. No inputs. */
typedef struct {
  fxc_loops loops;
  const int32_t *value; /* (channels) */
  int32_t element_bytes, reserved;
} fxc_fill;

/* Sum of in[0] - zero_point over further dimensions of the input; int32, or requantized with in[i] as branch i. */
typedef struct {
  fxc_loops loops;
  int32_t reduced_size[3], reduced_stride[3];
  const int32_t *zero_point; /* (channels) */
  const fxc_requantize *requantize;
} fxc_sum;

void fxc_requantize_scalar(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *scratch);
void fxc_mul_scalar(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *scratch);
void fxc_widen_scalar(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *scratch);
void fxc_clamp_scalar(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *scratch);
void fxc_rescale_scalar(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *scratch);
void fxc_table_scalar(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *scratch);
void fxc_copy_scalar(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *scratch);
void fxc_fill_scalar(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *scratch);
void fxc_sum_scalar(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *scratch);

/* ------------------------------------------------------------------------------------------- softmax, normalization */

/* Softmax and layer normalization over the innermost dimension of codes; the arithmetic is that of reference_normalization.py.
   int32 results, or requantized, with the innermost dimension as channels. One unit is one row.

   Softmax: in[0] x uint8; in[1], if masked, elements of mask_bytes that are nonzero where x takes part. table (256) holds
   2^table_bits exp(-s d). The proof: row length * 2^table_bits < 2^31. The requantization has one branch. */
typedef struct {
  fxc_loops loops;
  const int32_t *table;
  int32_t table_bits, mask_bytes; /* mask_bytes 0: no mask */
  const fxc_requantize *requantize;
} fxc_softmax;

/* in[0] x uint8; in[i] branch i. With use_zero_point the row is divided by its root mean square around zero_point, else by its
   deviation around its mean. epsilon < 2^60 is added to the spread; row length <= 2^21. */
typedef struct {
  fxc_loops loops;
  int64_t epsilon;
  int32_t fraction_bits, use_zero_point, zero_point, reserved;
  const fxc_requantize *requantize;
} fxc_layer_norm;

/* What is computed once per row: results are ((x - mean) * multiplier + 2^(shift-1)) >> shift, x the rounded exponentials (mean 0) or
   128 times the codes. From the sum of the exponentials, or the sums of the codes and their squares. */
typedef struct {
  int32_t mean, multiplier, shift;
} fxc_row_scale;

fxc_row_scale fxc_softmax_scale(const fxc_softmax *params, int32_t total);
fxc_row_scale fxc_layer_norm_scale(const fxc_layer_norm *params, int64_t total, int64_t squares);

/* in[0] codes (rows, width), width the innermost size, element_bytes each; in[1] int64 indices: row in[1][unit] for each unit.
   in[2] an int32 counter: indices outside 0..rows-1 are added to it, and give zeros. */
typedef struct {
  fxc_loops loops; /* of the output; in_stride[1] is that of the indices */
  int32_t rows, row_stride, element_bytes, reserved;
} fxc_embedding;

/* Arithmetic and logic on indices and masks (integers that are no codes): operands are int64, int32, or booleans of one byte.
   Operand b is in[1], or `scalar` when there is one input. Sums wrap. FXC_CUMSUM sums along the innermost dimension. */
enum { FXC_NE, FXC_EQ, FXC_NOT, FXC_AND, FXC_OR, FXC_CONVERT, FXC_ADD, FXC_SUB, FXC_MUL, FXC_CUMSUM };

typedef struct {
  fxc_loops loops;
  int64_t scalar;
  int32_t operation, out_bytes, in_bytes[2]; /* 1: boolean */
} fxc_logic;

void fxc_logic_scalar(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *scratch);
void fxc_softmax_scalar(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *scratch);
void fxc_layer_norm_scalar(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *scratch);
void fxc_embedding_scalar(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *scratch);

#ifdef __cplusplus
}
#endif
#endif
