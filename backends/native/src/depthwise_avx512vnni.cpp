/* Depthwise convolution (groups == in_channels == out_channels) with AVX-512 VNNI, any kernel, stride, dilation and padding.

   acc[c] = bias[c] + sum over taps of weight[c] * x[c] (fxc_conv), then requantized (requantize_avx512.h) or int32.

   64 channels at a time. Kernel rows (kernel depth x height) are taken four at a time: at one input column, the bytes of four
   rows are interleaved into quads (row 0, 1, 2, 3 of one channel), which one vpdpbusd multiplies by one column of the kernel.
   The interleaving leaves channel 16 L + 4 v + i in lane L, element i of vector v: slot order, so that narrowing restores the
   order of the channels for free. A strip of four neighboring outputs shares the quads of its input columns
   (depthwise_strip_avx512vnni.h).

   Strips whose window lies inside the image step through its rows; the others have a pointer per (row, column), to the pad
   values outside the image. In a last block of at most 32 or 16 channels, a vector takes 2 or 4 strips at once (FOLD).

   Unit: one strip, all channels.
   Packed: header, then per block bias (4 x 16, slot order), requantize_slots, weights (4 kernel rows, kernel width, vector 4,
   lane of 16 channels, 4 rows), zero padded; narrow blocks repeat in every fold. Reads up to 64 bytes past an input and a branch. */

#if defined(__x86_64__)

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")

#include "depthwise_strip_avx512vnni.h"

