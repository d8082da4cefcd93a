/* The scratch of conv_amx.cpp, and the A operand in it: planes, windows, and where the rows of a block go. Everything is static; include
   it after the target pragma. */

#ifndef FXC_CONV_AMX_INPUT_H
#define FXC_CONV_AMX_INPUT_H

#include "conv_amx_geometry.h"

namespace {

constexpr int32_t DROPPED = -1; /* the pixel of a row that is not stored */

/* -------------------------------------------------------------------------------------------------------- scratch */

/* Where the rows of a block go. */
struct row_table {
  int32_t pixel[BLOCK_ROWS];    /* of the output, or DROPPED */
  ptrdiff_t out[BLOCK_ROWS];    /* bytes from the output (uint8) to the pixel, or to workspace.dropped */
  ptrdiff_t branch[BLOCK_ROWS]; /* bytes from branch 1 to the pixel; 0 for dropped rows */
};

struct workspace {
  int32_t *offset;      /* (steps) from a position to its bytes of step s */
  row_table *rows;      /* (slots) */
  int32_t *accumulator; /* 2 in turns: (BLOCK_ROWS, W, 16) */
  uint8_t *dropped;     /* a pixel to write dropped rows to */
  uint8_t *input;       /* planes or windows */
  int64_t bytes;
};

/* Panel-major, all blocks stay in the workspace; else two in turns, because one waits for its requantization. */
int32_t slots_of(const geometry &g) { return g.panel_major ? g.images * g.blocks : 2; }

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
  int32_t left_shift; /* of the accumulators */
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

/* The taps of one kernel row for `count` pixels of an output row, the first from input column v on. row NULL: outside. */
void gather_taps(const job &j, uint8_t *target, const uint8_t *row, int32_t v, int32_t count) {
  const fxc_conv *p = j.p;
  const int32_t width = p->kernel[2], channels = p->in_channels;
  const bool joined = row && (width == 1 || (p->dilation[2] == 1 && p->in_pixel_stride == channels));
  for (int32_t i = 0; i < count; ++i, v += p->stride[2], target += j.g.window_bytes) {
    if (joined && v >= 0 && v + width <= p->in_size[2]) {
      copy_vectors(target, row + (ptrdiff_t)v * p->in_pixel_stride, width * channels);
      continue;
    }
    for (int32_t tap = 0; tap < width; ++tap) {
      const int32_t at = v + tap * p->dilation[2];
      const bool inside = row && at >= 0 && at < p->in_size[2];
      copy_vectors(target + tap * channels, inside ? row + (ptrdiff_t)at * p->in_pixel_stride : p->pad_value, channels);
    }
  }
}

/* The windows of `count` output pixels of one row from (n, d, h, v) on. */
void gather_row(const job &j, uint8_t *target, const int32_t at[4], int32_t count) {
  const fxc_conv *p = j.p;
  const uint8_t *image = j.x + (ptrdiff_t)at[0] * p->in_image_stride;
  for (int32_t a = 0; a < p->kernel[0]; ++a)
    for (int32_t b = 0; b < p->kernel[1]; ++b, target += p->kernel[2] * p->in_channels) {
      const int32_t d = at[1] * p->stride[0] - p->pad_before[0] + a * p->dilation[0];
      const int32_t h = at[2] * p->stride[1] - p->pad_before[1] + b * p->dilation[1];
      const bool inside = d >= 0 && d < p->in_size[0] && h >= 0 && h < p->in_size[1];
      const uint8_t *row = inside ? image + (ptrdiff_t)d * p->in_plane_stride + (ptrdiff_t)h * p->in_row_stride : NULL;
      gather_taps(j, target, row, at[3] * p->stride[2] - p->pad_before[2], count);
    }
}

void gather_windows(const job &j, uint8_t *target, int32_t first, int32_t end) {
  const fxc_conv *p = j.p;
  if (j.linear) {
    for (; first < end; ++first, target += j.g.window_bytes)
      copy_vectors(target, j.x + (ptrdiff_t)first * p->in_pixel_stride, p->in_channels);
    return;
  }
  while (first < end) {
    int32_t at[4], rest = first;
    for (int i = 3; i > 0; --i) at[i] = rest % p->out_size[i - 1], rest /= p->out_size[i - 1];
    at[0] = rest;
    const int32_t left = p->out_size[2] - at[3], count = left < end - first ? left : end - first;
    gather_row(j, target, at, count);
    first += count, target += count * j.g.window_bytes;
  }
}

/* Pixel i of the batch lies at i * in_pixel_stride. */
bool is_linear(const fxc_conv *p) {
  for (int i = 0; i < 3; ++i)
    if (p->kernel[i] != 1 || p->stride[i] != 1 || p->pad_before[i] != 0 || p->in_size[i] != p->out_size[i]) return false;
  const int32_t row = p->in_size[2] * p->in_pixel_stride, plane = p->in_size[1] * row;
  return (p->in_size[1] == 1 || p->in_row_stride == row) && (p->in_size[0] == 1 || p->in_plane_stride == plane) &&
         (p->batch == 1 || p->in_image_stride == p->in_size[0] * plane);
}

/* A block's A tiles and where its rows go. */
struct block {
  int32_t tiles;
  ptrdiff_t stride;
  const uint8_t *a[BLOCK_TILES];
  row_table *rows;
};

/* Rows by which a tile from `first` on is moved back: rows past the activation are not read. */
int32_t moved_back(const geometry &g, int32_t first) {
  return g.from == DIRECT && first + g.rows > g.positions ? first + g.rows - g.positions : 0;
}

/* Block `index` of the batch; `slot` is its place in the workspace. */
block block_at(const job &j, int32_t index, int32_t slot) {
  const geometry &g = j.g;
  const int32_t image = index / g.blocks, tile = start_of(g.tiles_of_block, index % g.blocks);
  block b = {start_of(g.tiles_of_block, index % g.blocks + 1) - tile, j.p->in_pixel_stride, {}, j.w.rows + slot};
  const uint8_t *start = j.x + (ptrdiff_t)tile * g.rows * b.stride;
  if (g.from == PLANE) {
    b.stride = j.p->in_channels;
    start = j.w.input + (g.panel_major ? image * g.plane_bytes : 0) + (ptrdiff_t)tile * g.rows * b.stride;
  } else if (g.from == WINDOW) {
    b.stride = g.window_bytes;
    start = j.w.input + (ptrdiff_t)slot * BLOCK_ROWS * b.stride;
  }
  for (int32_t t = 0; t < b.tiles; ++t) b.a[t] = start + (t * g.rows - moved_back(g, (tile + t) * g.rows)) * b.stride;
  return b;
}

void fill_row(const job &j, row_table *rows, int32_t i, int32_t pixel) {
  rows->pixel[i] = pixel;
  rows->out[i] = pixel == DROPPED ? (intptr_t)j.w.dropped - (intptr_t)j.out : (ptrdiff_t)pixel * j.p->out_pixel_stride;
  rows->branch[i] = pixel == DROPPED ? 0 : (ptrdiff_t)pixel * j.p->branch_pixel_stride[1];
}

/* Fills b.rows, up to a multiple of 4. */
void fill_rows(const job &j, const block &b, int32_t index) {
  const geometry &g = j.g;
  const int32_t width = g.from == PLANE ? g.plane_width : g.positions, used = g.from == PLANE ? j.p->out_size[2] : g.positions;
  int32_t at = 0, first = start_of(g.tiles_of_block, index % g.blocks) * g.rows;
  for (int32_t t = 0; t < b.tiles; ++t, first += g.rows) {
    const int32_t moved = moved_back(g, first);
    int32_t position = first - moved, line = position / width, column = position % width;
    const int32_t image = index / g.blocks * pixels_per_image(j.p);
    for (int32_t r = 0; r < g.rows; ++r, ++position) {
      fill_row(j, b.rows, at++, r < moved || position >= g.positions || column >= used ? DROPPED : image + line * used + column);
      if (++column == width) column = 0, ++line;
    }
  }
  while (at % 4 != 0) fill_row(j, b.rows, at++, DROPPED);
}

/* Makes block `index` ready (planes are copied elsewhere). */
void prepare(const job &j, int32_t index, int32_t slot) {
  const block b = block_at(j, index, slot);
  fill_rows(j, b, index);
  if (j.g.from != WINDOW) return;
  const int32_t first = start_of(j.g.tiles_of_block, index % j.g.blocks) * j.g.rows, end = first + b.tiles * j.g.rows;
  gather_windows(j, (uint8_t *)b.a[0], first, end < j.g.positions ? end : j.g.positions);
}

}  // namespace

#endif
