/* Convolution with AMX int8 tiles: any kernel, stride, dilation and padding, one group; linear layers.

   acc[o] = bias[o] + sum over k of weight[o][k] * x[k], k = (tap, channel) in 64-byte steps of tdpbusd; then the requantization
   of numerics.py (requantize_avx512.h) or int32.

   An accumulator tile holds R <= 16 positions x 16 output channels, an A tile R positions x 64 bytes, a B tile 64 bytes x 16
   channels. A block is up to 3 accumulator tiles of the same channels: with one A and one B tile that is 5 of the 8 tiles. Not
   2 x 2 with 8, on purpose: the physical tile registers are shared with the core's other hardware thread, and when that holds
   tiles too, 8 live tiles leave none for renaming. Measured cycles per tdpbusd, alone / shared: 8 tiles 18 / 65, 5 tiles 18 / 30.

   A panel is 16 W output channels (W = 1..4; more where the reduction is short, so that codes are stored in longer pieces). The
   accumulators of a block and a panel pass through scratch; they are requantized between the tile instructions of the next ones.

   Where A tiles are loaded from (a tile row is R positions at a constant stride):
     DIRECT  the activation itself: 1x1, stride 1, 64-byte aligned pixels (rows that cross cache lines cost 6 times more);
     PLANE   a copy of the image in scratch with its border: several taps, channels a multiple of 64. A stride s cuts it into
             s x s phases, so that neighboring outputs are neighbors in each phase. Positions run over the padded width, the
             few between two output rows are computed and dropped;
     WINDOW  the taps of a position gathered into one row of scratch (im2col): everything else.

   Unit: (block, panel); panel-major where the weights are larger than the input, so that each thread reads its part of them
   once, else block-major. Packed: header, then per panel bias (W x 16), requantize_slots, W times the B tiles (16 groups of 4 k,
   16 channels, 4 k), zero padded; channels stand in the order of requantize_channel. Reads up to 64 bytes past an input and a branch. */

#if defined(__x86_64__)

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,amx-tile,amx-int8")

#include "kernel_row.h"
#include "requantize_avx512.h"

namespace {

constexpr int32_t STEP = 64;           /* bytes of k per tile instruction */
constexpr int32_t TILE_BYTES = 1024;
constexpr int32_t BLOCK_TILES = 3;
constexpr int32_t BLOCK_ROWS = 16 * BLOCK_TILES;
constexpr int32_t SHORT = 8, LONG = 16;       /* steps of a reduction */
constexpr int32_t FEW_PIXELS = 4, LONG_ENOUGH = 192; /* see accepts */
constexpr int64_t MAX_PLANE = 1 << 20;        /* bytes of a copied image: half of the L2 cache of the first processors with AMX */
constexpr int64_t MAX_PANEL_MAJOR = 1 << 19;  /* bytes of the whole input when every panel reads it anew */
constexpr int64_t MAX_CHUNK = 1 << 18;        /* bytes of the panels that are in use at a time, panel-major */
constexpr int32_t DROPPED = -1;               /* the pixel of a row that is not stored */

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

enum source { DIRECT, PLANE, WINDOW };

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
  g.steps = ceil_div(g.k_bytes, STEP);
  g.tile_columns = ceil_div(p->out_channels, 16);
  g.widest = g.steps < SHORT ? 4 : g.steps < LONG ? 2 : 1;
  g.panels = ceil_div(g.tile_columns, g.widest);
  g.columns_of_panel = split_evenly(g.tile_columns, g.panels);
  g.column_bytes = (int64_t)g.steps * TILE_BYTES;
  g.window_bytes = STEP * (int64_t)(ceil_div(g.k_bytes + STEP - 1, STEP) | 1); /* odd: rows spread over the sets of the cache */
  measure_plane(p, &g);
  g.from = plane_serves(p, g) ? PLANE : WINDOW;
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
  const int32_t column = start_of(g.columns_of_panel, index), W = start_of(g.columns_of_panel, index + 1) - column, left = p->out_channels - 16 * column;
  const uint8_t *start = packed + panel_offset(g, index);
  const requantize_slots *slots = (const requantize_slots *)(start + 64 * W);
  return {W, 16 * column, left < 16 * W ? left : 16 * W, (const int32_t *)start, slots, (const int8_t *)(slots + 1)};
}

