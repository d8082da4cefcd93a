/* Convolution with the Arm dot product (sdot): conv_rows.h with a register tile of 4 pixels x 16 channels = 16 accumulators (gcc 12
   spills those of 6 pixels).

   sdot multiplies signed by signed, so codes are gathered as x - 128 and bias holds + 128 * (sum of the weights). The
   requantization of numerics.py is vqmovn (t), vqrdmulh (u = (t * m + 2^14) >> 15) and saturating adds in 16-bit lanes; three
   branches and more, and int32, one element at a time. */

#if defined(__aarch64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

#include <arm_neon.h>
#include <string.h>

#include "requantize_scalar.h"

namespace {

typedef int8_t element;
typedef int8_t weight_element;
constexpr int32_t PART = 4, TILE = 4, CODE_OFFSET = 128, GROUP = 16;

int32_t place_of(int32_t c) { return c; }

/* Constants of one branch; channels past the last hold zeros. right: minus the right shift. */
struct branch_constants {
  int32_t offset[GROUP], right[GROUP];
  int16_t multiplier[GROUP];
};

/* Only two branches are kept: more take requantize_scalar. */
struct group_constants {
  branch_constants branch[2];
  int16_t zero[GROUP];
  uint8_t lo[GROUP], hi[GROUP];
};

void pack_group(group_constants *g, const fxc_requantize *q, int32_t first, int32_t count) {
  memset(g, 0, sizeof *g);
  for (int32_t c = 0; q && c < count; ++c) {
    for (int32_t i = 0; i < q->branches && i < 2; ++i) {
      g->branch[i].offset[c] = q->branch[i].offset[first + c];
      g->branch[i].right[c] = -q->branch[i].right_shift[first + c];
      g->branch[i].multiplier[c] = q->branch[i].multiplier[first + c];
    }
    g->zero[c] = q->zero[first + c];
    g->lo[c] = q->lo[first + c], g->hi[c] = q->hi[first + c];
  }
}

inline void copy_codes(element *target, const uint8_t *from, int32_t count) {
  for (int32_t i = 0; i < count; i += 16) vst1q_s8(target + i, vreinterpretq_s8_u8(veorq_u8(vld1q_u8(from + i), vdupq_n_u8(0x80))));
}

}  // namespace

#include "conv_rows.h"

namespace {

/* --------------------------------------------------------------------------------------------------- requantization */

/* u of 8 channels, from c on. */
inline int16x8_t scale_half(const branch_constants &b, int32_t left_shift, int32_t c, int32x4_t v0, int32x4_t v1) {
  const int32x4_t left = vdupq_n_s32(left_shift);
  const int32x4_t t0 = vshlq_s32(vshlq_s32(v0, left), vld1q_s32(b.right + c));
  const int32x4_t t1 = vshlq_s32(vshlq_s32(v1, left), vld1q_s32(b.right + c + 4));
  return vqrdmulhq_s16(vcombine_s16(vqmovn_s32(t0), vqmovn_s32(t1)), vld1q_s16(b.multiplier + c));
}

/* 4 elements of branch 1 plus their offsets. */
inline int32x4_t load_branch(const void *tensor, ptrdiff_t at, bool wide, const int32_t *offset) {
  int32x4_t x;
  if (wide) {
    x = vld1q_s32((const int32_t *)tensor + at);
  } else {
    uint32_t codes;
    memcpy(&codes, (const uint8_t *)tensor + at, 4);
    x = vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(codes)))));
  }
  return vaddq_s32(x, vld1q_s32(offset));
}

