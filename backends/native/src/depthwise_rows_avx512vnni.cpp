/* Depthwise 3x3 (stride 1) and 5x5 (stride 1 or 2) convolution of images with AVX-512 VNNI, any padding.

   acc[c] = bias[c] + sum over taps of weight[c] * x[c] (fxc_conv), requantized with one branch (requantize_avx512.h).

   64 channels at a time, along an output row (3x3: two rows at once), in halves of 32 channels, so that the weights and the
   accumulators of all outputs in flight are in registers (depthwise_rows_tile_avx512vnni.h). A step takes STRIDE input columns:
   the bytes of four input rows are interleaved into quads, and one vpdpbusd per 16 channels multiplies them by one column of the
   kernel, for every output that the column reaches. Row 4 of a 5x5 kernel has quads of four neighboring columns instead, which
   serve the output that starts there and, with the fifth tap alone, the one that ends there. The interleaving leaves channel
   16 L + 4 v + i in lane L, element i of vector v: slot order, which narrowing undoes for free. Finished accumulators of a row
   pass through scratch (requantizing in the loop costs registers).

   Columns near the border are copied to scratch with the border, and so are whole rows where the window leaves the image above or
   below: no border is left in the loop. Of a last block of at most 32 or 16 channels, a column in scratch holds 2 or 4 pixels that are
   `distance` outputs apart (FOLD), and all rows are copied.

   Unit: up to GROUP output rows of a block. 3x3 with stride 2 is left to depthwise_avx512vnni.cpp, which is faster there.
   Packed: header, then per block bias (4 x 16, slot order), requantize_slots, weights, narrow blocks repeated in every fold.
   Reads up to 64 bytes past an input. */

#if defined(__x86_64__)

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")

#include "depthwise_rows_tile_avx512vnni.h"

namespace {

constexpr int32_t GROUP = 8;       /* output rows of a unit */
constexpr int32_t MAX_TILE = 32;   /* output columns whose input rows are in scratch at a time: they stay in the L1 cache */
constexpr int32_t MAX_SLOTS = 8;   /* input rows in scratch: a ring, 4 for 3x3, 8 for 5x5 */
constexpr int32_t SPARE = 8;       /* columns that may be read past the last one */

struct header {
  int32_t left_shift, bounded; /* reduced_left_shift, has_bounds */
  int32_t reserved[14];
};

int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }

int32_t ceil_div(int32_t a, int32_t b) { return (a + b - 1) / b; }

/* --------------------------------------------------------------------------------------------------------- packing */

int accepts(const void *params) {
  const fxc_conv *p = (const fxc_conv *)params;
  const bool square = p->kernel[1] == p->kernel[2] && (p->kernel[1] == 3 || p->kernel[1] == 5);
  const bool image = p->kernel[0] == 1 && p->in_size[0] == 1 && p->out_size[0] == 1 && p->pad_before[0] == 0;
  const bool strides = p->stride[1] == p->stride[2] && p->stride[1] <= (p->kernel[1] == 3 ? 1 : 2) && p->dilation[1] == 1 && p->dilation[2] == 1;
  return p->groups == p->in_channels && p->groups == p->out_channels && square && image && strides && p->requantize &&
         requantize_kind(p->requantize) == REQUANTIZE_ONE;
}

int32_t blocks_of(const fxc_conv *p) { return ceil_div(p->out_channels, BLOCK); }

int32_t channels_of(const fxc_conv *p, int32_t block) { return smaller(BLOCK, p->out_channels - block * BLOCK); }

int32_t fold_of(int32_t channels) { return channels <= 16 ? 4 : channels <= 32 ? 2 : 1; }

/* Vectors of 16 channels x 4 taps: for 3x3 per column rows (0, 1, 2, -) and rows (-, 0, 1, 2); for 5x5 per column rows 0..3, then
   row 4 columns 0..3 and column 4. */