namespace {

constexpr int32_t STRIP = 4;
constexpr int32_t INSIDE_BYTES = 8192; /* output of the strips computed per call: they stay in L1 over the blocks */

struct header {
  requantize_path path;
  int32_t left_shift; /* reduced */
  int32_t bounded;
  int32_t reserved[13];
};

int64_t align64(int64_t bytes) { return (bytes + 63) / 64 * 64; }

int32_t kernel_rows(const fxc_conv *p) { return p->kernel[0] * p->kernel[1]; }

int32_t row_quads(const fxc_conv *p) { return (kernel_rows(p) + 3) / 4; }

int32_t blocks_of(const fxc_conv *p) { return (p->out_channels + BLOCK - 1) / BLOCK; }

int32_t output_rows(const fxc_conv *p) { return p->batch * p->out_size[0] * p->out_size[1]; }

int64_t block_bytes(const fxc_conv *p) {
  return 256 + (int64_t)sizeof(requantize_slots) + (int64_t)row_quads(p) * p->kernel[2] * 256;
}

/* --------------------------------------------------------------------------------------------------------- packing */

int accepts(const void *params) {
  const fxc_conv *p = (const fxc_conv *)params;
  return p->groups == p->in_channels && p->groups == p->out_channels;
}

size_t packed_bytes(const void *params) {
  const fxc_conv *p = (const fxc_conv *)params;
  return sizeof(header) + (size_t)(blocks_of(p) * block_bytes(p));
}

/* Strips per vector in a block of so many channels. */
int32_t fold_of(int32_t channels) { return channels <= 16 ? 4 : channels <= 32 ? 2 : 1; }

/* Bias and weights of a channel at slot `slot` of its block. */
void pack_channel(const fxc_conv *p, int32_t channel, int32_t slot, int32_t *bias, int8_t *weight) {
  const int32_t lane = slot / 16, v = slot % 16 / 4, i = slot % 4, element = 16 * v + 4 * lane + i;
  const int8_t *source = p->weight + (int64_t)channel * kernel_rows(p) * p->kernel[2];
  bias[element] = p->bias[channel];
  for (int32_t row = 0; row < kernel_rows(p); ++row)
    for (int32_t column = 0; column < p->kernel[2]; ++column)
      weight[((int64_t)(row / 4) * p->kernel[2] + column) * 256 + element * 4 + row % 4] = source[row * p->kernel[2] + column];
}

void pack(const void *params, void *packed) {
  const fxc_conv *p = (const fxc_conv *)params;
  memset(packed, 0, packed_bytes(params));
  ((header *)packed)->path = requantize_kind(p->requantize);
  ((header *)packed)->left_shift = reduced_left_shift(p->requantize);
  ((header *)packed)->bounded = has_bounds(p->requantize);
  for (int32_t b = 0; b < blocks_of(p); ++b) {
    int32_t *bias = (int32_t *)((uint8_t *)packed + sizeof(header) + b * block_bytes(p));
    requantize_slots *slots = (requantize_slots *)(bias + 64);
    const int32_t first = b * BLOCK, left = p->out_channels - first, count = left < BLOCK ? left : BLOCK;
    for (int32_t fold = 0; fold < fold_of(count); ++fold)
      for (int32_t c = 0; c < count; ++c) {
        const int32_t slot = c + fold * (BLOCK / fold_of(count));
        pack_channel(p, first + c, slot, bias, (int8_t *)(slots + 1));
        if (p->requantize) pack_slot(slots, p->requantize, reduced_left_shift(p->requantize), first + c, slot % 16 / 4, slot / 16, slot % 4);
      }
  }
}

/* ----------------------------------------------------------------------------------------------------------- strips */

/* Strips of STRIP outputs for the usual kernel widths and strides without dilation; one output otherwise. */
int32_t strip_of(const fxc_conv *p) {
  const bool width = p->kernel[2] == 3 || p->kernel[2] == 5 || p->kernel[2] == 7;
  return width && p->dilation[2] == 1 && p->stride[2] <= 2 ? STRIP : 1;
}

int32_t strips_per_row(const fxc_conv *p) { return (p->out_size[2] + strip_of(p) - 1) / strip_of(p); }

int32_t units(const void *params) {
  const fxc_conv *p = (const fxc_conv *)params;
  return strips_per_row(p) * output_rows(p);
}

int32_t columns_of(const fxc_conv *p) { return strip_columns(strip_of(p), p->kernel[2], p->stride[2]); }

/* Private to a thread: room for the pixels of a strip beyond its row, and for accumulators in channel order. */
struct strip_scratch {
  uint8_t out[STRIP * BLOCK], branch[STRIP * BLOCK];
  int32_t accumulators[STRIP * BLOCK];
};

size_t scratch_bytes(const void *params) {
  const fxc_conv *p = (const fxc_conv *)params;
  return sizeof(strip_scratch) + (size_t)align64(row_quads(p) * 4 * 8) + (size_t)row_quads(p) * 4 * round8(columns_of(p)) * 8;
}

typedef void (*strip_function)(const strip &);

template <int K, int STRIDE>
strip_function folded_function(int32_t fold) {
  return fold == 1 ? run_strips<STRIP, K, STRIDE, 1> : fold == 2 ? run_strips<STRIP, K, STRIDE, 2> : run_strips<STRIP, K, STRIDE, 4>;
}

/* The kernel for groups of `fold` strips, NULL if there is none. */
strip_function strip_function_of(const fxc_conv *p, int32_t fold) {
  if (strip_of(p) == 1) return fold == 1 ? run_strips<1, 0, 0, 1> : NULL;
  if (p->kernel[2] == 3) return p->stride[2] == 1 ? folded_function<3, 1>(fold) : folded_function<3, 2>(fold);
  if (p->kernel[2] == 5) return p->stride[2] == 1 ? folded_function<5, 1>(fold) : folded_function<5, 2>(fold);
  if (fold > 1) return NULL;
  return p->stride[2] == 1 ? run_strips<STRIP, 7, 1, 1> : run_strips<STRIP, 7, 2, 1>;
}

/* ------------------------------------------------------------------------------------------------------------ input */

/* Addresses of the input rows under the kernel for one output row, 0 outside the image; the rows beyond the kernel repeat the
   first (their weights are zero). */
void row_addresses(const fxc_conv *p, const uint8_t *x, int32_t output_row, int64_t *address) {
  const int32_t h = output_row % p->out_size[1], plane = output_row / p->out_size[1];
  const int32_t d = plane % p->out_size[0], n = plane / p->out_size[0];
  int32_t row = 0;
  for (int32_t a = 0; a < p->kernel[0]; ++a)
    for (int32_t b = 0; b < p->kernel[1]; ++b, ++row) {
      const int32_t at_d = d * p->stride[0] - p->pad_before[0] + a * p->dilation[0];
      const int32_t at_h = h * p->stride[1] - p->pad_before[1] + b * p->dilation[1];
      const bool inside = at_d >= 0 && at_d < p->in_size[0] && at_h >= 0 && at_h < p->in_size[1];
      address[row] = !inside ? 0
                             : (int64_t)(intptr_t)x + (int64_t)n * p->in_image_stride + (int64_t)at_d * p->in_plane_stride +
                                   (int64_t)at_h * p->in_row_stride;
    }
  for (; row % 4; ++row) address[row] = address[0];
}

/* Pointers (channel 0) of all rows for the strip whose first input column is `column`. */
void strip_pointers(const fxc_conv *p, const int64_t *address, int32_t column, const uint8_t **pointer) {
  const int32_t columns = round8(columns_of(p)), rows = row_quads(p) * 4;
  const __m512i outside = _mm512_set1_epi64((int64_t)(intptr_t)p->pad_value), none = _mm512_setzero_si512();
  const __m512i step = _mm512_set1_epi64(p->dilation[2]), pixel = _mm512_set1_epi64(p->in_pixel_stride);
  for (int32_t c = 0; c < columns; c += 8) {
    const __m512i index = _mm512_add_epi64(_mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7), _mm512_set1_epi64(c));
    const __m512i at = _mm512_add_epi64(_mm512_mul_epi32(index, step), _mm512_set1_epi64(column));
    const __mmask8 inside = _mm512_cmpge_epi64_mask(at, none) & _mm512_cmplt_epi64_mask(at, _mm512_set1_epi64(p->in_size[2]));
    const __m512i offset = _mm512_mul_epi32(at, pixel);
    for (int32_t row = 0; row < rows; ++row) {
      const __m512i there = _mm512_add_epi64(offset, _mm512_set1_epi64(address[row]));
      _mm512_storeu_si512(pointer + row * columns + c, _mm512_mask_mov_epi64(outside, address[row] ? inside : 0, there));
    }
  }
}

