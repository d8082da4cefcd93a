/* Convolution with AVX-512 VNNI: any kernel, stride, dilation, padding, groups; linear layers (one tap, one row of pixels).

   acc[o] = bias[o] + sum over taps and channels of weight * x (fxc_conv), four input channels per vpdpbusd lane; then the
   requantization of numerics.py (requantize_avx512.h) or int32.

   Register tile: P pixels x 16 W channels with W = 4, 3, 2, 1 and P W <= 24 accumulators, so that narrow layers do not
   waste lanes. The output channels of a group (of several groups if they are small, groups_of) are cut into blocks of 16 W
   (block_width); pixels are the flattened list over the batch. Where the input comes from stands in conv_taps_avx512.h: a
   pointer per pixel and tap, for few channels per pixel and kernel row, which serves first layers too.

   Unit: one tile (block-major, then pixels), so the weights of a block stay in cache while its pixels pass.

   Packed: header, row of pad values, then per block bias (W x 16), requantize_slots, and weights (tap, 4 channels, W, lane of
   16 outputs, 4 channels), zero padded. Reads up to 64 bytes past an input and a branch. */

#if defined(__x86_64__)

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")

#include "conv_taps_avx512.h"
#include "kernel_row.h"
#include "requantize_avx512.h"

namespace {

constexpr int32_t MAX_PIXELS = 12;
constexpr int32_t LINEAR_TILES = 16; /* computed per call where pixels follow each other */

int32_t tile_pixels(int32_t W) { return W == 4 ? 6 : W == 3 ? 8 : MAX_PIXELS; }

/* --------------------------------------------------------------------------------------------------------- blocks */

/* Vectors of the next block when `left` vectors of 16 channels remain. */
int32_t block_width(int32_t left) { return left < 4 ? left : 4; }

int32_t vectors_per_group(const fxc_conv *p) { return (p->out_channels / groups_of(p) + 15) / 16; }

int32_t pixels_of(const fxc_conv *p) { return p->batch * p->out_size[0] * p->out_size[1] * p->out_size[2]; }

int64_t block_bytes(const reduction &r, int32_t W) {
  return 64 * W + (int64_t)sizeof(requantize_slots) + (int64_t)r.taps * r.quads * W * 64;
}

/* One block of output channels and where its packed data lies. */
struct block {
  int32_t W, first, count, in_first;
  const int32_t *bias;
  const requantize_slots *slots;
  const int8_t *weight;
};

/* Steps through the blocks of all groups. */
struct block_walk {
  int32_t group, vector, vectors, group_channels;
  int64_t offset;
};

block_walk first_block(const fxc_conv *p, int64_t offset) {
  return {0, 0, vectors_per_group(p), p->out_channels / groups_of(p), offset};
}

/* The block at `walk`, which moves on. */
block next_block(const fxc_conv *p, const reduction &r, block_walk *walk, const uint8_t *packed) {
  block b;
  b.W = block_width(walk->vectors - walk->vector);
  b.first = walk->group * walk->group_channels + walk->vector * 16;
  b.count = walk->group_channels - walk->vector * 16 < 16 * b.W ? walk->group_channels - walk->vector * 16 : 16 * b.W;
  b.in_first = walk->group * (p->in_channels / groups_of(p));
  b.bias = (const int32_t *)(packed + walk->offset);
  b.slots = (const requantize_slots *)(b.bias + 16 * b.W);
  b.weight = (const int8_t *)(b.slots + 1);
  walk->offset += block_bytes(r, b.W);
  walk->vector += b.W;
  if (walk->vector == walk->vectors) walk->vector = 0, ++walk->group;
  return b;
}

/* -------------------------------------------------------------------------------------------------------- packing */

struct header {
  requantize_path path;
  int32_t left_shift; /* reduced */
  int32_t bounded;
  int32_t reserved[13];
};

size_t packed_bytes(const void *params) {
  const fxc_conv *p = (const fxc_conv *)params;
  const reduction r = reduction_of(p);
  int64_t group = 0;
  for (int32_t left = vectors_per_group(p); left > 0; left -= block_width(left)) group += block_bytes(r, block_width(left));
  return (size_t)((int64_t)sizeof(header) + pad_bytes(p) + groups_of(p) * group);
}

/* Weight of output channel o at byte c of piece `tap`, `together` groups being one: 0 for the input channels of the others. */
int8_t weight_at(const fxc_conv *p, const reduction &r, int32_t together, int32_t o, int32_t tap, int32_t c) {
  if (together == 1) return p->weight[((int64_t)o * r.taps + tap) * r.depth + c];
  const int32_t channels = p->in_channels / p->groups;
  const int32_t pixel = c / (channels * together), group = c / channels % together;
  if (o / (p->out_channels / p->groups) % together != group) return 0;
  const int64_t at = (int64_t)tap * (r.merged ? p->kernel[2] : 1) + pixel;
  return p->weight[((int64_t)o * kernel_taps(p) + at) * channels + c % channels];
}

/* Weights of vector j of block b. */
void pack_vector(const fxc_conv *p, const reduction &r, const block &b, int32_t j, int8_t *packed) {
  const int32_t together = p->groups / groups_of(p);
  for (int32_t lane = 0; lane < 16; ++lane) {
    const int32_t channel = requantize_channel(b.W, j, lane / 4, lane % 4);
    if (channel >= b.count) continue;
    for (int32_t tap = 0; tap < r.taps; ++tap)
      for (int32_t c = 0; c < r.depth; ++c)
        packed[((((int64_t)tap * r.quads + c / 4) * b.W + j) * 16 + lane) * 4 + c % 4] =
            weight_at(p, r, together, b.first + channel, tap, c);
  }
}

void pack_block(const fxc_conv *p, const reduction &r, const block &b) {
  int32_t *bias = (int32_t *)b.bias;
  requantize_slots *slots = (requantize_slots *)b.slots;
  for (int32_t j = 0; j < b.W; ++j) {
    for (int32_t lane = 0; lane < 16; ++lane) {
      const int32_t channel = requantize_channel(b.W, j, lane / 4, lane % 4);
      bias[16 * j + lane] = channel < b.count ? p->bias[b.first + channel] : 0;
    }
    pack_vector(p, r, b, j, (int8_t *)b.weight);
  }
  if (b.W == 4) pack_slots<4>(slots, p->requantize, b.first, b.count);
  if (b.W == 3) pack_slots<3>(slots, p->requantize, b.first, b.count);
  if (b.W == 2) pack_slots<2>(slots, p->requantize, b.first, b.count);
  if (b.W == 1) pack_slots<1>(slots, p->requantize, b.first, b.count);
}

void pack(const void *params, void *packed) {
  const fxc_conv *p = (const fxc_conv *)params;
  const reduction r = reduction_of(p);
  memset(packed, 0, packed_bytes(params));
  ((header *)packed)->path = requantize_kind(p->requantize);
  ((header *)packed)->left_shift = reduced_left_shift(p->requantize);
  ((header *)packed)->bounded = has_bounds(p->requantize);
  pack_pad(p, (uint8_t *)packed + sizeof(header));
  block_walk walk = first_block(p, (int64_t)sizeof(header) + pad_bytes(p));
  while (walk.group < groups_of(p)) pack_block(p, r, next_block(p, r, &walk, (const uint8_t *)packed));
}

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

/* ------------------------------------------------------------------------------------------------------------- tile */

/* Input and output of `tiles` successive tiles of P pixels. Input: pixel i of the tile and tap t at pointer[t * TILE_PIXELS + i]
   (one tile), or, where pointer is NULL (one tap), pixel i of all tiles at x + i * x_stride. Output: codes from `out` on, or
   accumulators in channel order (P, 16 W) (one tile). */
struct target {
  requantize_path path;
  int32_t left_shift, bounded, tiles;
  const uint8_t *const *pointer;
  const uint8_t *x;
  ptrdiff_t x_stride;
  __mmask64 mask;
  __m512i guard;
  const uint8_t *lookup_table; /* looked up before storing; NULL: none, or applied afterwards */
  uint8_t *out;
  const uint8_t *branch;
  ptrdiff_t out_stride, branch_stride;
  int32_t *accumulators;
};

/* acc += x * w over groups of 4. Inline assembly because gcc 12 spills the accumulators of the intrinsic. */
inline __attribute__((always_inline)) void dot(__m512i &acc, __m512i x, __m512i w) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(x), "v"(w));
}