int32_t weight_quads(int32_t K) { return K == 3 ? 6 : 7; }

int64_t block_bytes(const fxc_conv *p) { return 256 + (int64_t)sizeof(requantize_slots) + 256 * weight_quads(p->kernel[1]); }

size_t packed_bytes(const void *params) {
  const fxc_conv *p = (const fxc_conv *)params;
  return sizeof(header) + (size_t)(blocks_of(p) * block_bytes(p));
}

void pack_channel(const int8_t *source, int32_t K, int32_t element, int8_t *weight) {
  for (int32_t row = 0; row < K; ++row)
    for (int32_t column = 0; column < K; ++column) {
      const int8_t w = source[row * K + column];
      int8_t *quad = weight + 4 * element;
      if (K == 3) {
        quad[256 * (2 * column) + row] = w, quad[256 * (2 * column + 1) + row + 1] = w;
      } else if (row < 4) {
        quad[256 * column + row] = w;
      } else {
        quad[256 * (5 + column / 4) + column % 4] = w;
      }
    }
}

void pack(const void *params, void *packed) {
  const fxc_conv *p = (const fxc_conv *)params;
  const int32_t K = p->kernel[1], left = reduced_left_shift(p->requantize);
  memset(packed, 0, packed_bytes(params));
  ((header *)packed)->left_shift = left;
  ((header *)packed)->bounded = has_bounds(p->requantize);
  for (int32_t b = 0; b < blocks_of(p); ++b) {
    int32_t *bias = (int32_t *)((uint8_t *)packed + sizeof(header) + b * block_bytes(p));
    requantize_slots *slots = (requantize_slots *)(bias + 64);
    const int32_t count = channels_of(p, b), period = BLOCK / fold_of(count);
    for (int32_t slot = 0; slot < BLOCK; ++slot) {
      const int32_t channel = b * BLOCK + slot % period, lane = slot / 16, v = slot % 16 / 4, i = slot % 4;
      if (slot % period >= count) continue;
      bias[16 * v + 4 * lane + i] = p->bias[channel];
      pack_channel(p->weight + (int64_t)channel * K * K, K, 16 * v + 4 * lane + i, (int8_t *)(slots + 1));
      pack_slot(slots, p->requantize, left, channel, v, lane, i);
    }
  }
}

/* ----------------------------------------------------------------------------------------------------------- codes */

/* One output row of a tile of a block. */
struct codes {
  const requantize_slots *slots;
  const int32_t *acc;
  int32_t acc_step, outputs; /* acc_step: int32 from one output to the next */
  int32_t left_shift;
  const uint8_t *table;
  __m512i guard;
  __mmask64 mask;
  uint8_t *out;
  ptrdiff_t out_stride, out_fold; /* bytes from an output to the next one, and to the next fold */
  int32_t limit[4];               /* outputs of each fold that exist */
};

template <int FOLD>
inline __attribute__((always_inline)) void store_folds(const codes &t, uint8_t *out, int32_t o, __m512i y) {
  if constexpr (FOLD == 1) {
    _mm512_mask_storeu_epi8(out, t.mask, y);
  } else if constexpr (FOLD == 2) {
    _mm256_mask_storeu_epi8(out, (__mmask32)t.mask, _mm512_castsi512_si256(y));
    if (o < t.limit[1]) _mm256_mask_storeu_epi8(out + t.out_fold, (__mmask32)t.mask, _mm512_extracti64x4_epi64(y, 1));
  } else {
    _mm_mask_storeu_epi8(out, (__mmask16)t.mask, _mm512_castsi512_si128(y));
    if (o < t.limit[1]) _mm_mask_storeu_epi8(out + t.out_fold, (__mmask16)t.mask, _mm512_extracti32x4_epi32(y, 1));
    if (o < t.limit[2]) _mm_mask_storeu_epi8(out + 2 * t.out_fold, (__mmask16)t.mask, _mm512_extracti32x4_epi32(y, 2));
    if (o < t.limit[3]) _mm_mask_storeu_epi8(out + 3 * t.out_fold, (__mmask16)t.mask, _mm512_extracti32x4_epi32(y, 3));
  }
}