/* Where tiles win over vector instructions (measured; short reductions and few channels do not fill them, and for a few pixels
   reading the weights is all there is). */
int accepts(const void *params) {
  const fxc_conv *p = (const fxc_conv *)params;
  const int32_t k_bytes = taps_of(p) * p->in_channels, pixels = p->batch * pixels_per_image(p);
  if (p->groups != 1 || p->in_channels < 16 || pixels < FEW_PIXELS) return 0;
  return k_bytes >= LONG_ENOUGH || (k_bytes >= STEP && p->out_channels >= 64);
}

size_t packed_bytes(const void *params) {
  const geometry g = geometry_of((const fxc_conv *)params);
  return (size_t)panel_offset(g, g.panels);
}

/* Column j of a panel. */
void pack_column(const fxc_conv *p, const geometry &g, const panel &w, int32_t j) {
  int8_t *tiles = (int8_t *)w.weight + j * g.column_bytes;
  for (int32_t lane = 0; lane < 16; ++lane) {
    const int32_t channel = requantize_channel(w.W, j, lane / 4, lane % 4);
    if (channel >= w.count) continue;
    const int8_t *row = p->weight + (int64_t)(w.first + channel) * g.k_bytes;
    ((int32_t *)w.bias)[16 * j + lane] = p->bias[w.first + channel];
    for (int32_t k = 0; k < g.k_bytes; ++k) tiles[(int64_t)(k / 4) * 64 + 4 * lane + k % 4] = row[k];
  }
}

void pack(const void *params, void *packed) {
  const fxc_conv *p = (const fxc_conv *)params;
  const fxc_requantize *q = p->requantize;
  const geometry g = geometry_of(p);
  memset(packed, 0, packed_bytes(params));
  ((header *)packed)->path = requantize_kind(q);
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

/* Taps of kernel row (a, b) for `count` pixels of one output row from column v on: `width` taps of `bytes` each. row NULL: outside. */
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
      copy_vectors(target + tap * channels, row && at >= 0 && at < p->in_size[2] ? row + (ptrdiff_t)at * p->in_pixel_stride : p->pad_value, channels);
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
    for (; first < end; ++first, target += j.g.window_bytes) copy_vectors(target, j.x + (ptrdiff_t)first * p->in_pixel_stride, p->in_channels);
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

/* ------------------------------------------------------------------------------------------------- requantization */

/* Accumulators (rows, W, 16) that wait for their requantization, a quad at a time. */
struct pending {
  const int32_t *accumulator;
  const row_table *rows;
  panel w;
  int32_t count; /* of rows */
};

/* Constants of a panel in registers. */
template <int W>
struct constants {
  __m512i bias[W], shift[4], multiplier[2], zero[2], lo, hi, guard;
  __m128i left_shift;
  __mmask64 mask;
};

template <int W>
inline __attribute__((always_inline)) constants<W> constants_of(const job &j, const panel &w) {
  constants<W> c;
  const requantize_slots *s = w.slots;
  for (int i = 0; i < W; ++i) c.bias[i] = _mm512_load_si512(w.bias + 16 * i);
  for (int i = 0; i < 4; ++i) c.shift[i] = _mm512_load_si512(s->shift + 16 * i);
  for (int i = 0; i < 2; ++i) c.multiplier[i] = _mm512_load_si512(s->multiplier + 32 * i), c.zero[i] = _mm512_load_si512(s->zero + 32 * i);
  c.lo = _mm512_load_si512(s->lo), c.hi = _mm512_load_si512(s->hi);
  c.guard = _mm512_set1_epi16((int16_t)j.p->requantize->guard_bits);
  c.left_shift = _mm_cvtsi32_si128(j.left_shift);
  c.mask = channel_mask(w.count);
  return c;
}

/* Codes of the quad's rows from `base` on, in slot order. */
template <int W>
inline __attribute__((always_inline)) __m512i load_codes(const uint8_t *base, const ptrdiff_t *row) {
  if constexpr (W >= 3) return load_slots<W>(base + row[0], 0);
  if constexpr (W == 2) return load_slots<W>(base + row[0], row[1] - row[0]);
  __m512i x = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)(base + row[0])));
  x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *)(base + row[1])), 1);
  x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *)(base + row[2])), 2);
  x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *)(base + row[3])), 3);
  return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), x);
}