inline __attribute__((always_inline)) __m512i broadcast4(const uint8_t *x) {
  int32_t value;
  memcpy(&value, x, 4);
  return _mm512_set1_epi32(value);
}

/* acc += the piece of 4 r.quads bytes per pixel that ends at x[i]. */
template <int W, int P>
inline __attribute__((always_inline)) void accumulate_piece(__m512i (&acc)[P][W], const uint8_t *const (&x)[P], ptrdiff_t bytes,
                                                            const int8_t *weight) {
  for (ptrdiff_t c = -bytes; c != 0; c += 4, weight += 64 * W) {
    __m512i w[W];
#pragma GCC unroll 4
    for (int j = 0; j < W; ++j) w[j] = _mm512_load_si512(weight + 64 * j);
#pragma GCC unroll 24
    for (int i = 0; i < P; ++i) {
      const __m512i v = broadcast4(x[i] + c);
#pragma GCC unroll 4
      for (int j = 0; j < W; ++j) dot(acc[i][j], v, w[j]);
    }
  }
}

template <int W, int P>
inline __attribute__((always_inline)) void accumulate(__m512i (&acc)[P][W], const reduction &r, const block &b, const target &t,
                                                      int32_t index) {
#pragma GCC unroll 24
  for (int i = 0; i < P; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < W; ++j) acc[i][j] = _mm512_load_si512(b.bias + 16 * j);
  const ptrdiff_t bytes = (ptrdiff_t)4 * r.quads;
  const uint8_t *x[P];
  if (!t.pointer) {
    const uint8_t *first = t.x + (ptrdiff_t)index * P * t.x_stride + bytes;
#pragma GCC unroll 24
    for (int i = 0; i < P; ++i, first += t.x_stride) x[i] = first;
    accumulate_piece<W, P>(acc, x, bytes, b.weight);
    return;
  }
  const uint8_t *const *pointer = t.pointer;
  const int8_t *weight = b.weight;
  for (int32_t tap = 0; tap < r.taps; ++tap, pointer += TILE_PIXELS, weight += bytes * 16 * W) {
#pragma GCC unroll 24
    for (int i = 0; i < P; ++i) x[i] = pointer[i] + bytes;
    accumulate_piece<W, P>(acc, x, bytes, weight);
  }
}

