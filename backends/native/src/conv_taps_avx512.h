/* Where a convolution tile finds its input: one pointer per tap and pixel (for AVX-512 convolution kernels).

   A reduction is `taps` pieces of `depth` contiguous bytes. Usually a piece is the channels of one kernel tap; for few channels
   the taps of a kernel row are merged into one piece of (kernel width * channels) bytes, adjacent in channels-last memory, so
   that 3 x 3 x 3 becomes 3 pieces of 9 bytes. Pieces in the border point to pad values; merged pieces that cross the left or
   right border, or whose pixels are not adjacent, are assembled in scratch.

   Static functions only, included after the target pragma. Pieces are read up to the next multiple of 4 bytes. */

#ifndef FXC_CONV_TAPS_AVX512_H
#define FXC_CONV_TAPS_AVX512_H

#include <immintrin.h>
#include <string.h>

#include "fxc_kernels.h"

constexpr static int32_t MERGE_CHANNELS = 64; /* merging pays up to here; beyond, copies cost more than pointers */
constexpr static int32_t TILE_PIXELS = 16;    /* row length of the pointer table: the most pixels of a tile */

struct reduction {
  int32_t merged, taps, depth, quads; /* quads: groups of 4 bytes per piece */
};

/* Groups as they are computed: groups of few output channels are taken together, as many as fill 16 lanes, with zero weights
   between them (the multiplications stay as many, the lanes are used). */
static inline int32_t groups_of(const fxc_conv *p) {
  int32_t together = 16 / (p->out_channels / p->groups);
  while (together > 1 && p->groups % together) --together;
  return together > 1 ? p->groups / together : p->groups;
}

static inline int64_t align64(int64_t bytes) { return (bytes + 63) / 64 * 64; }

/* The reduction that weights are packed for. */
static inline reduction reduction_of(const fxc_conv *p) {
  reduction r;
  const int32_t channels = p->in_channels / groups_of(p);
  r.merged = groups_of(p) == 1 && p->kernel[2] > 1 && p->dilation[2] == 1 && channels <= MERGE_CHANNELS;
  r.taps = p->kernel[0] * p->kernel[1] * (r.merged ? 1 : p->kernel[2]);
  r.depth = r.merged ? channels * p->kernel[2] : channels;
  r.quads = (r.depth + 3) / 4;
  return r;
}

/* Pad values of one piece (of all groups), for pack(). */
static inline int64_t pad_bytes(const fxc_conv *p) {
  const reduction r = reduction_of(p);
  return align64((r.merged ? r.depth : p->in_channels) + 64);
}

static inline void pack_pad(const fxc_conv *p, uint8_t *pad) {
  const int32_t copies = reduction_of(p).merged ? p->kernel[2] : 1;
  memset(pad, 0, (size_t)pad_bytes(p));
  for (int32_t k = 0; k < copies; ++k) memcpy(pad + k * p->in_channels, p->pad_value, (size_t)p->in_channels);
}

/* Addresses are integers: those of border pixels lie outside the image and are replaced before use. */
struct tap_source {
  const fxc_conv *p;
  reduction r;
  const uint8_t *x, *pad;
  int32_t out_width, in_width;   /* of a row of pixels: the whole batch if `linear` */
  bool linear;                   /* one tap, stride 1, no border: pixel i of the batch lies at x + i * in_pixel_stride */
  bool adjacent;                 /* pieces inside the image need no assembly */
  int32_t extent[3];             /* of the kernel */
  int64_t *offset;               /* (taps) from the first tap */
  const uint8_t **pointer;       /* (taps, TILE_PIXELS): the result */
  uint8_t *patch;                /* (TILE_PIXELS, taps) pieces of patch_bytes */
  int64_t patch_bytes;
};

/* The next pixel: its n, d, h, w and the address of its first tap. */
struct tap_cursor {
  int32_t at[4], column;
  int64_t address;
  bool inside; /* the depth and height range of its window */
};

static inline int64_t kernel_taps(const fxc_conv *p) { return (int64_t)p->kernel[0] * p->kernel[1] * p->kernel[2]; }

static inline size_t tap_scratch_bytes(const fxc_conv *p) {
  const reduction r = reduction_of(p);
  const int64_t patches = r.merged ? TILE_PIXELS * r.taps * align64(r.depth + 64) : 0;
  return (size_t)(align64(kernel_taps(p) * 8) + kernel_taps(p) * TILE_PIXELS * 8 + patches);
}

static inline bool is_linear(const fxc_conv *p) {
  for (int i = 0; i < 3; ++i)
    if (p->kernel[i] != 1 || p->stride[i] != 1 || p->pad_before[i] != 0 || p->in_size[i] != p->out_size[i]) return false;
  const int32_t row = p->in_size[2] * p->in_pixel_stride, plane = p->in_size[1] * row;
  return (p->in_size[1] == 1 || p->in_row_stride == row) && (p->in_size[0] == 1 || p->in_plane_stride == plane) &&
         (p->batch == 1 || p->in_image_stride == p->in_size[0] * plane);
}

