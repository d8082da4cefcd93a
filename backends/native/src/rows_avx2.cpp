// Softmax and normalization of rows in AVX2 (fxc_softmax, fxc_layer_norm, reference_normalization.py): 16 elements at a time, finished
// by requantize_avx2.h or stored as int32. What is computed once per row is the portable code.
//
// Preconditions: rows contiguous (fxc_rows_contiguous); at most two branches, the second not broadcast along the row. Over-reads: codes
// up to 15 bytes, int32 branches up to 60 bytes.

#if defined(__x86_64__)

#pragma GCC push_options
#pragma GCC target("avx2")

#include <immintrin.h>

#include "kernel_row.h"
#include "loops.h"
#include "requantize_avx2.h"

namespace {

int32_t groups_of(const fxc_loops &loops) { return (loops.size[FXC_INNERMOST] + GROUP - 1) / GROUP; }

// Constants of all groups of a row; in scratch.
const group_constants *pack_groups(const fxc_loops &loops, const fxc_requantize *q, void *scratch) {
  group_constants *groups = (group_constants *)scratch;
  const int32_t n = loops.size[FXC_INNERMOST];
  for (int32_t g = 0; g < groups_of(loops); ++g) pack_group(&groups[g], q, GROUP * g, n - GROUP * g < GROUP ? n - GROUP * g : GROUP);
  return groups;
}

size_t group_bytes(const fxc_loops &loops) { return sizeof(group_constants) * (size_t)groups_of(loops); }

// (v * multiplier + 2^(shift-1)) >> shift
pair scale(pair v, const fxc_row_scale &row) {
  const __m256i multiplier = _mm256_set1_epi32(row.multiplier), half = _mm256_set1_epi32(1 << (row.shift - 1));
  const __m128i shift = _mm_cvtsi32_si128(row.shift);
  return {_mm256_sra_epi32(_mm256_add_epi32(_mm256_mullo_epi32(v.a, multiplier), half), shift),
          _mm256_sra_epi32(_mm256_add_epi32(_mm256_mullo_epi32(v.b, multiplier), half), shift)};
}

// Stores elements x..x + 15 of a row.
void finish_group(const destination &d, const group_constants *groups, int32_t x, int32_t n, pair v) {
  const group_constants &g = groups[x / GROUP];
  v.a = _mm256_add_epi32(v.a, load256(g.branch[0].offset)), v.b = _mm256_add_epi32(v.b, load256(g.branch[0].offset + 8));
  finish_pixels(d, g, x, n - x < GROUP ? n - x : GROUP, 0, 1, v, v);
}

int32_t units(const void *params) { return fxc_row_count((const fxc_loops *)params); }

// Inputs 0..count-1 lie side by side along the rows.
bool rows_accepted(const fxc_loops &loops, int32_t count) {
  bool flat = fxc_rows_contiguous(&loops);
  for (int32_t i = 0; i < count; ++i) flat = flat && (loops.size[FXC_INNERMOST] == 1 || loops.in_stride[i][FXC_INNERMOST] == 1);
  return flat;
}

// ------------------------------------------------------------------------------------------------------- layer norm

struct sums {
  int64_t total, squares;
};

sums sums_of(const uint8_t *codes, int32_t n) {
  constexpr int32_t CHUNK = 1 << 16;  // times 255^2 fits 32 bits
  sums s = {0, 0};
  for (int32_t begin = 0; begin < n; begin += CHUNK) {
    const int32_t end = n - begin < CHUNK ? n : begin + CHUNK;
    uint32_t total = 0, squares = 0;
    for (int32_t x = begin; x < end; ++x) total += codes[x], squares += (uint32_t)codes[x] * codes[x];
    s.total += total, s.squares += squares;
  }
  return s;
}

void run_layer_norm(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *scratch) {
  const fxc_layer_norm &p = *(const fxc_layer_norm *)params;
  const fxc_requantize *q = p.requantize;
  const int32_t n = p.loops.size[FXC_INNERMOST], none[2] = {0, 0};
  const group_constants *groups = pack_groups(p.loops, q, scratch);
  fxc_row row = fxc_row_at(&p.loops, begin);
  for (int32_t unit = begin; unit < end; fxc_next_row(&p.loops, &row, ++unit)) {
    const uint8_t *codes = (const uint8_t *)in[0] + row.in[0];
    const void *operands[2] = {codes, nullptr};
    if (q && q->branches == 2) operands[1] = (const uint8_t *)in[1] + row.in[1] * (q->branch[1].wide ? 4 : 1);
    const destination d = {q, operands, none, (uint8_t *)out + row.out * (q ? 1 : 4), 0};
    const sums s = sums_of(codes, n);
    const fxc_row_scale row_scale = fxc_layer_norm_scale(&p, s.total, s.squares);
    const __m256i mean = _mm256_set1_epi32(row_scale.mean);
    for (int32_t x = 0; x < n; x += GROUP) {
      pair v = load_branch(codes, x, false);
      v.a = _mm256_sub_epi32(_mm256_slli_epi32(v.a, 7), mean), v.b = _mm256_sub_epi32(_mm256_slli_epi32(v.b, 7), mean);
      finish_group(d, groups, x, n, scale(v, row_scale));
    }
  }
}

size_t layer_norm_scratch(const void *params) { return group_bytes(*(const fxc_loops *)params); }

int accepts_layer_norm(const void *params) {
  const fxc_layer_norm &p = *(const fxc_layer_norm *)params;
  const int32_t branches = p.requantize ? p.requantize->branches : 1;
  return branches <= 2 && rows_accepted(p.loops, branches);
}

// ---------------------------------------------------------------------------------------------------------- softmax

constexpr int32_t EXCLUDED = 256;  // the distance of what takes no part

// In scratch. table: fxc_softmax's, and 0 for EXCLUDED. Followed by a row of distances, which become exponentials, and the groups.
struct row_room {
  int32_t table[EXCLUDED + 16];
};

bool takes_part(const fxc_softmax &p, const void *const *in, const fxc_row &row, int32_t x) {
  if (!p.mask_bytes) return true;
  const uint8_t *element = (const uint8_t *)in[1] + (row.in[1] + (ptrdiff_t)x * p.loops.in_stride[1][FXC_INNERMOST]) * p.mask_bytes;
  uint8_t any = 0;
  for (int32_t i = 0; i < p.mask_bytes; ++i) any |= element[i];
  return any != 0;
}

// Distances from the largest code that takes part.
void distances_of(const fxc_softmax &p, const void *const *in, const fxc_row &row, int32_t *distance) {
  const uint8_t *codes = (const uint8_t *)in[0] + row.in[0];
  const int32_t n = p.loops.size[FXC_INNERMOST];
  int32_t largest = 0;
  if (!p.mask_bytes) {
    for (int32_t x = 0; x < n; ++x) largest = codes[x] > largest ? codes[x] : largest;
    for (int32_t x = 0; x < n; ++x) distance[x] = largest - codes[x];
    return;
  }
  for (int32_t x = 0; x < n; ++x) {
    distance[x] = takes_part(p, in, row, x);
    if (distance[x] && codes[x] > largest) largest = codes[x];
  }
  for (int32_t x = 0; x < n; ++x) distance[x] = distance[x] ? largest - codes[x] : EXCLUDED;
}

int32_t padded(const fxc_softmax &p) { return GROUP * groups_of(p.loops); }

size_t softmax_scratch(const void *params) {
  const fxc_softmax &p = *(const fxc_softmax *)params;
  return sizeof(row_room) + sizeof(int32_t) * (size_t)padded(p) + group_bytes(p.loops);
}

// Distances to their exponentials, in place; returns the sum.
int32_t exponentials(const int32_t *table, int32_t *row, int32_t padded) {
  __m256i total = _mm256_setzero_si256();
  for (int32_t x = 0; x < padded; x += 8) {
    const __m256i e = _mm256_i32gather_epi32(table, load256(row + x), 4);
    _mm256_storeu_si256((__m256i *)(row + x), e);
    total = _mm256_add_epi32(total, e);
  }
  int32_t lanes[8], sum = 0;
  _mm256_storeu_si256((__m256i *)lanes, total);
  for (int i = 0; i < 8; ++i) sum += lanes[i]; /* below 2^31: proven */
  return sum;
}

void run_softmax(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *scratch) {
  const fxc_softmax &p = *(const fxc_softmax *)params;
  row_room *room = (row_room *)scratch;
  int32_t *values = (int32_t *)(room + 1);
  const int32_t n = p.loops.size[FXC_INNERMOST], coarse = p.table_bits - 15;
  const group_constants *groups = pack_groups(p.loops, p.requantize, values + padded(p));
  memcpy(room->table, p.table, EXCLUDED * sizeof(int32_t));
  room->table[EXCLUDED] = 0;
  const __m256i half = _mm256_set1_epi32((1 << coarse) >> 1);
  fxc_row row = fxc_row_at(&p.loops, begin);
  for (int32_t unit = begin; unit < end; fxc_next_row(&p.loops, &row, ++unit)) {
    const destination d = {p.requantize, nullptr, nullptr, (uint8_t *)out + row.out * (p.requantize ? 1 : 4), 0};
    distances_of(p, in, row, values);
    for (int32_t x = n; x < padded(p); ++x) values[x] = EXCLUDED;
    const fxc_row_scale row_scale = fxc_softmax_scale(&p, exponentials(room->table, values, padded(p)));
    for (int32_t x = 0; x < n; x += GROUP) {
      pair t = load_branch(values, x, true);
      t.a = _mm256_srai_epi32(_mm256_add_epi32(t.a, half), coarse), t.b = _mm256_srai_epi32(_mm256_add_epi32(t.b, half), coarse);
      finish_group(d, groups, x, n, scale(t, row_scale));
    }
  }
}

int accepts_softmax(const void *params) {
  const fxc_softmax &p = *(const fxc_softmax *)params;
  return (!p.requantize || p.requantize->branches == 1) && rows_accepted(p.loops, 1);
}

}  // namespace

#pragma GCC pop_options

extern "C" {
extern const fxc_kernel fxc_u8_softmax__avx2 = {"fxc_u8_softmax__avx2", "softmax", "avx2", accepts_softmax, nullptr, nullptr,
                                                units, softmax_scratch, run_softmax};
extern const fxc_kernel fxc_u8_layer_norm__avx2 = {"fxc_u8_layer_norm__avx2", "layer_norm", "avx2", accepts_layer_norm, nullptr, nullptr,
                                                   units, layer_norm_scratch, run_layer_norm};
}

#endif
