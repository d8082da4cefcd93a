/* The scratch of conv_amx.cpp and the planes in it. Everything is static; include it after the target pragma. */

#ifndef FXC_CONV_AMX_INPUT_H
#define FXC_CONV_AMX_INPUT_H

#include "conv_amx_geometry.h"

namespace {

constexpr int32_t DROPPED = -1; /* the pixel of a row that is not stored */

/* -------------------------------------------------------------------------------------------------------- scratch */

/* Where the rows of a block go. */
struct row_table {
  alignas(64) int32_t pixel[BLOCK_ROWS + 16];   /* of the output, or DROPPED */
  alignas(64) ptrdiff_t out[BLOCK_ROWS + 8];    /* bytes from the output (uint8) to the pixel, or to workspace.dropped */
  alignas(64) ptrdiff_t branch[BLOCK_ROWS + 8]; /* bytes from branch 1 to the pixel; 0 for dropped rows */
};

struct workspace {
  int32_t *offset;      /* (steps) from a position to its bytes of step s */
  row_table *rows;      /* (slots) */
  int32_t *accumulator; /* 2 in turns: (BLOCK_ROWS, W, 16) */
  uint8_t *dropped;     /* a pixel to write dropped rows to */
  uint8_t *pad;         /* a piece of pad values */
  uint8_t *input;       /* planes or windows */
  int64_t bytes;
};

constexpr int32_t SLOTS = 2; /* of blocks, in turns, because one waits for its requantization; panel-major, all stay in the workspace */

int32_t slots_of(const geometry &g) { return g.panel_major ? g.images * g.blocks : SLOTS; }

/* The next `bytes` of scratch; with scratch NULL they are only counted. */
uint8_t *take(void *scratch, int64_t *at, int64_t bytes) {
  uint8_t *start = scratch ? (uint8_t *)scratch + *at : NULL;
  *at += align64(bytes);
  return start;
}

workspace workspace_of(const geometry &g, void *scratch) {
  const int64_t planes = g.panel_major ? g.images : 1;
  workspace w = {};
  w.offset = (int32_t *)take(scratch, &w.bytes, 4 * g.steps);
  w.rows = (row_table *)take(scratch, &w.bytes, slots_of(g) * (int64_t)sizeof(row_table));
  w.accumulator = (int32_t *)take(scratch, &w.bytes, 2 * g.widest * BLOCK_TILES * TILE_BYTES);
  w.dropped = take(scratch, &w.bytes, 16 * g.tile_columns);
  w.pad = take(scratch, &w.bytes, STEP);
  w.input = take(scratch, &w.bytes, STEP + (g.from == PLANE ? planes * g.plane_bytes : slots_of(g) * BLOCK_ROWS * g.window_bytes));
  return w;
}

size_t scratch_bytes(const void *params) { return (size_t)workspace_of(geometry_of((const fxc_conv *)params), NULL).bytes; }

/* ---------------------------------------------------------------------------------------------------- the A operand */

/* One thread's call of run(). */
struct job {
  const fxc_conv *p;
  const void *const *in;
  void *out;
  const uint8_t *x, *packed;
  geometry g;
  workspace w;
  int32_t left_shift;   /* of the accumulators */
  int32_t branch_bytes; /* of an element of branch 1; 0: none, or in REQUANTIZE_ANY */
  bool linear;
};

/* Copies `bytes` in whole vectors: reads and writes up to 63 bytes more. */
inline __attribute__((always_inline)) void copy_vectors(uint8_t *target, const uint8_t *from, int32_t bytes) {
  for (int32_t i = 0; i < bytes; i += 64) _mm512_storeu_si512(target + i, _mm512_loadu_si512(from + i));
}

/* Where position 0, step s lies relative to a position. */
void fill_offsets(const job &j) {
  const int32_t channels = j.p->in_channels;
  for (int32_t s = 0; s < j.g.steps; ++s) {
    j.w.offset[s] = s * STEP;
    if (j.g.from != PLANE) continue;
    const int32_t tap = s * STEP / channels;
    const int32_t h = tap / j.p->kernel[2] * j.p->dilation[1], v = tap % j.p->kernel[2] * j.p->dilation[2];
    const int32_t phase = h % j.p->stride[1] * j.p->stride[2] + v % j.p->stride[2];
    const int32_t row = phase * j.g.plane_height + h / j.p->stride[1];
    j.w.offset[s] = (row * j.g.plane_width + v / j.p->stride[2]) * channels + s * STEP % channels;
  }
}

/* Row i of phase (a, b) of an image's plane. */
void copy_plane_row(const job &j, uint8_t *plane, const uint8_t *image, int32_t a, int32_t b, int32_t i) {
  const fxc_conv *p = j.p;
  const int32_t h = i * p->stride[1] + a - p->pad_before[1];
  const uint8_t *row = h >= 0 && h < p->in_size[1] ? image + (ptrdiff_t)h * p->in_row_stride : NULL;
  uint8_t *target = plane + ((ptrdiff_t)(a * p->stride[2] + b) * j.g.plane_height + i) * j.g.plane_width * p->in_channels;
  for (int32_t c = 0; c < j.g.plane_width; ++c, target += p->in_channels) {
    const int32_t v = c * p->stride[2] + b - p->pad_before[2];
    const bool inside = row && v >= 0 && v < p->in_size[2];
    copy_vectors(target, inside ? row + (ptrdiff_t)v * p->in_pixel_stride : p->pad_value, p->in_channels);
  }
}

/* The rows of an image's plane that blocks begin..end-1 read. */
void copy_plane(const job &j, uint8_t *plane, int32_t image, int32_t begin, int32_t end) {
  const fxc_conv *p = j.p;
  const int32_t last = start_of(j.g.tiles_of_block, end) * j.g.rows - 1;
  int32_t from = start_of(j.g.tiles_of_block, begin) * j.g.rows / j.g.plane_width;
  int32_t to = last / j.g.plane_width + 1 + (p->kernel[1] - 1) * p->dilation[1] / p->stride[1];
  if (to > j.g.plane_height) to = j.g.plane_height;
  for (int32_t a = 0; a < p->stride[1]; ++a)
    for (int32_t b = 0; b < p->stride[2]; ++b)
      for (int32_t i = from; i < to; ++i) copy_plane_row(j, plane, j.x + (ptrdiff_t)image * p->in_image_stride, a, b, i);
}

}  // namespace

#endif