static inline void tap_offsets(tap_source *s) {
  const fxc_conv *p = s->p;
  int64_t *offset = s->offset;
  for (int32_t a = 0; a < p->kernel[0]; ++a)
    for (int32_t b = 0; b < p->kernel[1]; ++b)
      for (int32_t c = 0; c < (s->r.merged ? 1 : p->kernel[2]); ++c)
        *offset++ = (int64_t)a * p->dilation[0] * p->in_plane_stride + (int64_t)b * p->dilation[1] * p->in_row_stride +
                    (int64_t)c * p->dilation[2] * p->in_pixel_stride;
}

/* scratch: tap_scratch_bytes, 64-byte aligned. pad: as packed. */
static inline tap_source tap_source_of(const fxc_conv *p, const void *x, const uint8_t *pad, void *scratch) {
  tap_source s;
  const bool contiguous = p->in_pixel_stride == p->in_channels;
  s.p = p, s.r = reduction_of(p), s.x = (const uint8_t *)x, s.pad = pad;
  if (s.r.merged && !contiguous && p->in_channels % 4 == 0) { /* weights of single taps are packed the same */
    s.r.merged = 0, s.r.taps *= p->kernel[2];
    s.r.depth = p->in_channels, s.r.quads = p->in_channels / 4;
  }
  s.adjacent = !s.r.merged || contiguous;
  s.linear = is_linear(p);
  s.out_width = s.linear ? p->batch * p->out_size[0] * p->out_size[1] * p->out_size[2] : p->out_size[2];
  s.in_width = s.linear ? s.out_width : p->in_size[2];
  for (int i = 0; i < 3; ++i) s.extent[i] = (p->kernel[i] - 1) * p->dilation[i] + 1;
  s.offset = (int64_t *)scratch;
  s.pointer = (const uint8_t **)((uint8_t *)scratch + align64(kernel_taps(p) * 8));
  s.patch = (uint8_t *)(s.pointer + kernel_taps(p) * TILE_PIXELS);
  s.patch_bytes = align64(s.r.depth + 64);
  tap_offsets(&s);
  return s;
}

static inline bool range_inside(const tap_source &s, int i, int32_t origin) {
  return origin >= 0 && origin + s.extent[i] <= s.p->in_size[i];
}

/* Start of the row of pixels at->at[0..2]. */
static inline void start_row(const tap_source &s, tap_cursor *c) {
  const fxc_conv *p = s.p;
  const int32_t d = c->at[1] * p->stride[0] - p->pad_before[0], h = c->at[2] * p->stride[1] - p->pad_before[1];
  c->column = c->at[3] * p->stride[2] - p->pad_before[2];
  c->inside = range_inside(s, 0, d) && range_inside(s, 1, h);
  c->address = (int64_t)(intptr_t)s.x + (int64_t)c->at[0] * p->in_image_stride + (int64_t)d * p->in_plane_stride +
               (int64_t)h * p->in_row_stride + (int64_t)c->column * p->in_pixel_stride;
}

static inline tap_cursor cursor_at(const tap_source &s, int32_t pixel) {
  tap_cursor c = {{0, 0, 0, pixel}, 0, 0, false};
  for (int i = 3; i > 0 && !s.linear; --i) c.at[i] = pixel % s.p->out_size[i - 1], pixel /= s.p->out_size[i - 1];
  if (!s.linear) c.at[0] = pixel;
  start_row(s, &c);
  return c;
}

/* Moves on by `count` pixels, at most to the start of the next row. */
static inline void advance(const tap_source &s, tap_cursor *c, int32_t count) {
  const fxc_conv *p = s.p;
  c->at[3] += count;
  if (c->at[3] < s.out_width) {
    c->column += count * p->stride[2];
    c->address += (int64_t)count * p->stride[2] * p->in_pixel_stride;
    return;
  }
  c->at[3] = 0;
  for (int i = 2; i > 0 && ++c->at[i] == p->out_size[i - 1]; --i) c->at[i] = 0, c->at[0] += i == 1;
  start_row(s, c);
}

/* Copies `count` bytes; reads up to the next multiple of 64. */
static inline void copy_bytes(uint8_t *target, const uint8_t *from, int32_t count) {
  for (int32_t c = 0; c < count; c += 64) {
    const __mmask64 mask = count - c < 64 ? (1ULL << (count - c)) - 1 : ~0ULL;
    _mm512_mask_storeu_epi8(target + c, mask, _mm512_maskz_loadu_epi8(mask, from + c));
  }
}

/* A merged piece from input column `column` on that is not wholly inside or not adjacent. */
static inline const uint8_t *assemble(const tap_source &s, const uint8_t *row, int32_t column, uint8_t *patch) {
  const int32_t channels = s.p->in_channels;
  for (int32_t k = 0; k < s.p->kernel[2]; ++k) {
    const int32_t w = column + k;
    copy_bytes(patch + k * channels, w >= 0 && w < s.p->in_size[2] ? row + (ptrdiff_t)w * s.p->in_pixel_stride : s.pad, channels);
  }
  return patch;
}