template <int FOLD, bool BOUNDED, bool TABLE>
void store_codes(const codes &parameters) {
  const codes t = parameters;
  const requantize_slots s = *t.slots; /* a copy: stores cannot alias it, so its constants stay in registers */
  const int32_t *acc = t.acc;
  uint8_t *out = t.out;
  const __m128i left = _mm_cvtsi32_si128(t.left_shift);
  for (int32_t o = 0; o < t.outputs; ++o, acc += t.acc_step, out += t.out_stride) {
    __m512i a[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) a[i] = _mm512_load_si512(acc + 16 * i);
    if (__builtin_expect(t.left_shift != 0, 0))
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) a[i] = _mm512_sll_epi32(a[i], left);
    __m512i y = requantize_one<BOUNDED>(&s, t.guard, a[0], a[1], a[2], a[3]);
    if constexpr (TABLE) y = lookup(t.table, y);
    store_folds<FOLD>(t, out, o, y);
  }
}

typedef void (*codes_function)(const codes &);

template <int FOLD>
codes_function codes_of(bool bounded, bool table) {
  if (table) return store_codes<FOLD, true, true>;
  return bounded ? store_codes<FOLD, true, false> : store_codes<FOLD, false, false>;
}

/* ----------------------------------------------------------------------------------------------------------- input */

/* `count` columns of 64 / FOLD bytes, BLOCK bytes apart in scratch. */
template <int FOLD>
inline __attribute__((always_inline)) void copy_columns(uint8_t *target, const uint8_t *from, ptrdiff_t pixel, int32_t count) {
  for (int32_t c = 0; c < count; ++c, target += BLOCK, from += pixel) {
    if constexpr (FOLD == 1) _mm512_store_si512(target, _mm512_loadu_si512(from));
    if constexpr (FOLD == 2) _mm256_store_si256((__m256i *)target, _mm256_loadu_si256((const __m256i *)from));
    if constexpr (FOLD == 4) _mm_store_si128((__m128i *)target, _mm_loadu_si128((const __m128i *)from));
  }
}

/* A block of channels and a tile of output columns; `distance` outputs from one fold to the next. */
struct tile {
  int32_t first, channels, fold, distance, begin, outputs, columns; /* columns: of the input, per fold */
};

/* Input column of a tile's first one. */
int32_t column_of(const fxc_conv *p, const tile &t) { return t.begin * p->stride[2] - p->pad_before[2]; }

/* Columns from..to-1 of input row `row` (NULL: outside) under a tile, with the border. */
template <int FOLD>
void copy_row(const fxc_conv *p, const tile &t, const uint8_t *row, int32_t from, int32_t to, uint8_t *target) {
  const uint8_t *pad = p->pad_value + t.first;
  target += from * BLOCK;
  for (int32_t f = 0; f < FOLD; ++f, target += BLOCK / FOLD) {
    const int32_t column = f * t.distance * p->stride[2] + column_of(p, t) + from, count = to - from;
    const int32_t before = !row ? count : smaller(column < 0 ? -column : 0, count);
    const int32_t left = p->in_size[2] - column, until = smaller(left > before ? left : before, count);
    copy_columns<FOLD>(target, pad, 0, before);
    if (until > before)
      copy_columns<FOLD>(target + before * BLOCK, row + t.first + (ptrdiff_t)(column + before) * p->in_pixel_stride, p->in_pixel_stride, until - before);
    copy_columns<FOLD>(target + until * BLOCK, pad, 0, count - until);
  }
}

/* -------------------------------------------------------------------------------------------------------------- run */

int32_t groups_of(const fxc_conv *p) { return ceil_div(p->out_size[1], GROUP); }

