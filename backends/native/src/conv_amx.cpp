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
     WINDOW  the taps of a position gathered into one row of scratch (im2col): everything else;
     PIECES  the same for few channels: several kernel rows make up each 64 bytes, as many as fit, and nothing crosses them.

   Unit: (block, panel); panel-major where the weights are larger than the input, so that each thread reads its part of them
   once, else block-major. Packed: header, then per panel bias (W x 16), requantize_slots, W times the B tiles (16 groups of 4 k,
   16 channels, 4 k), zero padded; channels stand in the order of requantize_channel (int32 output: in theirs). Reads up to 64 bytes
   past an input and a branch. */

#if defined(__x86_64__)

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,amx-tile,amx-int8")

#include "conv_amx_blocks.h"
#include "conv_amx_output.h"

namespace {

constexpr int64_t MAX_CHUNK = 1 << 18; /* bytes of the panels that are in use at a time, panel-major */

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
  constexpr bool CODES = PATH == REQUANTIZE_ONE || PATH == REQUANTIZE_TWO || PATH == REQUANTIZE_WIDE;
  const pending d = before;
  const int32_t steps = j.g.steps, rows = j.g.rows, total = TILES > 0 ? w.W * steps : 1, quads = ceil_div(d.count, quad_pixels(W));
  const int32_t quads_per_step = ceil_div(quads, total);
  const int32_t lines_per_step = ceil_div((int32_t)((ahead.end - ahead.next) / 64), total);
  const int32_t *offset = j.w.offset;
  const int8_t *weight = w.weight;
  const uint8_t *a0 = b.a[0], *a1 = b.a[1], *a2 = b.a[2];
  const long stride = b.stride, pitch = 64 * w.W;
  const uint8_t *branch = j.branch_bytes ? (const uint8_t *)j.in[1] + (ptrdiff_t)d.w.first * j.branch_bytes : NULL;
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
      for (; quad < until; ++quad) {
        if constexpr (CODES)
          store_codes<W, PATH>(j, d, c, quad, branch, out, shifts_left);
        else if constexpr (PATH == REQUANTIZE_NONE)
          store_accumulators<W>(j, d, quad);
        else
          store_any(j, d, quad);
      }
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
  const int64_t bytes = panel_offset(j.g, end) - panel_offset(j.g, first), share = align64((bytes + parts - 1) / parts);
  const int64_t from = part * share;
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
    const int32_t image = index / g.blocks, slot = index % SLOTS;
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
  job j = {p, in, out, (const uint8_t *)in[0], (const uint8_t *)p->weight, geometry_of(p), {}, 0, 0, is_linear(p)};
  if (begin >= end) return;
  j.w = workspace_of(j.g, scratch);
  if (j.g.from == WINDOW && j.linear && ((uintptr_t)j.x | (uintptr_t)p->in_pixel_stride) % STEP == 0) j.g.from = DIRECT;
  configure(j.g.rows);
  fill_offsets(j);
  for (int32_t k = 0; j.g.from == PIECES && k < piece_bytes(p); ++k) j.w.pad[k] = p->pad_value[k % p->in_channels];
  const requantize_path path = ((const header *)j.packed)->path;
  j.left_shift = ((const header *)j.packed)->left_shift;
  if (path == REQUANTIZE_TWO || path == REQUANTIZE_WIDE) j.branch_bytes = p->requantize->branch[1].wide ? 4 : 1;
  if (path == REQUANTIZE_ONE)
    run_units<REQUANTIZE_ONE>(j, begin, end);
  else if (path == REQUANTIZE_TWO)
    run_units<REQUANTIZE_TWO>(j, begin, end);
  else if (path == REQUANTIZE_WIDE)
    run_units<REQUANTIZE_WIDE>(j, begin, end);
  else if (path == REQUANTIZE_NONE)
    run_units<REQUANTIZE_NONE>(j, begin, end);
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