template <int W>
inline __attribute__((always_inline)) void save_codes(uint8_t *base, const ptrdiff_t *row, __mmask64 mask, __m512i y) {
  if constexpr (W >= 3) {
    store_slots<W>(base + row[0], 0, mask, y);
  } else if constexpr (W == 2) {
    store_slots<W>(base + row[0], row[1] - row[0], mask, y);
  } else {
    y = _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), y);
    _mm_mask_storeu_epi8(base + row[0], (__mmask16)mask, _mm512_castsi512_si128(y));
    _mm_mask_storeu_epi8(base + row[1], (__mmask16)mask, _mm512_extracti32x4_epi32(y, 1));
    _mm_mask_storeu_epi8(base + row[2], (__mmask16)mask, _mm512_extracti32x4_epi32(y, 2));
    _mm_mask_storeu_epi8(base + row[3], (__mmask16)mask, _mm512_extracti32x4_epi32(y, 3));
  }
}

/* t of vector v of the quad, in 32-bit lanes. */
template <int W>
inline __attribute__((always_inline)) __m512i shift_vector(const constants<W> &c, const int32_t *acc, int v, bool shifts_left) {
  __m512i a = _mm512_add_epi32(_mm512_load_si512(acc + 16 * v), c.bias[v % W]);
  if (shifts_left) a = _mm512_sll_epi32(a, c.left_shift);
  return _mm512_srav_epi32(a, c.shift[v]);
}

inline __attribute__((always_inline)) __m512i look_up(const uint8_t *table, __m512i codes) {
  const __m512i low = _mm512_permutex2var_epi8(_mm512_loadu_si512(table), codes, _mm512_loadu_si512(table + 64));
  const __m512i high = _mm512_permutex2var_epi8(_mm512_loadu_si512(table + 128), codes, _mm512_loadu_si512(table + 192));
  return _mm512_mask_mov_epi8(low, _mm512_movepi8_mask(codes), high);
}

/* Requantizes and stores quad i. codes: branch 1 at the panel's first channel, or NULL; out: likewise. */
template <int W, bool TWO>
inline __attribute__((always_inline)) void store_codes(const pending &d, const constants<W> &c, int32_t i, const uint8_t *codes,
                                                       uint8_t *out, const uint8_t *table, bool shifts_left) {
  const int32_t *acc = d.accumulator + 16 * W * quad_pixels(W) * i;
  const __m512i t0 = shift_vector<W>(c, acc, 0, shifts_left), t1 = shift_vector<W>(c, acc, 1, shifts_left);
  const __m512i t2 = shift_vector<W>(c, acc, 2, shifts_left), t3 = W == 3 ? t2 : shift_vector<W>(c, acc, 3, shifts_left);
  __m512i u0 = _mm512_mulhrs_epi16(_mm512_packs_epi32(t0, t1), c.multiplier[0]);
  __m512i u1 = _mm512_mulhrs_epi16(_mm512_packs_epi32(t2, t3), c.multiplier[1]);
  if (TWO) {
    const __m512i x = load_codes<W>(codes, d.rows->branch + quad_pixels(W) * i), none = _mm512_setzero_si512();
    u0 = _mm512_adds_epi16(scale_codes(d.w.slots, 0, _mm512_unpacklo_epi8(x, none)), u0);
    u1 = _mm512_adds_epi16(scale_codes(d.w.slots, 1, _mm512_unpackhi_epi8(x, none)), u1);
  }
  u0 = _mm512_srav_epi16(_mm512_adds_epi16(u0, c.zero[0]), c.guard);
  u1 = _mm512_srav_epi16(_mm512_adds_epi16(u1, c.zero[1]), c.guard);
  __m512i y = _mm512_min_epu8(_mm512_max_epu8(_mm512_packus_epi16(u0, u1), c.lo), c.hi);
  if (table) y = look_up(table, y);
  save_codes<W>(out, d.rows->out + quad_pixels(W) * i, c.mask, y);
}

