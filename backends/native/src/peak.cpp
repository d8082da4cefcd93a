// The multiply-accumulate rate of the processor's widest int8 instruction: what benchmarks measure kernels against.

#include <stddef.h>
#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vnni")

namespace {

enum { kChains = 12, kMacsPerInstruction = 64 };

int64_t run_vpdpbusd(int64_t rounds) {
  __m512i acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = _mm512_setzero_si512();
  const __m512i ones = _mm512_set1_epi8(1);
  for (int64_t r = 0; r < rounds; ++r) {
#define FXC_STEP(i) asm volatile("vpdpbusd %1, %1, %0" : "+v"(acc[i]) : "v"(ones));
    FXC_STEP(0) FXC_STEP(1) FXC_STEP(2) FXC_STEP(3) FXC_STEP(4) FXC_STEP(5)
    FXC_STEP(6) FXC_STEP(7) FXC_STEP(8) FXC_STEP(9) FXC_STEP(10) FXC_STEP(11)
#undef FXC_STEP
  }
  return rounds * kChains * kMacsPerInstruction;
}

}  // namespace

#pragma GCC pop_options

extern "C" {
/* Runs `rounds` rounds of independent vpdpbusd instructions on one core and returns the products that were summed; 0 where
   the processor has no such instruction. The caller takes the time. */
int64_t fxc_run_vpdpbusd(int64_t rounds) { return __builtin_cpu_supports("avx512vnni") ? run_vpdpbusd(rounds) : 0; }
}

#else

extern "C" {
int64_t fxc_run_vpdpbusd(int64_t) { return 0; }
}

#endif
