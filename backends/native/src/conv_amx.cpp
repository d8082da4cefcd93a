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

#include "conv_amx_geometry.h"
#include "conv_amx_input.h"

namespace {

constexpr int64_t MAX_CHUNK = 1 << 18; /* bytes of the panels that are in use at a time, panel-major */

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
      spill_accumulators(acc, W, v, _mm512_add_epi32(_mm512_load_si512(d.accumulator + 16 * (W * r + v)),
                                                     _mm512_load_si512(d.w.bias + 16 * v)));
    requantize_row(j.p->requantize, acc, d.w.first, d.w.count, j.in, j.p->branch_pixel_stride, d.rows->pixel[r], j.out,
                   j.p->out_pixel_stride);
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