template <int W, int P, bool TWO, bool BOUNDED>
inline __attribute__((always_inline)) void store_codes(__m512i (&acc)[P][W], const target &t, const requantize_slots *slots,
                                                       int32_t index) {
  if (__builtin_expect(t.left_shift != 0, 0)) {
    const __m128i left = _mm_cvtsi32_si128(t.left_shift);
#pragma GCC unroll 24
    for (int i = 0; i < P; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < W; ++j) acc[i][j] = _mm512_sll_epi32(acc[i][j], left);
  }
  const __m512i guard = t.guard;
  const ptrdiff_t branch_stride = t.branch_stride, stride = t.out_stride;
  const uint8_t *branch = t.branch + (ptrdiff_t)index * P * branch_stride;
  uint8_t *out = t.out + (ptrdiff_t)index * P * stride;
  constexpr int Q = quad_pixels(W);
  __m512i y[P / Q]; /* all before the first store, which might alias the constants */
#pragma GCC unroll 24
  for (int i = 0; i < P; i += Q, branch += Q * branch_stride) {
    const __m512i v0 = acc[i][0], v1 = W == 1 ? acc[(i + 1) % P][0] : acc[i][1 % W];
    const __m512i v2 = W == 1 ? acc[(i + 2) % P][0] : W == 2 ? acc[(i + 1) % P][0] : acc[i][2 % W];
    const __m512i v3 = W == 1 ? acc[(i + 3) % P][0] : W == 2 ? acc[(i + 1) % P][1 % W] : acc[i][W - 1];
    y[i / Q] = TWO ? requantize_two<BOUNDED>(slots, guard, v0, v1, v2, v3, load_slots<W>(branch, branch_stride))
                   : requantize_one<BOUNDED>(slots, guard, v0, v1, v2, v3);
  }
  const __mmask64 mask = t.mask;
  if (t.lookup_table) {
#pragma GCC unroll 24
    for (int i = 0; i < P / Q; ++i) y[i] = lookup(t.lookup_table, y[i]);
  }
#pragma GCC unroll 24
  for (int i = 0; i < P; i += Q, out += Q * stride) store_slots<W>(out, stride, mask, y[i / Q]);
}