/* Pointers of tile pixel i for the taps of one kernel row; row: the input row, NULL outside. */
static inline void row_pointers(const tap_source &s, int32_t i, int32_t tap, const uint8_t *row, int32_t column, int32_t first_channel) {
  const fxc_conv *p = s.p;
  const uint8_t **pointer = s.pointer + (ptrdiff_t)tap * TILE_PIXELS + i;
  if (s.r.merged) {
    const bool inside = s.adjacent && column >= 0 && column + s.extent[2] <= p->in_size[2];
    if (!row)
      *pointer = s.pad;
    else if (inside)
      *pointer = row + (ptrdiff_t)column * p->in_pixel_stride;
    else
      *pointer = assemble(s, row, column, s.patch + ((ptrdiff_t)i * s.r.taps + tap) * s.patch_bytes);
    return;
  }
  for (int32_t k = 0; k < p->kernel[2]; ++k) {
    const int32_t w = column + k * p->dilation[2];
    const bool inside = row && w >= 0 && w < p->in_size[2];
    pointer[k * TILE_PIXELS] = (inside ? row + (ptrdiff_t)w * p->in_pixel_stride : s.pad) + first_channel;
  }
}

/* Pointers of tile pixel i at the cursor, whose window is not wholly inside. */
static inline void border_pointers(const tap_source &s, int32_t i, const tap_cursor &c, int32_t first_channel) {
  const fxc_conv *p = s.p;
  const uint8_t *image = s.x + (ptrdiff_t)c.at[0] * p->in_image_stride;
  const int32_t row_taps = s.r.merged ? 1 : p->kernel[2];
  int32_t tap = 0;
  for (int32_t a = 0; a < p->kernel[0]; ++a) {
    const int32_t d = c.at[1] * p->stride[0] - p->pad_before[0] + a * p->dilation[0];
    for (int32_t b = 0; b < p->kernel[1]; ++b, tap += row_taps) {
      const int32_t h = c.at[2] * p->stride[1] - p->pad_before[1] + b * p->dilation[1];
      const bool inside = d >= 0 && d < p->in_size[0] && h >= 0 && h < p->in_size[1];
      const uint8_t *row = inside ? image + (ptrdiff_t)d * p->in_plane_stride + (ptrdiff_t)h * p->in_row_stride : NULL;
      row_pointers(s, i, tap, row, c.column, first_channel);
    }
  }
}

/* Pointer table from the addresses of the pixels' first taps. */
static inline void spread_pointers(const tap_source &s, __m512i low, __m512i high) {
  for (int32_t tap = 0; tap < s.r.taps; ++tap) {
    const __m512i offset = _mm512_set1_epi64(s.offset[tap]);
    _mm512_storeu_si512(s.pointer + (ptrdiff_t)tap * TILE_PIXELS, _mm512_add_epi64(low, offset));
    _mm512_storeu_si512(s.pointer + (ptrdiff_t)tap * TILE_PIXELS + 8, _mm512_add_epi64(high, offset));
  }
}

/* Fills the pointer table for the `count` pixels at the cursor, which moves on; first_channel is that of the group. Entries from
   `count` to `padded` repeat the last pixel. */
static inline void tile_pointers(const tap_source &s, tap_cursor *c, int32_t count, int32_t padded, int32_t first_channel) {
  const int64_t step = (int64_t)s.p->stride[2] * s.p->in_pixel_stride;
  const int32_t last = c->column + (count - 1) * s.p->stride[2];
  if (c->inside && s.adjacent && c->column >= 0 && last + s.extent[2] <= s.in_width && c->at[3] + count <= s.out_width) {
    const __m512i index = _mm512_min_epi64(_mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7), _mm512_set1_epi64(count - 1));
    const __m512i more = _mm512_min_epi64(_mm512_setr_epi64(8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi64(count - 1));
    const __m512i steps = _mm512_set1_epi64(step), from = _mm512_set1_epi64(c->address + first_channel);
    spread_pointers(s, _mm512_add_epi64(from, _mm512_mul_epi32(index, steps)), _mm512_add_epi64(from, _mm512_mul_epi32(more, steps)));
    advance(s, c, count);
    return;
  }
  alignas(64) int64_t address[TILE_PIXELS] = {0};
  tap_cursor walk = *c;
  uint32_t border = 0;
  for (int32_t i = 0; i < count; ++i, advance(s, &walk, 1)) {
    const bool inside = walk.inside && s.adjacent && walk.column >= 0 && walk.column + s.extent[2] <= s.in_width;
    address[i] = walk.address + first_channel;
    border |= (uint32_t)!inside << i;
  }
  spread_pointers(s, _mm512_load_si512(address), _mm512_load_si512(address + 8));
  for (int32_t i = 0; i < count; ++i, advance(s, c, 1))
    if (border >> i & 1) border_pointers(s, i, *c, first_channel);
  for (int32_t tap = 0; tap < s.r.taps && count < padded; ++tap)
    for (int32_t i = count; i < padded; ++i) s.pointer[tap * TILE_PIXELS + i] = s.pointer[tap * TILE_PIXELS + count - 1];
}

#endif
