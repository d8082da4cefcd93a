/* The packed weights of conv_avx512vnni.cpp: output channels cut into blocks. Everything is static; include it after the target pragma.

   Packed: header, row of pad values, then per block bias (W x 16), requantize_slots, and weights (tap, 4 channels, W, lane of
   16 outputs, 4 channels), zero padded. */

#ifndef FXC_CONV_PACK_AVX512VNNI_H
#define FXC_CONV_PACK_AVX512VNNI_H

#include "conv_taps_avx512.h"
#include "kernel_row.h"
#include "requantize_avx512.h"

namespace {

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
  const int8_t *weight, *next; /* next: of the next block */
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
  b.next = b.weight + block_bytes(r, b.W);
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

/* Channel in a block of lane `lane` of vector j: in their order for int32 output, which is stored vector by vector. */
int32_t channel_of(const fxc_conv *p, int32_t W, int32_t j, int32_t lane) {
  return p->requantize ? requantize_channel(W, j, lane / 4, lane % 4) : 16 * j + lane;
}

/* Weights of vector j of block b. */
void pack_vector(const fxc_conv *p, const reduction &r, const block &b, int32_t j, int8_t *packed) {
  const int32_t together = p->groups / groups_of(p);
  for (int32_t lane = 0; lane < 16; ++lane) {
    const int32_t channel = channel_of(p, b.W, j, lane);
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
      const int32_t channel = channel_of(p, b.W, j, lane);
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
  ((header *)packed)->path = requantize_kind_of_all(p->requantize);
  ((header *)packed)->left_shift = reduced_left_shift(p->requantize);
  ((header *)packed)->bounded = has_bounds(p->requantize);
  pack_pad(p, (uint8_t *)packed + sizeof(header));
  block_walk walk = first_block(p, (int64_t)sizeof(header) + pad_bytes(p));
  while (walk.group < groups_of(p)) pack_block(p, r, next_block(p, r, &walk, (const uint8_t *)packed));
}

}  // namespace

#endif