/* -------------------------------------------------------------------------------------------------------------- run */

struct step {
  const fxc_conv *p;
  const void *const *in;
  void *out;
  strip_scratch *room;
  int64_t *address;        /* (rows) */
  const uint8_t **pointer; /* (rows, round8(columns)) */
  strip_function single, folded; /* folded: for the last block, or NULL */
};

/* The parts of a strip that no block changes. */
strip strip_for(const step &s) {
  const fxc_conv *p = s.p;
  const header *h = (const header *)p->weight;
  strip t;
  memset(&t, 0, sizeof t);
  t.path = h->path, t.left_shift = h->left_shift, t.bounded = h->bounded;
  t.quads = row_quads(p), t.width = p->kernel[2], t.square = kernel_rows(p) == p->kernel[2], t.pixel = p->in_pixel_stride;
  t.pointer = s.pointer;
  t.guard = guard_factor(p->requantize);
  t.lookup_table = p->requantize && has_table_lookup() ? p->requantize->table : NULL;
  t.accumulators = s.room->accumulators;
  return t;
}

/* Output of block channels first.. for `count` pixels from `pixel` on: in place, or in the room if the strip is not full. */
void place(const step &s, strip *t, int32_t pixel, int32_t count, bool full, int32_t first, int32_t channels) {
  const int32_t stride = s.p->branch_pixel_stride[1];
  const uint8_t *branch = t->path == REQUANTIZE_TWO ? (const uint8_t *)s.in[1] + (ptrdiff_t)pixel * stride + first : NULL;
  t->out = full ? (uint8_t *)s.out + (ptrdiff_t)pixel * s.p->out_pixel_stride + first : s.room->out;
  t->out_stride = full ? s.p->out_pixel_stride : BLOCK;
  t->branch = full ? branch : s.room->branch;
  t->branch_stride = full ? stride : BLOCK;
  for (int32_t i = 0; !full && branch && i < count; ++i)
    _mm512_storeu_si512(s.room->branch + BLOCK * i, _mm512_maskz_loadu_epi8(channel_mask(channels), branch + (ptrdiff_t)i * stride));
}

/* What is left to do after the strips: pixels out of the room, tables, general requantization. */
void complete(const step &s, const strip &t, int32_t pixel, int32_t count, bool full, int32_t first, int32_t channels) {
  const fxc_conv *p = s.p;
  uint8_t *out = (uint8_t *)s.out + (ptrdiff_t)pixel * p->out_pixel_stride + first;
  for (int32_t i = 0; i < count && t.path == REQUANTIZE_ANY; ++i)
    requantize_row(p->requantize, t.accumulators + i * BLOCK, first, channels, s.in, p->branch_pixel_stride, pixel + i, s.out,
                   p->out_pixel_stride);
  if (t.path == REQUANTIZE_ANY) return;
  for (int32_t i = 0; !full && i < count; ++i)
    _mm512_mask_storeu_epi8(out + (ptrdiff_t)i * p->out_pixel_stride, t.mask, _mm512_loadu_si512(s.room->out + BLOCK * i));
  if (p->requantize->table && !has_table_lookup()) apply_table(p->requantize->table, out, count, p->out_pixel_stride, channels);
}

/* t->strips strips of one block, in groups of `fold` as far as possible. Changes t. */
void run_folds(const step &s, strip *t, int32_t fold) {
  const int32_t groups = t->row && s.folded ? t->strips / fold : 0, rest = t->strips - groups * fold;
  if (groups) {
    t->strips = groups;
    s.folded(*t);
    t->offset += (ptrdiff_t)groups * fold * STRIP * s.p->stride[2] * t->pixel;
    t->out += groups * fold * STRIP * t->out_stride;
    t->branch += groups * fold * STRIP * t->branch_stride;
  }
  t->strips = rest;
  if (rest) s.single(*t);
}

