/* The accumulators of depthwise_rows_avx512vnni.cpp: one or two output rows of 64 channels, the outputs in flight in registers. Everything
   is static; include it after the target pragma. */

#ifndef FXC_DEPTHWISE_ROWS_TILE_AVX512VNNI_H
#define FXC_DEPTHWISE_ROWS_TILE_AVX512VNNI_H

#include "dot_avx512vnni.h"
#include "kernel_row.h"
#include "requantize_avx512.h"

namespace {

constexpr int32_t BLOCK = 64;

/* Outputs in flight: those that one step, STRIDE input columns, reaches. */
constexpr int32_t in_flight(int32_t K, int32_t stride) { return (K + stride - 1) / stride; }

/* One output row, or two, of a tile of a block. */
struct pass {
  const uint8_t *copy[5], *row[5]; /* input rows from the tile's first column on: in scratch, in the image (at `pixel` bytes per column) */
  ptrdiff_t pixel;
  int32_t direct; /* outputs in_flight - 1 .. direct - 1 are read in the image: their columns exist */
  int32_t outputs;       /* columns */
  const int32_t *bias;
  const int8_t *weight;
  int32_t *acc; /* (outputs, rows, 4, 16), slot order */
};

/* Quads of weights: for 3x3 per column and output row, for 5x5 per column, then the two of row 4. */
constexpr int quads_of(int K, int rows) { return K == 3 ? 3 * rows : 7; }
constexpr int quad_of(int K, int rows, int column, int r) { return K == 3 ? column * rows + r : column; }

/* Half of the channels of a pass: vectors 2 H and 2 H + 1. The weights and the accumulators of the outputs in flight, that of
   output o at o % N, live in registers: all indices are template parameters. A step takes STRIDE input columns; that of phase
   o % N == PHASE reaches the outputs o - n for n = FROM .. TO. */
template <int K, int STRIDE, int ROWS, int H>
struct half {
  static constexpr int N = in_flight(K, STRIDE), QUADS = quads_of(K, ROWS);
  __m512i acc[N][ROWS][2], weight[QUADS][2], bias[2];
  const uint8_t *x[5]; /* column c of row r at x[r] + c * pixel */
  ptrdiff_t pixel;

  inline __attribute__((always_inline)) void read(const uint8_t *const (&row)[5], ptrdiff_t distance) {
    x[0] = row[0], x[1] = row[1], x[2] = row[2], x[3] = row[3], x[4] = row[4];
    pixel = distance;
  }

  template <int q = 0>
  inline __attribute__((always_inline)) void load_constants(const pass &t) {
    if constexpr (q == 0) bias[0] = _mm512_load_si512(t.bias + 32 * H), bias[1] = _mm512_load_si512(t.bias + 32 * H + 16);
    if constexpr (q < QUADS) {
      const int at = K == 3 ? 2 * (q / ROWS) + q % ROWS : q; /* two output rows are packed */
      weight[q][0] = _mm512_load_si512(t.weight + 256 * at + 128 * H), weight[q][1] = _mm512_load_si512(t.weight + 256 * at + 128 * H + 64);
      load_constants<q + 1>(t);
    }
  }

  /* The bytes at four places as quads. */
  static inline __attribute__((always_inline)) void interleave(const uint8_t *a, const uint8_t *b, const uint8_t *c, const uint8_t *d,
                                                               __m512i (&v)[2]) {
    const __m512i x0 = _mm512_loadu_si512(a), x1 = _mm512_loadu_si512(b), x2 = _mm512_loadu_si512(c), x3 = _mm512_loadu_si512(d);
    const __m512i x01 = H ? _mm512_unpackhi_epi8(x0, x1) : _mm512_unpacklo_epi8(x0, x1);
    const __m512i x23 = H ? _mm512_unpackhi_epi8(x2, x3) : _mm512_unpacklo_epi8(x2, x3);
    v[0] = _mm512_unpacklo_epi16(x01, x23), v[1] = _mm512_unpackhi_epi16(x01, x23);
  }

  template <int SLOT, int r, int q>
  inline __attribute__((always_inline)) void add(const __m512i (&v)[2]) {
    dot(acc[SLOT][r][0], v[0], weight[q][0]), dot(acc[SLOT][r][1], v[1], weight[q][1]);
  }

  /* Column J of the step. */
  template <int PHASE, int TO, int J, int n, int r = 0>
  inline __attribute__((always_inline)) void add_column(const __m512i (&v)[2]) {
    if constexpr (n <= TO && n * STRIDE + J < K) {
      add<(PHASE + N - n) % N, r, quad_of(K, ROWS, n * STRIDE + J, r)>(v);
      add_column<PHASE, TO, J, r + 1 < ROWS ? n : n + 1, r + 1 < ROWS ? r + 1 : 0>(v);
    }
  }