/* The same for everything else: adds the bias, restores the channel order. */
__attribute__((noinline)) void store_any(const job &j, const pending &d, int32_t i) {
  const int32_t W = d.w.W, rows = quad_pixels(W);
  for (int32_t r = rows * i; r < rows * i + rows; ++r) {
    alignas(64) int32_t acc[64];
    if (d.rows->pixel[r] == DROPPED) continue;
    for (int32_t v = 0; v < W; ++v)
      spill_accumulators(acc, W, v, _mm512_add_epi32(_mm512_load_si512(d.accumulator + 16 * (W * r + v)), _mm512_load_si512(d.w.bias + 16 * v)));
    requantize_row(j.p->requantize, acc, d.w.first, d.w.count, j.in, j.p->branch_pixel_stride, d.rows->pixel[r], j.out, j.p->out_pixel_stride);
  }
}

/* ------------------------------------------------------------------------------------------------------------- tiles */

/* Lines to fetch into the L2 cache while a block is computed. */
struct prefetch {
  const uint8_t *next, *end;
};

/* Stores accumulator tile T of the column before `column` and clears it: late, so that the product before it has arrived. */
template <int T>
inline __attribute__((always_inline)) void restart(int32_t *target, int32_t rows, long pitch, int32_t column) {
  int32_t *place = (int32_t *)((uint8_t *)target + T * rows * pitch) + 16 * (column - 1);
  if constexpr (T == 0) { /* tile names are literals */
    if (column > 0) _tile_stored(0, place, pitch);
    _tile_zero(0);
  } else if constexpr (T == 1) {
    if (column > 0) _tile_stored(1, place, pitch);
    _tile_zero(1);
  } else {
    if (column > 0) _tile_stored(2, place, pitch);
    _tile_zero(2);
  }
}

/* Accumulates a block and a panel into `target`, meanwhile finishing what is pending (which is W columns wide). */
template <int TILES, int W, requantize_path PATH>
void multiply(const job &j, const block &b, const panel &w, int32_t *target, const pending &before, prefetch ahead) {
  constexpr bool CODES = PATH != REQUANTIZE_ANY, TWO = PATH == REQUANTIZE_TWO;
  const pending d = before;
  const int32_t steps = j.g.steps, rows = j.g.rows, total = TILES > 0 ? w.W * steps : 1, quads = ceil_div(d.count, quad_pixels(W));
  const int32_t quads_per_step = ceil_div(quads, total);
  const int32_t lines_per_step = ceil_div((int32_t)((ahead.end - ahead.next) / 64), total);
  const int32_t *offset = j.w.offset;
  const int8_t *weight = w.weight;
  const uint8_t *a0 = b.a[0], *a1 = b.a[1], *a2 = b.a[2];
  const long stride = b.stride, pitch = 64 * w.W;
  const uint8_t *codes = TWO ? (const uint8_t *)j.in[1] + d.w.first : NULL, *table = CODES ? j.p->requantize->table : NULL;
  uint8_t *out = (uint8_t *)j.out + d.w.first;
  const bool shifts_left = j.left_shift != 0;
  constants<W> c;
  if (CODES && quads > 0) c = constants_of<W>(j, d.w);
  int32_t quad = 0;
  __asm__ volatile("" ::: "memory"); /* the tile loads name no memory operands */
  for (int32_t column = 0; column < (TILES > 0 ? w.W : 1); ++column) {
    for (int32_t s = 0; s < (TILES > 0 ? steps : 1); ++s, weight += TILE_BYTES) {
      if (TILES > 0) {
        _tile_loadd(4, weight, 64);
        _tile_loadd(3, a0 + offset[s], stride);
        if (s == 0) restart<0>(target, rows, pitch, column);
        _tile_dpbusd(0, 3, 4);
      }
      if (TILES > 1) {
        _tile_loadd(3, a1 + offset[s], stride);
        if (s == 0) restart<1>(target, rows, pitch, column);
        _tile_dpbusd(1, 3, 4);
      }
      if (TILES > 2) {
        _tile_loadd(3, a2 + offset[s], stride);
        if (s == 0) restart<2>(target, rows, pitch, column);
        _tile_dpbusd(2, 3, 4);
      }
      for (int32_t i = 0; i < lines_per_step && ahead.next < ahead.end; ++i, ahead.next += 64)
        _mm_prefetch((const char *)ahead.next, _MM_HINT_T1);
      const int32_t until = quad + quads_per_step < quads ? quad + quads_per_step : quads;
      for (; quad < until; ++quad) CODES ? store_codes<W, TWO>(d, c, quad, codes, out, table, shifts_left) : store_any(j, d, quad);
    }
  }
  if (TILES > 0) restart<0>(target, rows, pitch, w.W);
  if (TILES > 1) restart<1>(target, rows, pitch, w.W);
  if (TILES > 2) restart<2>(target, rows, pitch, w.W);
}

