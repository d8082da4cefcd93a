// The rows of the portable kernels of fxc_kernels.c.

#include "kernel_row.h"

namespace {

int32_t pixels(int32_t batch, const int32_t size[3]) { return batch * size[0] * size[1] * size[2]; }

template <typename Params>
int32_t pixel_units(const void *params) {
  const Params &p = *static_cast<const Params *>(params);
  return pixels(p.batch, p.out_size);
}

int32_t matmul_units(const void *params) {
  const fxc_matmul &p = *static_cast<const fxc_matmul *>(params);
  return p.rows * pixels(1, p.size);
}

int32_t bilinear_units(const void *params) {
  const fxc_bilinear_linear &p = *static_cast<const fxc_bilinear_linear *>(params);
  return (p.rows + p.p - 1) / p.p;
}

int32_t matrix_units(const void *params) { return pixels(1, static_cast<const fxc_bilinear_matmul *>(params)->product.size); }

size_t bilinear_scratch(const void *params) {
  return (size_t)fxc_bilinear_linear_scratch(static_cast<const fxc_bilinear_linear *>(params));
}

size_t matrix_scratch(const void *params) {
  return (size_t)fxc_bilinear_matmul_scratch(static_cast<const fxc_bilinear_matmul *>(params));
}

int is_alone(const void *params) {
  const fxc_requantize *q = static_cast<const fxc_bilinear_matmul *>(params)->product.requantize;
  return !q || q->branches == 1;
}

// Every elementwise parameter struct begins with its loop nest.
int32_t row_units(const void *params) {
  const fxc_loops &loops = *static_cast<const fxc_loops *>(params);
  int32_t count = 1;
  for (int dim = 0; dim < FXC_MAX_DIMS - 1; ++dim) count *= loops.size[dim];
  return count;
}

constexpr fxc_kernel scalar(const char *name, const char *op, int32_t (*units)(const void *), fxc_run run) {
  return {name, op, "scalar", nullptr, nullptr, nullptr, units, nullptr, run};
}

}  // namespace

extern "C" {
extern const fxc_kernel fxc_u8_conv__scalar = scalar("fxc_u8_conv__scalar", "conv", pixel_units<fxc_conv>, fxc_conv_scalar);
extern const fxc_kernel fxc_u8_matmul__scalar = scalar("fxc_u8_matmul__scalar", "matmul", matmul_units, fxc_matmul_scalar);
extern const fxc_kernel fxc_u8_bilinear_linear__scalar = {
    "fxc_u8_bilinear_linear__scalar", "bilinear_linear", "scalar", nullptr, nullptr, nullptr, bilinear_units, bilinear_scratch,
    fxc_bilinear_linear_scalar};
extern const fxc_kernel fxc_u8_bilinear_matmul__scalar = {
    "fxc_u8_bilinear_matmul__scalar", "bilinear_matmul", "scalar", is_alone, nullptr, nullptr, matrix_units, matrix_scratch,
    fxc_bilinear_matmul_scalar};
extern const fxc_kernel fxc_u8_pool__scalar = scalar("fxc_u8_pool__scalar", "pool", pixel_units<fxc_pool>, fxc_pool_scalar);
extern const fxc_kernel fxc_u8_resize__scalar =
    scalar("fxc_u8_resize__scalar", "resize", pixel_units<fxc_resize>, fxc_resize_scalar);
extern const fxc_kernel fxc_s32_requantize__scalar =
    scalar("fxc_s32_requantize__scalar", "requantize", row_units, fxc_requantize_scalar);
extern const fxc_kernel fxc_u8_mul__scalar = scalar("fxc_u8_mul__scalar", "mul", row_units, fxc_mul_scalar);
extern const fxc_kernel fxc_u8_widen__scalar = scalar("fxc_u8_widen__scalar", "widen", row_units, fxc_widen_scalar);
extern const fxc_kernel fxc_s32_clamp__scalar = scalar("fxc_s32_clamp__scalar", "clamp", row_units, fxc_clamp_scalar);
extern const fxc_kernel fxc_s32_rescale__scalar = scalar("fxc_s32_rescale__scalar", "rescale", row_units, fxc_rescale_scalar);
extern const fxc_kernel fxc_u8_table__scalar = scalar("fxc_u8_table__scalar", "table", row_units, fxc_table_scalar);
extern const fxc_kernel fxc_copy__scalar = scalar("fxc_copy__scalar", "copy", row_units, fxc_copy_scalar);
extern const fxc_kernel fxc_fill__scalar = scalar("fxc_fill__scalar", "fill", row_units, fxc_fill_scalar);
extern const fxc_kernel fxc_u8_sum__scalar = scalar("fxc_u8_sum__scalar", "sum", row_units, fxc_sum_scalar);
extern const fxc_kernel fxc_u8_softmax__scalar = scalar("fxc_u8_softmax__scalar", "softmax", row_units, fxc_softmax_scalar);
extern const fxc_kernel fxc_u8_layer_norm__scalar =
    scalar("fxc_u8_layer_norm__scalar", "layer_norm", row_units, fxc_layer_norm_scalar);
extern const fxc_kernel fxc_embedding__scalar = scalar("fxc_embedding__scalar", "embedding", row_units, fxc_embedding_scalar);
extern const fxc_kernel fxc_logic__scalar = scalar("fxc_logic__scalar", "logic", row_units, fxc_logic_scalar);
}
