/* How conv_amx.cpp cuts up a convolution, and its packed weights. Everything is static; include it after the target pragma. */

#ifndef FXC_CONV_AMX_GEOMETRY_H
#define FXC_CONV_AMX_GEOMETRY_H

#include "kernel_row.h"
#include "requantize_avx512.h"

namespace {

constexpr int32_t STEP = 64; /* bytes of k per tile instruction */
constexpr int32_t TILE_BYTES = 1024;
constexpr int32_t BLOCK_TILES = 3;
constexpr int32_t BLOCK_ROWS = 16 * BLOCK_TILES;
constexpr int32_t SHORT = 8, LONG = 16;              /* steps of a reduction */
constexpr int32_t FEW_PIXELS = 4, LONG_ENOUGH = 192; /* see accepts */
constexpr int32_t FEW_CHANNELS = 16;                 /* so many at most are taken a kernel row at a time */
constexpr int32_t MAX_PIECES = 64, MAX_ROWS_PER_STEP = 7;
constexpr int64_t MAX_PLANE = 1 << 20;               /* bytes of a copied image: half of the L2 cache of the first processors with AMX */
constexpr int64_t MAX_PANEL_MAJOR = 1 << 19;         /* bytes of the whole input when every panel reads it anew */

int64_t align64(int64_t bytes) { return (bytes + 63) / 64 * 64; }

int32_t ceil_div(int32_t a, int32_t b) { return (a + b - 1) / b; }

int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }

int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }

/* `total` things cut into `parts` that differ by at most one; the larger ones first. */
struct split {
  int32_t parts, base, extra;
};

split split_evenly(int32_t total, int32_t parts) { return {parts, total / parts, total % parts}; }

/* Where part i starts. */
int32_t start_of(const split &s, int32_t i) { return i * s.base + smaller(i, s.extra); }

/* ------------------------------------------------------------------------------------------------------- geometry */

enum source { DIRECT, PLANE, WINDOW, PIECES };

/* How a step is cut up. Positions are the output pixels of the batch; with PLANE those of one image over the padded width. */
struct geometry {
  source from;
  bool panel_major;
  int32_t k_bytes, steps, tile_columns, panels, widest; /* a tile column: 16 channels; widest: largest W */
  split columns_of_panel, tiles_of_block;
  int32_t images, positions, rows, tiles, blocks; /* the last four per image; rows: of a tile */
  int32_t plane_height, plane_width;              /* of one phase */
  int64_t column_bytes, plane_bytes, window_bytes; /* packed weights of a tile column; pitch of a gathered row */
};

int32_t pixels_per_image(const fxc_conv *p) { return p->out_size[0] * p->out_size[1] * p->out_size[2]; }

int32_t taps_of(const fxc_conv *p) { return p->kernel[0] * p->kernel[1] * p->kernel[2]; }

int32_t kernel_rows(const fxc_conv *p) { return p->kernel[0] * p->kernel[1]; }

/* The taps of a kernel row, and how many of them share a step (PIECES). */
int32_t piece_bytes(const fxc_conv *p) { return p->kernel[2] * p->in_channels; }

int32_t rows_per_step(const fxc_conv *p) { return smaller(STEP / piece_bytes(p), MAX_ROWS_PER_STEP); }

bool takes_pieces(const fxc_conv *p) {
  return p->in_channels <= FEW_CHANNELS && p->kernel[2] > 1 && p->dilation[2] == 1 && piece_bytes(p) <= STEP && kernel_rows(p) <= MAX_PIECES;
}

/* Cuts `positions` into tiles of nearly equal height, and those into blocks. */
void cut(geometry *g, int32_t images, int32_t positions) {
  g->images = images, g->positions = positions;
  g->tiles = ceil_div(positions, 16);
  g->rows = ceil_div(positions, g->tiles);
  g->tiles = ceil_div(positions, g->rows);
  g->blocks = ceil_div(g->tiles, BLOCK_TILES);
  g->tiles_of_block = split_evenly(g->tiles, g->blocks);
}

void measure_plane(const fxc_conv *p, geometry *g) {
  g->plane_height = p->out_size[1] + (p->kernel[1] - 1) * p->dilation[1] / p->stride[1];
  g->plane_width = p->out_size[2] + (p->kernel[2] - 1) * p->dilation[2] / p->stride[2];
  const int64_t pixels = (int64_t)g->plane_height * g->plane_width * p->stride[1] * p->stride[2];
  g->plane_bytes = (pixels + BLOCK_ROWS) * p->in_channels;
}

bool plane_serves(const fxc_conv *p, const geometry &g) {
  return taps_of(p) > 1 && p->in_channels % STEP == 0 && p->kernel[0] == 1 && p->in_size[0] == 1 && p->out_size[0] == 1 &&
         p->pad_before[0] == 0 && g.plane_bytes <= MAX_PLANE && 2 * g.plane_width <= 3 * p->out_size[2];
}

