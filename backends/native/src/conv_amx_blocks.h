/* The blocks of conv_amx.cpp: where their A tiles are, and where their rows go. Everything is static; include it after the target
   pragma. */

#ifndef FXC_CONV_AMX_BLOCKS_H
#define FXC_CONV_AMX_BLOCKS_H

#include "conv_amx_windows.h"

namespace {

/* Pixel i of the batch lies at i * in_pixel_stride. */
bool is_linear(const fxc_conv *p) {
  for (int i = 0; i < 3; ++i)
    if (p->kernel[i] != 1 || p->stride[i] != 1 || p->pad_before[i] != 0 || p->in_size[i] != p->out_size[i]) return false;
  const int32_t row = p->in_size[2] * p->in_pixel_stride, plane = p->in_size[1] * row;
  return (p->in_size[1] == 1 || p->in_row_stride == row) && (p->in_size[0] == 1 || p->in_plane_stride == plane) &&
         (p->batch == 1 || p->in_image_stride == p->in_size[0] * plane);
}

/* A block's A tiles and where its rows go. */
struct block {
  int32_t tiles;
  ptrdiff_t stride;
  const uint8_t *a[BLOCK_TILES];
  row_table *rows;
};

/* Rows by which a tile from `first` on is moved back: rows past the activation are not read. */
int32_t moved_back(const geometry &g, int32_t first) {
  return g.from == DIRECT && first + g.rows > g.positions ? first + g.rows - g.positions : 0;
}

/* Block `index` of the batch; `slot` is its place in the workspace. */
block block_at(const job &j, int32_t index, int32_t slot) {
  const geometry &g = j.g;
  const int32_t image = index / g.blocks, tile = start_of(g.tiles_of_block, index % g.blocks);
  block b = {start_of(g.tiles_of_block, index % g.blocks + 1) - tile, j.p->in_pixel_stride, {}, j.w.rows + slot};
  const uint8_t *start = j.x + (ptrdiff_t)tile * g.rows * b.stride;
  if (g.from == PLANE) {
    b.stride = j.p->in_channels;
    start = j.w.input + (g.panel_major ? image * g.plane_bytes : 0) + (ptrdiff_t)tile * g.rows * b.stride;
  } else if (g.from == WINDOW || g.from == PIECES) {
    b.stride = g.window_bytes;
    start = j.w.input + (ptrdiff_t)slot * BLOCK_ROWS * b.stride;
  }
  for (int32_t t = 0; t < b.tiles; ++t) b.a[t] = start + (t * g.rows - moved_back(g, (tile + t) * g.rows)) * b.stride;
  return b;
}

/* Rows whose pixels stand in rows->pixel[0..count - 1]; the rest up to a multiple of 16 is dropped. Vectors throughout: tile loads wait for
   stores before them. */
void fill_offsets_of_rows(const job &j, row_table *rows, int32_t count) {
  const __m512i out_stride = _mm512_set1_epi64(j.p->out_pixel_stride), dropped = _mm512_set1_epi64((intptr_t)j.w.dropped - (intptr_t)j.out);
  const __m512i branch_stride = _mm512_set1_epi64((int64_t)j.p->branch_pixel_stride[1] * j.branch_bytes);
  for (int32_t i = 0; i < count; i += 8) {
    const __m512i pixel = _mm512_cvtepi32_epi64(_mm256_load_si256((const __m256i *)(rows->pixel + i)));
    const __mmask8 kept = _mm512_cmpge_epi64_mask(pixel, _mm512_setzero_si512());
    _mm512_store_si512(rows->out + i, _mm512_mask_mullo_epi64(dropped, kept, pixel, out_stride));
    if (j.branch_bytes) _mm512_store_si512(rows->branch + i, _mm512_maskz_mullo_epi64(kept, pixel, branch_stride));
  }
}

/* Pixels of the 16 positions from `first` on that a tile holds; `moved` of them belong to the tile before. */
__m512i pixels_of_tile(const job &j, int32_t first, int32_t moved) {
  const geometry &g = j.g;
  const __m512i row = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i position = _mm512_add_epi32(row, _mm512_set1_epi32(first - moved));
  __mmask16 kept = _mm512_cmplt_epi32_mask(position, _mm512_set1_epi32(g.positions));
  kept &= _mm512_cmpge_epi32_mask(row, _mm512_set1_epi32(moved));
  if (g.from != PLANE) return _mm512_mask_mov_epi32(_mm512_set1_epi32(DROPPED), kept, position);
  alignas(64) int32_t line[16], column[16];
  for (int32_t i = 0, l = first / g.plane_width, c = first % g.plane_width; i < 16; ++i) {
    line[i] = l, column[i] = c;
    if (++c == g.plane_width) c = 0, ++l;
  }
  const __m512i width = _mm512_set1_epi32(j.p->out_size[2]), columns = _mm512_load_si512(column);
  kept &= _mm512_cmplt_epi32_mask(columns, width);
  return _mm512_mask_add_epi32(_mm512_set1_epi32(DROPPED), kept, columns, _mm512_mullo_epi32(_mm512_load_si512(line), width));
}

/* Fills b.rows, up to a multiple of 16. */
void fill_rows(const job &j, const block &b, int32_t index) {
  const geometry &g = j.g;
  const int32_t tile = start_of(g.tiles_of_block, index % g.blocks);
  const __m512i image = _mm512_set1_epi32(index / g.blocks * pixels_per_image(j.p)), none = _mm512_set1_epi32(DROPPED);
  for (int32_t t = 0; t < b.tiles; ++t) {
    const int32_t first = (tile + t) * g.rows;
    const __m512i pixel = pixels_of_tile(j, first, moved_back(g, first));
    const __mmask16 kept = _mm512_cmpge_epi32_mask(pixel, _mm512_setzero_si512());
    /* past g.rows, the next tile overwrites it */
    _mm512_storeu_si512(b.rows->pixel + t * g.rows, _mm512_mask_add_epi32(none, kept, pixel, image));
  }
  const int32_t count = b.tiles * g.rows;
  _mm512_storeu_si512(b.rows->pixel + count, none);
  fill_offsets_of_rows(j, b.rows, count);
}

/* Makes block `index` ready (planes are copied elsewhere). */
void prepare(const job &j, int32_t index, int32_t slot) {
  const block b = block_at(j, index, slot);
  fill_rows(j, b, index);
  if (j.g.from == DIRECT || j.g.from == PLANE) return;
  const int32_t first = start_of(j.g.tiles_of_block, index % j.g.blocks) * j.g.rows, end = first + b.tiles * j.g.rows;
  gather_windows(j, (uint8_t *)b.a[0], first, end < j.g.positions ? end : j.g.positions);
}

}  // namespace

#endif