typedef void (*multiply_function)(const job &, const block &, const panel &, int32_t *, const pending &, prefetch);

/* By the number of tiles and the pending panel's W; 0 tiles only finish what is pending. */
template <requantize_path PATH>
const multiply_function MULTIPLY[4 * BLOCK_TILES + 4] = {
    multiply<0, 1, PATH>, multiply<0, 2, PATH>, multiply<0, 3, PATH>, multiply<0, 4, PATH>, multiply<1, 1, PATH>, multiply<1, 2, PATH>,
    multiply<1, 3, PATH>, multiply<1, 4, PATH>, multiply<2, 1, PATH>, multiply<2, 2, PATH>, multiply<2, 3, PATH>, multiply<2, 4, PATH>,
    multiply<3, 1, PATH>, multiply<3, 2, PATH>, multiply<3, 3, PATH>, multiply<3, 4, PATH>,
};

/* Share `part` of `parts` of panels first..end-1. */
prefetch share_of_panels(const job &j, int32_t first, int32_t end, int32_t part, int32_t parts) {
  if (first >= end) return {NULL, NULL};
  const int64_t bytes = panel_offset(j.g, end) - panel_offset(j.g, first), share = align64((bytes + parts - 1) / parts), from = part * share;
  const uint8_t *start = j.packed + panel_offset(j.g, first);
  return {start + (from < bytes ? from : bytes), start + (from + share < bytes ? from + share : bytes)};
}

/* What run_units carries from block to block. */
struct pipeline {
  const multiply_function *multiply;
  pending waiting;
  int32_t turn;
};

void run_block(const job &j, pipeline *line, const block &b, int32_t index, prefetch ahead) {
  const panel w = panel_at(j.p, j.g, j.packed, index);
  int32_t *target = j.w.accumulator + line->turn * j.g.widest * BLOCK_TILES * (TILE_BYTES / 4);
  line->multiply[4 * b.tiles + line->waiting.w.W - 1](j, b, w, target, line->waiting, ahead);
  line->waiting = {target, b.rows, w, b.tiles * j.g.rows};
  line->turn ^= 1;
}

/* Block-major units: a block's input is prepared once and meets every panel. */
void run_block_major(const job &j, pipeline *line, int32_t begin, int32_t end) {
  const geometry &g = j.g;
  int32_t copied = -1;
  for (int32_t index = begin / g.panels; index * g.panels < end; ++index) {
    const int32_t image = index / g.blocks, slot = index % 2;
    if (g.from == PLANE && image != copied) {
      copy_plane(j, j.w.input, image, index % g.blocks, smaller((end - 1) / g.panels + 1 - image * g.blocks, g.blocks));
      copied = image;
    }
    prepare(j, index, slot);
    const block b = block_at(j, index, slot);
    const int32_t last = smaller(end - index * g.panels, g.panels);
    for (int32_t i = larger(begin - index * g.panels, 0); i < last; ++i) run_block(j, line, b, i, {NULL, NULL});
  }
}