  template <int PHASE, int FROM, int TO, int J = 0>
  inline __attribute__((always_inline)) void add_step(const pass &t, int32_t o) {
    __m512i v[2];
    if constexpr (J < STRIDE) {
      const ptrdiff_t at = (o * STRIDE + J) * pixel;
      interleave(x[0] + at, x[1] + at, x[2] + at, x[K == 3 && ROWS == 1 ? 2 : 3] + at, v);
      add_column<PHASE, TO, J, FROM>(v);
      add_step<PHASE, FROM, TO, J + 1>(t, o);
    } else if constexpr (K == 5) {
      const uint8_t *last = x[4] + o * STRIDE * pixel;
      interleave(last, last + pixel, last + 2 * pixel, last + 3 * pixel, v);
      if constexpr (FROM == 0) add<PHASE, 0, 5>(v);
      if constexpr (TO == N - 1) add<(PHASE + 1) % N, 0, 6>(v);
    }
  }

  template <int SLOT, int r = 0>
  inline __attribute__((always_inline)) void start() {
    acc[SLOT][r][0] = bias[0], acc[SLOT][r][1] = bias[1];
    if constexpr (r + 1 < ROWS) start<SLOT, r + 1>();
  }

  template <int SLOT, int r = 0>
  inline __attribute__((always_inline)) void store(int32_t *to) const {
    _mm512_store_si512(to, acc[SLOT][r][0]), _mm512_store_si512(to + 16, acc[SLOT][r][1]);
    if constexpr (r + 1 < ROWS) store<SLOT, r + 1>(to + BLOCK);
  }

  /* Step o: output o starts if FROM is 0, output o - N + 1 is done if TO is N - 1. */
  template <int PHASE, int FROM, int TO>
  inline __attribute__((always_inline)) void step(const pass &t, int32_t o) {
    if constexpr (FROM == 0) start<PHASE>();
    add_step<PHASE, FROM, TO>(t, o);
    if constexpr (TO == N - 1) store<(PHASE + 1) % N>(t.acc + ROWS * BLOCK * (o - N + 1) + 32 * H);
  }

  /* Steps 0 .. N - 2. */
  template <int o = 0>
  inline __attribute__((always_inline)) void first_steps(const pass &t) {
    if constexpr (o < N - 1) step<o, 0, o>(t, o), first_steps<o + 1>(t);
  }

  /* The N - 1 steps from o = t.outputs on. */
  template <int PHASE, int FROM = 1>
  inline __attribute__((always_inline)) void last_steps(const pass &t, int32_t o) {
    if constexpr (FROM == 1) read(t.copy, BLOCK);
    if constexpr (FROM < N) step<PHASE, FROM, N - 1>(t, o), last_steps<(PHASE + 1) % N, FROM + 1>(t, o + 1);
  }

  /* Steps from o on up to the next multiple of N; false, after the last steps, past the last output. */
  template <int PHASE>
  inline __attribute__((always_inline)) bool steps(const pass &t, int32_t o) {
    if (o >= t.outputs) return last_steps<PHASE>(t, o), false;
    if (o == t.direct) read(t.copy, BLOCK);
    step<PHASE, 0, N - 1>(t, o);
    if constexpr (PHASE + 1 < N) return steps<PHASE + 1>(t, o + 1);
    return true;
  }
};

template <int K, int STRIDE, int ROWS, int H>
__attribute__((noinline)) void accumulate_half(const pass &parameters) {
  constexpr int N = in_flight(K, STRIDE);
  const pass t = parameters;
  half<K, STRIDE, ROWS, H> a;
  a.load_constants(t);
  a.read(t.copy, BLOCK);
  a.first_steps(t);
  if (t.direct >= N) a.read(t.row, t.pixel);
  a.template step<N - 1, 0, N - 1>(t, N - 1);
  for (int32_t o = N; a.template steps<0>(t, o); o += N) {
  }
}

/* At least in_flight(K, STRIDE) outputs are computed. */
template <int K, int STRIDE, int ROWS>
void accumulate(const pass &t) {
  accumulate_half<K, STRIDE, ROWS, 0>(t);
  accumulate_half<K, STRIDE, ROWS, 1>(t);
}

typedef void (*accumulate_function)(const pass &);

accumulate_function accumulate_of(int32_t K, int32_t stride, int32_t rows) {
  if (K == 3) return rows == 2 ? accumulate<3, 1, 2> : accumulate<3, 1, 1>;
  return stride == 1 ? accumulate<5, 1, 1> : accumulate<5, 2, 1>;
}

}  // namespace

#endif