/* Codes of 8 channels from c on, before the table. */
inline uint8x8_t finish_half(const destination &d, const block &b, int32_t pixel, int32_t c, int32x4_t v0, int32x4_t v1) {
  const fxc_requantize *q = d.q;
  const group_constants &g = *b.constants;
  int16x8_t u = scale_half(g.branch[0], q->branch[0].left_shift, c, v0, v1);
  if (q->branches == 2) {
    const ptrdiff_t at = (ptrdiff_t)pixel * d.stride[1] + b.first + c;
    const bool wide = q->branch[1].wide != 0;
    const int32x4_t x0 = load_branch(d.in[1], at, wide, g.branch[1].offset + c);
    const int32x4_t x1 = load_branch(d.in[1], at + 4, wide, g.branch[1].offset + c + 4);
    u = vqaddq_s16(u, scale_half(g.branch[1], q->branch[1].left_shift, c, x0, x1));
  }
  u = vshlq_s16(vqaddq_s16(u, vld1q_s16(g.zero + c)), vdupq_n_s16((int16_t)-q->guard_bits));
  return vmin_u8(vmax_u8(vqmovun_s16(u), vld1_u8(g.lo + c)), vld1_u8(g.hi + c));
}

void finish_pixel(const destination &d, const block &b, int32_t pixel, const int32_t *acc) {
  const ptrdiff_t at = (ptrdiff_t)pixel * d.out_stride + b.first;
  if (!d.q) {
    memcpy((int32_t *)d.out + at, acc, (size_t)b.count * 4);
  } else if (d.q->branches > 2) {
    requantize_scalar(d, acc, b.first, b.count, pixel);
  } else {
    uint8_t row[GROUP], *out = (uint8_t *)d.out + at;
    vst1_u8(row, finish_half(d, b, pixel, 0, vld1q_s32(acc), vld1q_s32(acc + 4)));
    vst1_u8(row + 8, finish_half(d, b, pixel, 8, vld1q_s32(acc + 8), vld1q_s32(acc + 12)));
    if (d.q->table)
      for (int32_t c = 0; c < b.count; ++c) row[c] = d.q->table[row[c]];
    if (b.count == GROUP)
      memcpy(out, row, GROUP);
    else
      memcpy(out, row, (size_t)b.count);
  }
}

/* ------------------------------------------------------------------------------------------------------------- tile */

/* Accumulators of P pixels, gathered in rows at x, to `target` (P, 16). */
template <int P>
void accumulate(const geometry &g, const block &b, const element *x, int32_t *target) {
  int32x4_t acc[P][4];
#pragma GCC unroll 4
  for (int i = 0; i < P; ++i)
    for (int j = 0; j < 4; ++j) acc[i][j] = vld1q_s32(b.bias + 4 * j);
  const weight_element *weight = b.weight;
  for (int32_t k = 0; k < g.parts; ++k, x += PART, weight += GROUP * PART) {
    const int8x16_t w0 = vld1q_s8(weight), w1 = vld1q_s8(weight + 16), w2 = vld1q_s8(weight + 32), w3 = vld1q_s8(weight + 48);
#pragma GCC unroll 4
    for (int i = 0; i < P; ++i) {
      int32_t lane;
      memcpy(&lane, x + i * g.row, 4);
      const int8x16_t v = vreinterpretq_s8_s32(vdupq_n_s32(lane));
      acc[i][0] = vdotq_s32(acc[i][0], w0, v), acc[i][1] = vdotq_s32(acc[i][1], w1, v);
      acc[i][2] = vdotq_s32(acc[i][2], w2, v), acc[i][3] = vdotq_s32(acc[i][3], w3, v);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < P; ++i)
    for (int j = 0; j < 4; ++j) vst1q_s32(target + GROUP * i + 4 * j, acc[i][j]);
}

typedef void (*accumulate_function)(const geometry &, const block &, const element *, int32_t *);

const accumulate_function ACCUMULATE[TILE + 1] = {NULL, accumulate<1>, accumulate<2>, accumulate<3>, accumulate<4>};

void run_tile(const geometry &g, const block &b, const element *x, const destination &d, int32_t pixel, int32_t count) {
  int32_t acc[TILE * GROUP];
  ACCUMULATE[count](g, b, x, acc);
  for (int32_t i = 0; i < count; ++i) finish_pixel(d, b, pixel + i, acc + GROUP * i);
}

}  // namespace

extern "C" {
extern const fxc_kernel fxc_u8_conv_4x16__dotprod;
const fxc_kernel fxc_u8_conv_4x16__dotprod = {
    "fxc_u8_conv_4x16__dotprod", "conv", "dotprod", NULL, packed_bytes, pack, units, scratch_bytes, run,
};
}

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
