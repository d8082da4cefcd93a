/* Convolution by gathering the taps of a few pixels into rows of scratch (im2col), which meet all blocks of 16 output channels: any
   kernel, stride, dilation, padding, groups. The parts that do not depend on the instruction set.

   The includer defines before:
       element, weight_element   what the taps of a pixel and the weights are stored as
       PART                      elements per 32-bit lane, summed by one instruction
       TILE                      pixels of a register tile
       CODE_OFFSET               what is subtracted from the codes when they are gathered (0, or 128 to make them signed)
       GROUP = 16, place_of, group_constants, pack_group: the order of a block's channels and their constants
       copy_codes(target, from, count)  stores codes as elements; may read and write up to 31 more
   and after:
       run_tile(g, b, x, d, pixel, count)  computes count <= TILE pixels from rows at x

   Unit: (PIXELS pixels, block of 16 channels of a group), blocks innermost. Packed: the pad values, then per block bias (16, in the
   order of place_of, CODE_OFFSET folded in), group_constants, weights (parts of k, 16 channels in that order, PART), zero padded.
   Reads up to 64 bytes past an input and a branch. */

#include "kernel_row.h"

namespace {

constexpr int32_t PIXELS = 24; /* gathered at a time: a multiple of TILE */

/* ------------------------------------------------------------------------------------------------------- geometry */

struct geometry {
  int32_t depth, outs;         /* channels of a group */
  int32_t k, parts;            /* length of the reduction; in lanes */
  int32_t group_blocks, blocks; /* of 16 output channels: of a group, in all */
  int32_t pixels, pixel_groups;
  int64_t pad_bytes, block_bytes, row; /* row: elements of a gathered pixel */
};

geometry geometry_of(const fxc_conv *p) {
  geometry g;
  g.depth = p->in_channels / p->groups, g.outs = p->out_channels / p->groups;
  g.k = p->kernel[0] * p->kernel[1] * p->kernel[2] * g.depth;
  g.parts = (g.k + PART - 1) / PART;
  g.group_blocks = (g.outs + GROUP - 1) / GROUP, g.blocks = p->groups * g.group_blocks;
  g.pixels = p->batch * p->out_size[0] * p->out_size[1] * p->out_size[2];
  g.pixel_groups = (g.pixels + PIXELS - 1) / PIXELS;
  const int64_t weights = (int64_t)g.parts * GROUP * PART * (int64_t)sizeof(weight_element);
  g.block_bytes = (64 + (int64_t)sizeof(group_constants) + weights + 63) / 64 * 64;
  g.pad_bytes = (p->in_channels + 31 + 63) / 64 * 64; /* copy_codes reads past the last group's */
  g.row = (g.k + 31) / 32 * 32 + 32;
  return g;
}

struct block {
  const int32_t *bias;
  const group_constants *constants;
  const weight_element *weight;
  int32_t first, count; /* output channels */
};

block block_at(const geometry &g, const uint8_t *packed, int32_t index) {
  const uint8_t *start = packed + g.pad_bytes + index * g.block_bytes;
  const int32_t inside = index % g.group_blocks * GROUP, left = g.outs - inside;
  const group_constants *constants = (const group_constants *)(start + 64);
  return {(const int32_t *)start, constants, (const weight_element *)(constants + 1), index / g.group_blocks * g.outs + inside,
          left < GROUP ? left : GROUP};
}

/* -------------------------------------------------------------------------------------------------------- packing */

size_t packed_bytes(const void *params) {
  const geometry g = geometry_of((const fxc_conv *)params);
  return (size_t)(g.pad_bytes + g.blocks * g.block_bytes);
}

void pack(const void *params, void *packed) {
  const fxc_conv *p = (const fxc_conv *)params;
  const geometry g = geometry_of(p);
  memset(packed, 0, packed_bytes(params));
  memcpy(packed, p->pad_value, (size_t)p->in_channels);
  for (int32_t i = 0; i < g.blocks; ++i) {
    const block b = block_at(g, (const uint8_t *)packed, i);
    pack_group((group_constants *)b.constants, p->requantize, b.first, b.count);
    for (int32_t c = 0; c < b.count; ++c) {
      const int8_t *row = p->weight + (int64_t)(b.first + c) * g.k;
      int32_t sum = 0;
      for (int32_t k = 0; k < g.k; ++k) {
        const int64_t at = ((int64_t)(k / PART) * GROUP + place_of(c)) * PART + k % PART;
        ((weight_element *)b.weight)[at] = row[k];
        sum += row[k];
      }
      ((int32_t *)b.bias)[place_of(c)] = (int32_t)((uint32_t)p->bias[b.first + c] + (uint32_t)(sum * CODE_OFFSET));
    }
  }
}

int32_t units(const void *params) {
  const geometry g = geometry_of((const fxc_conv *)params);
  return g.pixel_groups * g.blocks;
}

size_t scratch_bytes(const void *params) {
  const geometry g = geometry_of((const fxc_conv *)params);
  return (size_t)(PIXELS * g.row) * sizeof(element);
}

/* ------------------------------------------------------------------------------------------------------ gathering */

/* The taps of one kernel row from input column w on, of `depth` channels; row NULL: outside. Returns the end. */
inline element *gather_kernel_row(const fxc_conv *p, int32_t depth, const uint8_t *row, const uint8_t *pad, int32_t w, element *target) {
  const int32_t width = p->kernel[2];
  if (row && p->dilation[2] == 1 && p->in_pixel_stride == depth && w >= 0 && w + width <= p->in_size[2]) {
    copy_codes(target, row + (ptrdiff_t)w * depth, width * depth);
    return target + width * depth;
  }
  for (int32_t i = 0; i < width; ++i, w += p->dilation[2], target += depth)
    copy_codes(target, row && w >= 0 && w < p->in_size[2] ? row + (ptrdiff_t)w * p->in_pixel_stride : pad, depth);
  return target;
}

/* The taps of output pixel (n, d, h, w), channels from..from + depth - 1. The packed weights begin with the pad values. */
void gather_pixel(const fxc_conv *p, const geometry &g, const uint8_t *x, int32_t from, const int32_t at[4], element *target) {
  const uint8_t *image = x + (ptrdiff_t)at[0] * p->in_image_stride + from;
  int32_t origin[3];
  for (int i = 0; i < 3; ++i) origin[i] = at[i + 1] * p->stride[i] - p->pad_before[i];
  for (int32_t a = 0; a < p->kernel[0]; ++a)
    for (int32_t b = 0; b < p->kernel[1]; ++b) {
      const int32_t d = origin[0] + a * p->dilation[0], h = origin[1] + b * p->dilation[1];
      const bool inside = d >= 0 && d < p->in_size[0] && h >= 0 && h < p->in_size[1];
      const uint8_t *row = inside ? image + (ptrdiff_t)d * p->in_plane_stride + (ptrdiff_t)h * p->in_row_stride : NULL;
      target = gather_kernel_row(p, g.depth, row, (const uint8_t *)p->weight + from, origin[2], target);
    }
}

void gather_pixels(const fxc_conv *p, const geometry &g, const uint8_t *x, int32_t from, int32_t first, int32_t count, element *target) {
  int32_t at[4], rest = first;
  for (int i = 3; i > 0; --i) at[i] = rest % p->out_size[i - 1], rest /= p->out_size[i - 1];
  at[0] = rest;
  for (; count > 0; --count, target += g.row) {
    gather_pixel(p, g, x, from, at, target);
    int i = 3;
    while (i > 0 && ++at[i] == p->out_size[i - 1]) at[i--] = 0;
    at[0] += i == 0;
  }
}

/* ------------------------------------------------------------------------------------------------------------ run */

void run_tile(const geometry &g, const block &b, const element *x, const destination &d, int32_t pixel, int32_t count);

void run(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *scratch) {
  const fxc_conv *p = (const fxc_conv *)params;
  const geometry g = geometry_of(p);
  const destination d = {p->requantize, in, p->branch_pixel_stride, out, p->out_pixel_stride};
  element *rows = (element *)scratch;
  int32_t gathered = -1; /* (pixel group, channel group) in scratch */
  for (int32_t unit = begin; unit < end; ++unit) {
    const int32_t first = unit / g.blocks * PIXELS, index = unit % g.blocks, from = index / g.group_blocks;
    const int32_t count = g.pixels - first < PIXELS ? g.pixels - first : PIXELS;
    if (unit / g.group_blocks != gathered) gather_pixels(p, g, (const uint8_t *)in[0], from * g.depth, first, count, rows);
    gathered = unit / g.group_blocks;
    const block b = block_at(g, (const uint8_t *)p->weight, index);
    for (int32_t i = 0; i < count; i += TILE) run_tile(g, b, rows + i * g.row, d, first + i, count - i < TILE ? count - i : TILE);
  }
}

}  // namespace