template <int W, int P>
void tile(const reduction &r, const target &t, const block &b) {
  for (int32_t index = 0; index < t.tiles; ++index) {
    if (t.path == REQUANTIZE_TWO) /* long before its use */
      for (int i = 0; i < P; ++i) _mm_prefetch(t.branch + (ptrdiff_t)(index * P + i) * t.branch_stride, _MM_HINT_T0);
    __m512i acc[P][W];
    accumulate<W, P>(acc, r, b, t, index);
    if (t.path == REQUANTIZE_ONE && !t.bounded) {
      store_codes<W, P, false, false>(acc, t, b.slots, index);
    } else if (t.path == REQUANTIZE_ONE) {
      store_codes<W, P, false, true>(acc, t, b.slots, index);
    } else if (t.path == REQUANTIZE_TWO && !t.bounded) {
      store_codes<W, P, true, false>(acc, t, b.slots, index);
    } else if (t.path == REQUANTIZE_TWO) {
      store_codes<W, P, true, true>(acc, t, b.slots, index);
    } else {
#pragma GCC unroll 24
      for (int i = 0; i < P; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < W; ++j) spill_accumulators(t.accumulators + i * 16 * W, W, j, acc[i][j]);
    }
  }
}

struct tile_choice {
  int32_t pixels;
  void (*run)(const reduction &, const target &, const block &);
};

/* Tiles of width W by size; the last is the full one. */
const tile_choice TILES[4][3] = {
    {{4, tile<1, 4>}, {8, tile<1, 8>}, {12, tile<1, 12>}},
    {{2, tile<2, 2>}, {6, tile<2, 6>}, {12, tile<2, 12>}},
    {{1, tile<3, 1>}, {4, tile<3, 4>}, {8, tile<3, 8>}},
    {{1, tile<4, 1>}, {3, tile<4, 3>}, {6, tile<4, 6>}},
};

const tile_choice &tile_for(int32_t W, int32_t count) {
  const tile_choice *c = TILES[W - 1];
  while (c->pixels < count) ++c;
  return *c;
}

/* -------------------------------------------------------------------------------------------------------------- run */

/* Room for the pixels of a tile that exceed the last, and for accumulators. */
struct tile_scratch {
  uint8_t out[MAX_PIXELS * 64], branch[MAX_PIXELS * 64 + 64];
  int32_t accumulators[MAX_PIXELS * 64];
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
  t.accumulators = s.room->accumulators;
  return t;
}

/* Points t to the tile's place in the output, or to the room if the tile is not full. */
void place(const step &s, const block &b, int32_t pixel, int32_t count, bool full, target *t) {
  const int32_t stride = s.p->branch_pixel_stride[1];
  const uint8_t *branch = t->path == REQUANTIZE_TWO ? (const uint8_t *)s.in[1] + (ptrdiff_t)pixel * stride + b.first : NULL;
  t->out = full ? (uint8_t *)s.out + (ptrdiff_t)pixel * s.p->out_pixel_stride + b.first : s.room->out;
  t->out_stride = full ? s.p->out_pixel_stride : 64;
  t->branch = full ? branch : s.room->branch;
  t->branch_stride = full ? stride : 64;
  for (int32_t i = 0; !full && branch && i < count; ++i) copy_bytes(s.room->branch + 64 * i, branch + (ptrdiff_t)i * stride, b.count);
}

/* What is left to do after the tile: pixels out of the room, tables, general requantization. */
void complete(const step &s, const block &b, int32_t pixel, int32_t count, bool full, requantize_path path) {
  const fxc_conv *p = s.p;
  uint8_t *out = (uint8_t *)s.out + (ptrdiff_t)pixel * p->out_pixel_stride + b.first;
  if (path == REQUANTIZE_ANY) {
    for (int32_t i = 0; i < count; ++i)
      requantize_row(p->requantize, s.room->accumulators + i * 16 * b.W, b.first, b.count, s.in, p->branch_pixel_stride, pixel + i, s.out,
                     p->out_pixel_stride);
    return;
  }
  for (int32_t i = 0; !full && i < count; ++i) copy_bytes(out + (ptrdiff_t)i * p->out_pixel_stride, s.room->out + 64 * i, b.count);
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
  step s = {p, in, out, tap_source_of(p, in[0], packed + sizeof(header), (uint8_t *)scratch + sizeof(tile_scratch)), (tile_scratch *)scratch,
            pixels_of(p)};
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