int32_t units(const void *params) {
  const fxc_conv *p = (const fxc_conv *)params;
  return p->batch * groups_of(p) * blocks_of(p);
}

/* Output columns from one fold to the next, in tiles of at most MAX_TILE. */
int32_t distance_of(const fxc_conv *p, int32_t fold) { return ceil_div(p->out_size[2], fold); }

int32_t tile_width(int32_t distance) { return ceil_div(distance, ceil_div(distance, MAX_TILE)); }

int64_t slot_bytes(const fxc_conv *p) {
  return (int64_t)(smaller(MAX_TILE, p->out_size[2]) * p->stride[2] + p->kernel[2] + SPARE) * BLOCK;
}

size_t scratch_bytes(const void *params) { return (size_t)(MAX_SLOTS * slot_bytes((const fxc_conv *)params)) + 2 * MAX_TILE * 4 * BLOCK; }

struct job {
  const fxc_conv *p;
  const uint8_t *x;
  uint8_t *out, *rows;
  int32_t *acc;
};

/* Codes of the tile's row `row` (of the batch), from the accumulators at `acc`. */
void finish_row(const job &j, const tile &t, const requantize_slots *slots, const int32_t *acc, int32_t acc_step, int32_t row) {
  const fxc_conv *p = j.p;
  const header *h = (const header *)p->weight;
  const uint8_t *table = has_table_lookup() ? p->requantize->table : NULL;
  codes c = {slots, acc, acc_step, t.outputs, h->left_shift, table, guard_factor(p->requantize), channel_mask(t.channels), NULL,
             p->out_pixel_stride, (ptrdiff_t)t.distance * p->out_pixel_stride, {}};
  c.out = j.out + ((ptrdiff_t)row * p->out_size[2] + t.begin) * c.out_stride + t.first;
  for (int32_t f = 0; f < 4; ++f) c.limit[f] = p->out_size[2] - t.begin - f * t.distance;
  (t.fold == 4 ? codes_of<4> : t.fold == 2 ? codes_of<2> : codes_of<1>)(h->bounded, table)(c);
  for (int32_t f = 0; p->requantize->table && !table && f < t.fold; ++f)
    apply_table(p->requantize->table, c.out + f * c.out_fold, smaller(t.outputs, c.limit[f]), p->out_pixel_stride, t.channels);
}

/* Columns that the steps of outputs 0 .. in_flight - 2 read, and those after a step's first that it reads. */
int32_t first_columns(int32_t K, int32_t stride) { return (in_flight(K, stride) - 2) * stride + (K == 5 ? 4 : stride); }
int32_t columns_ahead(int32_t K, int32_t stride) { return K == 5 ? 3 : stride - 1; }

/* Where the outputs of a tile end that are read in the image, see pass. */
int32_t direct_end(const fxc_conv *p, const tile &t) {
  const int32_t K = p->kernel[2], stride = p->stride[2], least = in_flight(K, stride) - 1, column = column_of(p, t);
  const int32_t last = p->in_size[2] - 1 - column - columns_ahead(K, stride);
  if (t.fold > 1 || column + least * stride < 0 || last < least * stride) return least;
  return smaller(last / stride + 1, t.outputs);
}

/* The ring of input rows in scratch. */
struct ring {
  int32_t slots;
  int32_t row[8]; /* which a slot holds, from the border's first row on */
  bool whole[8];  /* all its columns, not only those that are never read in the image */
};

/* Copies row `row` under a tile into its slot unless it is there. direct: direct_end, if the image is read. */
const uint8_t *hold_row(const job &j, const tile &t, ring *held, const uint8_t *source, int32_t row, bool whole, int32_t direct) {
  const fxc_conv *p = j.p;
  const auto copy = t.fold == 4 ? copy_row<4> : t.fold == 2 ? copy_row<2> : copy_row<1>;
  const int32_t slot = row % held->slots, first = first_columns(p->kernel[2], p->stride[2]), last = direct * p->stride[2];
  uint8_t *target = j.rows + slot * slot_bytes(p);
  if (held->row[slot] == row && (held->whole[slot] || !whole)) return target;
  held->row[slot] = row, held->whole[slot] = whole;
  copy(p, t, source, 0, whole ? t.columns : first, target);
  if (!whole) copy(p, t, source, last, t.columns, target);
  return target;
}