/* Everything panel-major units begin..end-1 read. */
void prepare_all(const job &j, int32_t begin, int32_t end) {
  const int32_t blocks = j.g.images * j.g.blocks;
  const bool part = begin / blocks == (end - 1) / blocks;
  const int32_t from = part ? begin % blocks : 0, to = part ? (end - 1) % blocks + 1 : blocks;
  if (j.g.from == PLANE)
    for (int32_t image = from / j.g.blocks; image <= (to - 1) / j.g.blocks; ++image)
      copy_plane(j, j.w.input + image * j.g.plane_bytes, image, 0, j.g.blocks);
  for (int32_t index = from; index < to; ++index) prepare(j, index, index);
}

/* Panel-major units: a few panels at a time meet all blocks, each block all of them while it is in the L1 cache; the next ones are
   fetched meanwhile. */
void run_panel_major(const job &j, pipeline *line, int32_t begin, int32_t end) {
  const geometry &g = j.g;
  const int32_t blocks = g.images * g.blocks, last = (end - 1) / blocks;
  const int32_t chunk = larger(1, (int32_t)(MAX_CHUNK / (g.widest * g.column_bytes)));
  prepare_all(j, begin, end);
  for (int32_t first = begin / blocks; first <= last; first += chunk) {
    const int32_t stop = smaller(first + chunk, last + 1), parts = blocks * (stop - first);
    for (int32_t index = 0, part = 0; index < blocks; ++index) {
      const block b = block_at(j, index, index);
      for (int32_t i = first; i < stop; ++i, ++part) {
        const int32_t unit = i * blocks + index;
        if (unit < begin || unit >= end) continue;
        run_block(j, line, b, i, share_of_panels(j, stop, smaller(stop + chunk, last + 1), part, parts));
      }
    }
  }
}

template <requantize_path PATH>
void run_units(const job &j, int32_t begin, int32_t end) {
  pipeline line = {MULTIPLY<PATH>, {}, 0};
  line.waiting.w.W = 1;
  if (j.g.panel_major)
    run_panel_major(j, &line, begin, end);
  else
    run_block_major(j, &line, begin, end);
  line.multiply[line.waiting.w.W - 1](j, {}, {}, NULL, line.waiting, {NULL, NULL});
}

/* Palette 1 (Intel SDM volume 1, 18.2): accumulators 0..2, A 3, B 4. */
void configure(int32_t rows) {
  struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes_per_row[16];
    uint8_t rows[16];
  } config = {};
  config.palette = 1;
  for (int i = 0; i <= 4; ++i) config.bytes_per_row[i] = 64, config.rows[i] = (uint8_t)(i == 4 ? 16 : rows);
  __asm__ volatile("" ::"m"(config) : "memory");
  _tile_loadconfig(&config);
}

void run(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *scratch) {
  const fxc_conv *p = (const fxc_conv *)params;
  job j = {p, in, out, (const uint8_t *)in[0], (const uint8_t *)p->weight, geometry_of(p), {}, 0, is_linear(p)};
  if (begin >= end) return;
  j.w = workspace_of(j.g, scratch);
  if (j.g.from == WINDOW && j.linear && ((uintptr_t)j.x | (uintptr_t)p->in_pixel_stride) % STEP == 0) j.g.from = DIRECT;
  configure(j.g.rows);
  fill_offsets(j);
  const requantize_path path = ((const header *)j.packed)->path;
  j.left_shift = ((const header *)j.packed)->left_shift;
  if (path == REQUANTIZE_ONE)
    run_units<REQUANTIZE_ONE>(j, begin, end);
  else if (path == REQUANTIZE_TWO)
    run_units<REQUANTIZE_TWO>(j, begin, end);
  else
    run_units<REQUANTIZE_ANY>(j, begin, end);
  _tile_release();
}

}  // namespace

extern "C" {
extern const fxc_kernel fxc_u8_conv_48x16__amx;
const fxc_kernel fxc_u8_conv_48x16__amx = {
    "fxc_u8_conv_48x16__amx", "conv", "amx", accepts, packed_bytes, pack, units, scratch_bytes, run,
};
}

#pragma GCC pop_options

#endif