/* All blocks of t->strips strips from output index `pixel` on, `count` pixels in all. */
void run_blocks(const step &s, strip *t, int32_t pixel, int32_t count, bool full) {
  const fxc_conv *p = s.p;
  const uint8_t *packed = (const uint8_t *)p->weight + sizeof(header);
  const ptrdiff_t offset = t->offset;
  const int32_t strips = t->strips;
  for (int32_t first = 0; first < p->out_channels; first += BLOCK, packed += block_bytes(p)) {
    const int32_t channels = p->out_channels - first < BLOCK ? p->out_channels - first : BLOCK;
    t->bias = (const int32_t *)packed;
    t->slots = (const requantize_slots *)(t->bias + BLOCK);
    t->weight = (const int8_t *)(t->slots + 1);
    t->mask = channel_mask(channels);
    t->offset = offset + first, t->strips = strips;
    place(s, t, pixel, count, full, first, channels);
    if (fold_of(channels) > 1)
      run_folds(s, t, fold_of(channels));
    else
      s.single(*t);
    complete(s, *t, pixel, count, full, first, channels);
  }
}

/* How many strips from column w of the output on, at most `limit`, lie inside the image. */
int32_t strips_inside(const step &s, const strip &t, int32_t w, int32_t limit) {
  const fxc_conv *p = s.p;
  const int32_t S = strip_of(p), column = w * p->stride[2] - p->pad_before[2];
  if (S == 1 || t.path == REQUANTIZE_ANY || column < 0 || column + columns_of(p) > p->in_size[2]) return 0;
  for (int32_t r = 0; r < kernel_rows(p); ++r)
    if (!s.address[r]) return 0;
  const int32_t fit = 1 + (p->in_size[2] - column - columns_of(p)) / (S * p->stride[2]), full = (p->out_size[2] - w) / S;
  const int32_t most = fit < full ? fit : full;
  return most < limit ? most : limit;
}

/* Strips from the one at output column w of output row `row` on, at most `limit`; returns how many it has done. */
int32_t run_some(const step &s, strip *t, int32_t row, int32_t w, int32_t limit) {
  const fxc_conv *p = s.p;
  const int32_t S = strip_of(p), column = w * p->stride[2] - p->pad_before[2], pixel = row * p->out_size[2] + w;
  const int32_t local = INSIDE_BYTES / (STRIP * p->out_channels) + 1;
  const int32_t inside = strips_inside(s, *t, w, limit < local ? limit : local);
  const int32_t strips = inside ? inside : 1;
  t->strips = strips;
  t->row = inside ? (const uint8_t *const *)s.address : NULL;
  t->offset = inside ? (ptrdiff_t)column * p->in_pixel_stride : 0;
  if (!inside) strip_pointers(p, s.address, column, s.pointer);
  const int32_t left = p->out_size[2] - w, count = left < strips * S ? left : strips * S;
  run_blocks(s, t, pixel, count, count == strips * S);
  return strips;
}

void run(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *scratch) {
  const fxc_conv *p = (const fxc_conv *)params;
  int64_t *address = (int64_t *)((uint8_t *)scratch + sizeof(strip_scratch));
  const uint8_t **pointer = (const uint8_t **)((uint8_t *)address + align64(row_quads(p) * 4 * 8));
  const int32_t last = (p->out_channels - 1) % BLOCK + 1;
  const step s = {p, in, out, (strip_scratch *)scratch, address, pointer, strip_function_of(p, 1), strip_function_of(p, fold_of(last))};
  const int32_t per_row = strips_per_row(p);
  strip t = strip_for(s);
  for (int32_t row = begin / per_row; row * per_row < end; ++row) {
    const int32_t from = begin > row * per_row ? begin - row * per_row : 0;
    const int32_t to = end < (row + 1) * per_row ? end - row * per_row : per_row;
    row_addresses(p, (const uint8_t *)in[0], row, address);
    for (int32_t i = from; i < to;) i += run_some(s, &t, row, i * strip_of(p), to - i);
  }
}

}  // namespace

extern "C" {
extern const fxc_kernel fxc_u8_depthwise_4x64__avx512vnni;
const fxc_kernel fxc_u8_depthwise_4x64__avx512vnni = {
    "fxc_u8_depthwise_4x64__avx512vnni", "conv", "avx512vnni", accepts, packed_bytes, pack, units, scratch_bytes, run,
};
}

#pragma GCC pop_options

#endif