/* Output rows begin..end-1 of an image, one tile of one block. */
void run_tile(const job &j, const tile &t, int32_t image, int32_t begin, int32_t end) {
  const fxc_conv *p = j.p;
  const int32_t K = p->kernel[1], stride = p->stride[1], most = K == 3 ? 2 : 1, N = in_flight(K, stride);
  const int32_t *bias = (const int32_t *)((const uint8_t *)p->weight + sizeof(header) + t.first / BLOCK * block_bytes(p));
  const requantize_slots *constants = (const requantize_slots *)(bias + BLOCK);
  const int32_t direct = direct_end(p, t);
  const uint8_t *x = j.x + (ptrdiff_t)image * p->in_image_stride, *source[6];
  pass s = {{}, {}, p->in_pixel_stride, N - 1, t.outputs < N ? N : t.outputs, bias, (const int8_t *)(constants + 1), j.acc};
  ring held = {K == 3 ? 4 : 8, {-1, -1, -1, -1, -1, -1, -1, -1}, {}};
  for (int32_t h = begin; h < end; h += most) {
    const int32_t rows = smaller(most, end - h), top = h * stride - p->pad_before[1], under = K + rows - 1;
    const bool whole = direct < N || top < 0 || top + under > p->in_size[1];
    for (int32_t r = 0; r < under; ++r) {
      source[r] = top + r >= 0 && top + r < p->in_size[1] ? x + (ptrdiff_t)(top + r) * p->in_row_stride : NULL;
      s.copy[r] = hold_row(j, t, &held, source[r], h * stride + r, whole, direct);
      if (!whole) s.row[r] = source[r] + t.first + (ptrdiff_t)column_of(p, t) * p->in_pixel_stride;
    }
    s.direct = whole ? N - 1 : direct;
    accumulate_of(K, stride, rows)(s);
    for (int32_t r = 0; r < rows; ++r)
      finish_row(j, t, constants, s.acc + BLOCK * r, BLOCK * rows, image * p->out_size[1] + h + r);
  }
}

void run(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *scratch) {
  const fxc_conv *p = (const fxc_conv *)params;
  uint8_t *rows = (uint8_t *)scratch + 2 * MAX_TILE * 4 * BLOCK;
  const job j = {p, (const uint8_t *)in[0], (uint8_t *)out, rows, (int32_t *)scratch};
  const int32_t blocks = blocks_of(p), groups = groups_of(p);
  for (int32_t unit = begin; unit < end; ++unit) {
    const int32_t block = unit % blocks, group = unit / blocks % groups, image = unit / blocks / groups;
    const int32_t channels = channels_of(p, block), fold = fold_of(channels), distance = distance_of(p, fold), width = tile_width(distance);
    for (int32_t w = 0; w < distance; w += width) {
      const int32_t outputs = smaller(width, distance - w), columns = (outputs - 1) * p->stride[2] + p->kernel[2];
      const tile t = {block * BLOCK, channels, fold, distance, w, outputs, columns};
      run_tile(j, t, image, group * GROUP, smaller((group + 1) * GROUP, p->out_size[1]));
    }
  }
}

}  // namespace

extern "C" {
extern const fxc_kernel fxc_u8_depthwise_rows__avx512vnni;
const fxc_kernel fxc_u8_depthwise_rows__avx512vnni = {
    "fxc_u8_depthwise_rows__avx512vnni", "conv", "avx512vnni", accepts, packed_bytes, pack, units, scratch_bytes, run,
};
}

#pragma GCC pop_options

#endif
