/* Convolution with AVX-512 VNNI: any kernel, stride, dilation, padding, groups; linear layers (one tap, one row of pixels).

   acc[o] = bias[o] + sum over taps and channels of weight * x (fxc_conv), four input channels per vpdpbusd lane; then the
   requantization of numerics.py (requantize_avx512.h) or int32.

   Register tile: P pixels x 16 W channels with W = 4, 3, 2, 1 and P W <= 24 accumulators, so that narrow layers do not
   waste lanes. The output channels of a group (of several groups if they are small, groups_of) are cut into blocks of 16 W
   (block_width); pixels are the flattened list over the batch. Where the input comes from stands in conv_taps_avx512.h: a
   pointer per pixel and tap, for few channels per pixel and kernel row, which serves first layers too.

   Unit: one tile (block-major, then pixels), so the weights of a block stay in cache while its pixels pass.

   Packed: see conv_pack_avx512vnni.h. Reads up to 64 bytes past an input and a branch. */

#if defined(__x86_64__)

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")

#include "conv_tile_avx512vnni.h"

namespace {

constexpr int32_t LINEAR_TILES = 16; /* computed per call where pixels follow each other */

int32_t units(const void *params) {
  const fxc_conv *p = (const fxc_conv *)params;
  const int32_t pixels = pixels_of(p);
  int32_t group = 0;
  for (int32_t left = vectors_per_group(p); left > 0; left -= block_width(left)) {
    const int32_t P = tile_pixels(block_width(left));
    group += (pixels + P - 1) / P;
  }
  return groups_of(p) * group;
}

/* Room for the pixels of a tile that exceed the last. */
struct tile_scratch {
  int32_t out[MAX_PIXELS * 64], branch[MAX_PIXELS * 64 + 64];
};

size_t scratch_bytes(const void *params) { return sizeof(tile_scratch) + tap_scratch_bytes((const fxc_conv *)params); }

struct step {
  const fxc_conv *p;
  const void *const *in;
  void *out;
  tap_source source;
  tile_scratch *room;
  int32_t pixels;
};

target target_of(const step &s, const block &b) {
  const fxc_requantize *q = s.p->requantize;
  const header *h = (const header *)s.p->weight;
  target t;
  memset(&t, 0, sizeof t);
  t.path = h->path, t.left_shift = h->left_shift, t.bounded = h->bounded;
  t.mask = channel_mask(b.count);
  t.guard = guard_factor(q);
  t.lookup_table = q && has_table_lookup() ? q->table : NULL;
  if (t.path == REQUANTIZE_TWO || t.path == REQUANTIZE_WIDE) t.branch_bytes = q->branch[1].wide ? 4 : 1;
  return t;
}

/* Points t to the tile's place in the output and the branch, or to the room if the tile is not full. */
void place(const step &s, const block &b, int32_t pixel, int32_t count, bool full, target *t) {
  const ptrdiff_t stride = s.p->branch_pixel_stride[1], bytes = t->branch_bytes;
  const ptrdiff_t out = (ptrdiff_t)pixel * s.p->out_pixel_stride + b.first;
  const uint8_t *branch = bytes ? (const uint8_t *)s.in[1] + (pixel * stride + b.first) * bytes : NULL;
  const bool direct = full && t->path != REQUANTIZE_ANY;
  t->out = !direct ? (void *)s.room->out : t->path == REQUANTIZE_NONE ? (void *)((int32_t *)s.out + out) : (uint8_t *)s.out + out;
  t->out_stride = direct ? s.p->out_pixel_stride : 16 * b.W;
  t->branch = full ? branch : (const uint8_t *)s.room->branch;
  t->branch_stride = full ? stride : 16 * b.W;
  for (int32_t i = 0; !full && branch && i < count; ++i)
    copy_bytes((uint8_t *)s.room->branch + 16 * b.W * i * bytes, branch + i * stride * bytes, b.count * (int32_t)bytes);
}

/* What is left to do after the tile: pixels out of the room, tables, general requantization. */
void complete(const step &s, const block &b, int32_t pixel, int32_t count, bool full, requantize_path path) {
  const fxc_conv *p = s.p;
  if (path == REQUANTIZE_ANY || (path == REQUANTIZE_NONE && !full)) {
    for (int32_t i = 0; i < count; ++i)
      requantize_row(p->requantize, s.room->out + i * 16 * b.W, b.first, b.count, s.in, p->branch_pixel_stride, pixel + i, s.out,
                     p->out_pixel_stride);
    return;
  }
  if (path == REQUANTIZE_NONE) return;
  uint8_t *out = (uint8_t *)s.out + (ptrdiff_t)pixel * p->out_pixel_stride + b.first;
  for (int32_t i = 0; !full && i < count; ++i)
    copy_bytes(out + (ptrdiff_t)i * p->out_pixel_stride, (uint8_t *)s.room->out + 16 * b.W * i, b.count);
  if (p->requantize->table && !has_table_lookup()) apply_table(p->requantize->table, out, count, p->out_pixel_stride, b.count);
}

/* Tiles that one call may compute from tile `index` on: more than one only where input pixels follow each other. */
int32_t run_of_tiles(const step &s, const target &t, int32_t P, int32_t index, int32_t end) {
  const int32_t full = s.pixels / P;
  if (!s.source.linear || t.path == REQUANTIZE_ANY || index >= full) return 1;
  const int32_t left = (end < full ? end : full) - index;
  return left < LINEAR_TILES ? left : LINEAR_TILES;
}

/* Tiles begin..end-1 of one block. */
void run_block(const step &s, const block &b, int32_t begin, int32_t end) {
  const int32_t P = tile_pixels(b.W);
  target t = target_of(s, b);
  tap_cursor cursor = cursor_at(s.source, begin * P);
  for (int32_t i = begin; i < end; i += t.tiles) {
    t.tiles = run_of_tiles(s, t, P, i, end);
    t.number = i - begin;
    const int32_t pixel = i * P, count = s.pixels - pixel < P ? s.pixels - pixel : P;
    const tile_choice &choice = tile_for(b.W, count);
    const bool full = count == choice.pixels;
    if (s.source.linear && full) {
      t.pointer = NULL, t.x_stride = s.p->in_pixel_stride;
      t.x = s.source.x + (ptrdiff_t)pixel * t.x_stride + b.in_first;
      advance(s.source, &cursor, count * t.tiles);
    } else {
      t.pointer = s.source.pointer;
      tile_pointers(s.source, &cursor, count, choice.pixels, b.in_first);
    }
    place(s, b, pixel, count, full, &t);
    choice.run(s.source.r, t, b);
    complete(s, b, pixel, count * t.tiles, full, t.path);
  }
}

void run(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *scratch) {
  const fxc_conv *p = (const fxc_conv *)params;
  const uint8_t *packed = (const uint8_t *)p->weight;
  const reduction r = reduction_of(p);
  const tap_source source = tap_source_of(p, in[0], packed + sizeof(header), (uint8_t *)scratch + sizeof(tile_scratch));
  const step s = {p, in, out, source, (tile_scratch *)scratch, pixels_of(p)};
  block_walk walk = first_block(p, (int64_t)sizeof(header) + pad_bytes(p));
  for (int32_t unit = 0; unit < end;) {
    const block b = next_block(p, r, &walk, packed);
    const int32_t P = tile_pixels(b.W), tiles = (s.pixels + P - 1) / P;
    const int32_t from = begin > unit ? begin - unit : 0, to = end - unit < tiles ? end - unit : tiles;
    if (from < to) run_block(s, b, from, to);
    unit += tiles;
  }
}

}  // namespace

extern "C" {
extern const fxc_kernel fxc_u8_conv_6x64__avx512vnni;
const fxc_kernel fxc_u8_conv_6x64__avx512vnni = {
    "fxc_u8_conv_6x64__avx512vnni", "conv", "avx512vnni", NULL, packed_bytes, pack, units, scratch_bytes, run,
};
}

#pragma GCC pop_options

#endif