geometry geometry_of(const fxc_conv *p) {
  geometry g = {};
  g.k_bytes = taps_of(p) * p->in_channels;
  g.steps = takes_pieces(p) ? ceil_div(kernel_rows(p), rows_per_step(p)) : ceil_div(g.k_bytes, STEP);
  g.tile_columns = ceil_div(p->out_channels, 16);
  g.widest = g.steps < SHORT ? 4 : g.steps < LONG ? 2 : 1;
  g.panels = ceil_div(g.tile_columns, g.widest);
  g.columns_of_panel = split_evenly(g.tile_columns, g.panels);
  g.column_bytes = (int64_t)g.steps * TILE_BYTES;
  const int32_t lines = takes_pieces(p) ? g.steps : ceil_div(g.k_bytes + STEP - 1, STEP);
  g.window_bytes = STEP * (int64_t)(lines | 1); /* odd: rows spread over the sets of the cache */
  measure_plane(p, &g);
  g.from = plane_serves(p, g) ? PLANE : takes_pieces(p) ? PIECES : WINDOW;
  if (g.from == PLANE)
    cut(&g, p->batch, (p->out_size[1] - 1) * g.plane_width + p->out_size[2]);
  else
    cut(&g, 1, p->batch * pixels_per_image(p));
  const int64_t input = g.from == PLANE ? g.images * g.plane_bytes : (int64_t)g.blocks * BLOCK_ROWS * g.window_bytes;
  g.panel_major = input <= MAX_PANEL_MAJOR && input < g.tile_columns * g.column_bytes;
  return g;
}

/* -------------------------------------------------------------------------------------------------------- packing */

struct header {
  requantize_path path;
  int32_t left_shift; /* reduced_left_shift */
  int32_t reserved[14];
};

static_assert(sizeof(header) == 64 && sizeof(requantize_slots) % 64 == 0, "panels are read in aligned vectors");

struct panel {
  int32_t W, first, count; /* channels */
  const int32_t *bias;
  const requantize_slots *slots;
  const int8_t *weight;
};

int64_t panel_offset(const geometry &g, int32_t index) {
  return (int64_t)sizeof(header) + index * (int64_t)sizeof(requantize_slots) + start_of(g.columns_of_panel, index) * (64 + g.column_bytes);
}

panel panel_at(const fxc_conv *p, const geometry &g, const uint8_t *packed, int32_t index) {
  const int32_t column = start_of(g.columns_of_panel, index), W = start_of(g.columns_of_panel, index + 1) - column;
  const int32_t left = p->out_channels - 16 * column;
  const uint8_t *start = packed + panel_offset(g, index);
  const requantize_slots *slots = (const requantize_slots *)(start + 64 * W);
  return {W, 16 * column, left < 16 * W ? left : 16 * W, (const int32_t *)start, slots, (const int8_t *)(slots + 1)};
}

/* Where tiles win over vector instructions (measured; short reductions and few channels do not fill them, and for a few pixels
   reading the weights is all there is). */
int accepts(const void *params) {
  const fxc_conv *p = (const fxc_conv *)params;
  const int32_t k_bytes = taps_of(p) * p->in_channels, pixels = p->batch * pixels_per_image(p);
  if (p->groups != 1 || pixels < FEW_PIXELS) return 0;
  if (takes_pieces(p)) return k_bytes >= 2 * STEP && p->in_pixel_stride == p->in_channels;
  return p->in_channels >= FEW_CHANNELS && (k_bytes >= LONG_ENOUGH || (k_bytes >= STEP && p->out_channels >= 64));
}

size_t packed_bytes(const void *params) {
  const geometry g = geometry_of((const fxc_conv *)params);
  return (size_t)panel_offset(g, g.panels);
}

/* Where byte k of a window lies in its steps. */
int32_t place_of(const fxc_conv *p, int32_t k) {
  if (!takes_pieces(p)) return k;
  const int32_t row = k / piece_bytes(p), per_step = rows_per_step(p);
  return row / per_step * STEP + row % per_step * piece_bytes(p) + k % piece_bytes(p);
}

/* Column j of a panel. */
void pack_column(const fxc_conv *p, const geometry &g, const panel &w, int32_t j) {
  int8_t *tiles = (int8_t *)w.weight + j * g.column_bytes;
  for (int32_t lane = 0; lane < 16; ++lane) {
    const int32_t channel = p->requantize ? requantize_channel(w.W, j, lane / 4, lane % 4) : 16 * j + lane;
    if (channel >= w.count) continue;
    const int8_t *row = p->weight + (int64_t)(w.first + channel) * g.k_bytes;
    ((int32_t *)w.bias)[16 * j + lane] = p->bias[w.first + channel];
    for (int32_t k = 0; k < g.k_bytes; ++k) {
      const int32_t place = place_of(p, k);
      tiles[(int64_t)(place / 4) * 64 + 4 * lane + place % 4] = row[k];
    }
  }
}

void pack(const void *params, void *packed) {
  const fxc_conv *p = (const fxc_conv *)params;
  const fxc_requantize *q = p->requantize;
  const geometry g = geometry_of(p);
  memset(packed, 0, packed_bytes(params));
  ((header *)packed)->path = requantize_kind_of_all(q);
  ((header *)packed)->left_shift = reduced_left_shift(q);
  for (int32_t i = 0; i < g.panels; ++i) {
    const panel w = panel_at(p, g, (const uint8_t *)packed, i);
    requantize_slots *slots = (requantize_slots *)w.slots;
    if (w.W == 4) pack_slots<4>(slots, q, w.first, w.count);
    if (w.W == 3) pack_slots<3>(slots, q, w.first, w.count);
    if (w.W == 2) pack_slots<2>(slots, q, w.first, w.count);
    if (w.W == 1) pack_slots<1>(slots, q, w.first, w.count);
    for (int32_t j = 0; j < w.W; ++j) pack_column(p, g, w, j);
  }
}

int32_t units(const void *params) {
  const geometry g = geometry_of((const fxc_conv *)params);
  return g.images * g.blocks * g.panels;
}

}  // namespace

#endif
