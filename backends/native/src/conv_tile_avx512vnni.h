/* The register tiles of conv_avx512vnni.cpp: P pixels x 16 W channels, P W <= 24 accumulators. Everything is static; include it after
   the target pragma. */

#ifndef FXC_CONV_TILE_AVX512VNNI_H
#define FXC_CONV_TILE_AVX512VNNI_H

#include "conv_pack_avx512vnni.h"
#include "dot_avx512vnni.h"
#include "requantize_wide_avx512.h"

namespace {

constexpr int32_t MAX_PIXELS = 12;

int32_t tile_pixels(int32_t W) { return W == 4 ? 6 : W == 3 ? 8 : MAX_PIXELS; }

/* Input and output of `tiles` successive tiles of P pixels. Input: pixel i of the tile and tap t at pointer[t * TILE_PIXELS + i]
   (one tile), or, where pointer is NULL (one tap), pixel i of all tiles at x + i * x_stride. Output: codes or int32 from `out` on;
   for REQUANTIZE_ANY accumulators in channel order (P, 16 W) (one tile). Strides count elements. */
struct target {
  requantize_path path;
  int32_t left_shift, bounded, tiles;
  int32_t number; /* of the first tile among those of the block that are computed here: the first W fetch the next block */
  const uint8_t *const *pointer;
  const uint8_t *x;
  ptrdiff_t x_stride;
  __mmask64 mask;
  __m512i guard;
  const uint8_t *lookup_table; /* looked up before storing; NULL: none, or applied afterwards */
  void *out;
  const void *branch;
  ptrdiff_t out_stride, branch_stride;
  int32_t branch_bytes; /* of an element; 0: no branch */
};

/* Whether a tile fetches a line of the next block's weights per 4 channels: not where blocks are narrow (they come last), nor where reading
   the weights is all there is. */
constexpr bool fetches(int W, int P) { return W >= 3 && W * P >= 12; }

/* acc += the piece of 4 r.quads bytes per pixel that ends at x[i]. Meanwhile a line per 4 bytes of it, up to `ahead`, goes to the L2
   cache. */
template <int W, int P>
inline __attribute__((always_inline)) void accumulate_piece(__m512i (&acc)[P][W], const uint8_t *const (&x)[P], ptrdiff_t bytes,
                                                            const int8_t *weight, const int8_t *ahead) {
  for (ptrdiff_t c = -bytes; c != 0; c += 4, weight += 64 * W) {
    if constexpr (fetches(W, P)) _mm_prefetch(ahead + 16 * c, _MM_HINT_T1);
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
  const ptrdiff_t number = t.number + index, fetched = 16 * bytes;
  const int8_t *ahead = (number < W ? b.next + number * r.taps * fetched : b.weight) + fetched;
  if (!t.pointer) {
    const uint8_t *first = t.x + (ptrdiff_t)index * P * t.x_stride + bytes;
#pragma GCC unroll 24
    for (int i = 0; i < P; ++i, first += t.x_stride) x[i] = first;
    accumulate_piece<W, P>(acc, x, bytes, b.weight, ahead);
    return;
  }
  const uint8_t *const *pointer = t.pointer;
  const int8_t *weight = b.weight;
  for (int32_t tap = 0; tap < r.taps; ++tap, pointer += TILE_PIXELS, weight += bytes * 16 * W, ahead += fetched) {
#pragma GCC unroll 24
    for (int i = 0; i < P; ++i) x[i] = pointer[i] + bytes;
    accumulate_piece<W, P>(acc, x, bytes, weight, ahead);
  }
}

template <int W, int P, requantize_path PATH, bool BOUNDED>
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
  ptrdiff_t branch = (ptrdiff_t)index * P * branch_stride;
  uint8_t *out = (uint8_t *)t.out + (ptrdiff_t)index * P * stride;
  constexpr int Q = quad_pixels(W);
  __m512i y[P / Q]; /* all before the first store, which might alias the constants */
#pragma GCC unroll 24
  for (int i = 0; i < P; i += Q, branch += Q * branch_stride) {
    const __m512i v0 = acc[i][0], v1 = W == 1 ? acc[(i + 1) % P][0] : acc[i][1 % W];
    const __m512i v2 = W == 1 ? acc[(i + 2) % P][0] : W == 2 ? acc[(i + 1) % P][0] : acc[i][2 % W];
    const __m512i v3 = W == 1 ? acc[(i + 3) % P][0] : W == 2 ? acc[(i + 1) % P][1 % W] : acc[i][W - 1];
    if constexpr (PATH == REQUANTIZE_WIDE) {
      __m512i x[4];
      load_values<W>(x, t.branch, branch, branch_stride, t.branch_bytes == 4);
      y[i / Q] = requantize_wide<W, BOUNDED>(slots, guard, v0, v1, v2, v3, x);
    } else if constexpr (PATH == REQUANTIZE_TWO) {
      y[i / Q] = requantize_two<BOUNDED>(slots, guard, v0, v1, v2, v3, load_slots<W>((const uint8_t *)t.branch + branch, branch_stride));
    } else {
      y[i / Q] = requantize_one<BOUNDED>(slots, guard, v0, v1, v2, v3);
    }
  }
  const __mmask64 mask = t.mask;
  if (t.lookup_table) {
#pragma GCC unroll 24
    for (int i = 0; i < P / Q; ++i) y[i] = lookup(t.lookup_table, y[i]);
  }
#pragma GCC unroll 24
  for (int i = 0; i < P; i += Q, out += Q * stride) store_slots<W>(out, stride, mask, y[i / Q]);
}

/* int32 output. */
template <int W, int P>
inline __attribute__((always_inline)) void store_accumulators(__m512i (&acc)[P][W], const target &t, int32_t index) {
  int32_t *out = (int32_t *)t.out + (ptrdiff_t)index * P * t.out_stride;
#pragma GCC unroll 24
  for (int i = 0; i < P; ++i, out += t.out_stride)
#pragma GCC unroll 4
    for (int j = 0; j < W; ++j) _mm512_mask_storeu_epi32(out + 16 * j, (__mmask16)(t.mask >> 16 * j), acc[i][j]);
}

/* Fetches what a tile adds, long before its use. */
template <int W, int P>
inline __attribute__((always_inline)) void fetch_branch(const target &t, int32_t index) {
  const ptrdiff_t stride = t.branch_stride * t.branch_bytes;
  const uint8_t *row = (const uint8_t *)t.branch + index * P * stride;
  for (int i = 0; i < P; ++i, row += stride) {
    _mm_prefetch(row, _MM_HINT_T0);
    for (int j = 1; j < W && t.branch_bytes == 4; ++j) _mm_prefetch(row + 64 * j, _MM_HINT_T0);
  }
}

template <int W, int P>
void tile(const reduction &r, const target &t, const block &b) {
  for (int32_t index = 0; index < t.tiles; ++index) {
    if (t.branch_bytes) fetch_branch<W, P>(t, index);
    __m512i acc[P][W];
    accumulate<W, P>(acc, r, b, t, index);
    if (t.path == REQUANTIZE_ONE && !t.bounded) {
      store_codes<W, P, REQUANTIZE_ONE, false>(acc, t, b.slots, index);
    } else if (t.path == REQUANTIZE_ONE) {
      store_codes<W, P, REQUANTIZE_ONE, true>(acc, t, b.slots, index);
    } else if (t.path == REQUANTIZE_TWO && !t.bounded) {
      store_codes<W, P, REQUANTIZE_TWO, false>(acc, t, b.slots, index);
    } else if (t.path == REQUANTIZE_TWO) {
      store_codes<W, P, REQUANTIZE_TWO, true>(acc, t, b.slots, index);
    } else if (t.path == REQUANTIZE_WIDE) {
      store_codes<W, P, REQUANTIZE_WIDE, true>(acc, t, b.slots, index);
    } else if (t.path == REQUANTIZE_NONE) {
      store_accumulators<W, P>(acc, t, index);
    } else {
#pragma GCC unroll 24
      for (int i = 0; i < P; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < W; ++j) spill_accumulators((int32_t *)t.out + i * 16 * W, W, j, acc[i][j]);
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

}  // namespace

#endif
