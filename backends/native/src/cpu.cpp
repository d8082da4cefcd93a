// Detection of instruction sets. See cpu.h.

#include "cpu.h"

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#if defined(__aarch64__)
#include <sys/auxv.h>
#endif
#endif

namespace {

struct Features {
  bool avx2, avxvnni, avx512vnni, amx, dotprod, i8mm;
};

#if defined(__x86_64__)

bool bit(uint32_t word, int index) { return (word >> index & 1) != 0; }

// State components of XCR0 (Intel SDM volume 1, 13.1): the operating system saves what it has enabled.
constexpr uint64_t kYmmState = 0x6;         // SSE, AVX
constexpr uint64_t kZmmState = 0xe6;        // and opmask, upper halves, upper registers
constexpr uint64_t kTileState = 0x60000;    // tile configuration, tile data
constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM of arch_prctl(2)
constexpr int kTileData = 18;

uint64_t enabled_state() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t)high << 32 | low;
}

bool tiles_permitted() {
#if defined(__linux__)
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;  // the tile kernels are tried on Linux only
#endif
}

Features detect() {
  Features found = {};
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !bit(c, 27)) return found;  // OSXSAVE
  const uint64_t state = enabled_state();
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
  const uint32_t subleaves = a;
  const bool avx2 = bit(b, 5), avx512 = bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31);  // F, DQ, BW, VL
  const bool vnni = bit(c, 11), vbmi = bit(c, 1), tiles = bit(d, 24) && bit(d, 25);           // AMX-TILE, AMX-INT8
  found.avx2 = avx2 && (state & kYmmState) == kYmmState;
  found.avx512vnni = found.avx2 && avx512 && vnni && (state & kZmmState) == kZmmState;
  if (found.avx512vnni && vbmi && tiles && (state & kTileState) == kTileState) found.amx = tiles_permitted();
  if (subleaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) found.avxvnni = found.avx2 && bit(a, 4);
  return found;
}

#elif defined(__aarch64__) && defined(__linux__)

Features detect() {
  Features found = {};
  found.dotprod = (getauxval(AT_HWCAP) >> 20 & 1) != 0;  // HWCAP_ASIMDDP
  found.i8mm = (getauxval(AT_HWCAP2) >> 13 & 1) != 0;    // HWCAP2_I8MM
  return found;
}

#else

Features detect() {
  Features found = {};
#if defined(__ARM_FEATURE_DOTPROD)
  found.dotprod = true;  // compiled for it: the processor has it (Apple)
#endif
  return found;
}

#endif

const Features &features() {
  static const Features found = detect();
  return found;
}

}  // namespace

extern "C" int fxc_amx_available(void) { return features().amx; }

extern "C" int fxc_has_isa(const char *isa) {
  const Features &f = features();
  const struct {
    const char *name;
    bool present;
  } known[] = {{"scalar", true},     {"avx2", f.avx2},       {"avxvnni", f.avxvnni}, {"avx512vnni", f.avx512vnni},
               {"amx", f.amx},       {"dotprod", f.dotprod}, {"i8mm", f.i8mm}};
  for (const auto &entry : known)
    if (strcmp(entry.name, isa) == 0) return entry.present;
  return 0;
}
