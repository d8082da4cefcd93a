// Runs flat programs: one parallel region per inference, a barrier between steps. See program.h.

#include "program.h"

#include <omp.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <cstring>

#include "boundary.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// All threads meet. Spins, because steps last microseconds; after a while it gives the core away, because on a busy
// machine the thread everybody waits for may need it.
class Barrier {
 public:
  void wait(int threads) {
    const int phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins)
      spins < kSpins ? pause() : (void)sched_yield();
  }

 private:
  static const int kSpins = 2000;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> phase_{0};
};

void *address(const fxc_operand &operand, uint8_t *arena, void *const *external) {
  if (operand.space == FXC_FIXED) return reinterpret_cast<void *>(static_cast<uintptr_t>(operand.offset));
  if (operand.space == FXC_ARENA) return arena + operand.offset;
  return static_cast<uint8_t *>(external[operand.space - FXC_EXTERNAL]) + operand.offset;
}

// A sanitized build fences every step in: of the arena, only the buffers of its operands and the scratch may be touched.
#if defined(__SANITIZE_ADDRESS__)
extern "C" void __asan_poison_memory_region(void const volatile *, size_t);
extern "C" void __asan_unpoison_memory_region(void const volatile *, size_t);
enum { kOverRead = 64 };

void open_buffer(const fxc_operand &operand, uint8_t *arena, int64_t over_read) {
  if (operand.space == FXC_ARENA) __asan_unpoison_memory_region(arena + operand.base, operand.bytes + over_read);
}

void fence(const fxc_program &program, const fxc_step &step, uint8_t *arena) {
  __asan_poison_memory_region(arena, program.scratch_offset);
  for (int32_t i = 0; i < step.inputs; ++i) open_buffer(step.in[i], arena, kOverRead);
  open_buffer(step.out, arena, 0);
}

void unfence(const fxc_program &program, uint8_t *arena) { __asan_unpoison_memory_region(arena, program.arena_bytes); }
#else
void fence(const fxc_program &, const fxc_step &, uint8_t *) {}
void unfence(const fxc_program &, uint8_t *) {}
#endif

void run_step(const fxc_step &step, uint8_t *arena, void *const *external, int thread, int threads, void *scratch) {
  const int32_t begin = static_cast<int32_t>(static_cast<int64_t>(step.units) * thread / threads);
  const int32_t end = static_cast<int32_t>(static_cast<int64_t>(step.units) * (thread + 1) / threads);
  if (begin == end) return;
  const void *in[FXC_MAX_OPERANDS];
  for (int32_t i = 0; i < step.inputs; ++i) in[i] = address(step.in[i], arena, external);
  step.run(step.params, in, address(step.out, arena, external), begin, end, scratch);
}

int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

#define FXC_KERNEL(kernel) extern "C" const fxc_kernel kernel;
#include "kernels.inc"
#undef FXC_KERNEL

extern "C" {

void fxc_run_program(const fxc_program *program, uint8_t *arena, void *const *external, int32_t threads, int64_t *nanoseconds) {
  Barrier barrier;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int thread = omp_get_thread_num(), team = omp_get_num_threads();  // may be fewer than asked for
    uint8_t *scratch = arena + program->scratch_offset + thread * program->scratch_bytes;
    for (int32_t i = 0; i < program->count; ++i) {
      const int64_t start = nanoseconds && thread == 0 ? now() : 0;
      if (team == 1) fence(*program, program->steps[i], arena);
      run_step(program->steps[i], arena, external, thread, team, scratch);
      if (team > 1) barrier.wait(team);
      if (nanoseconds && thread == 0) nanoseconds[i] = now() - start;
    }
  }
  unfence(*program, arena);
}

const fxc_kernel *fxc_kernel_row(int32_t index) {
  static const fxc_kernel *const rows[] = {
#define FXC_KERNEL(kernel) &kernel,
#include "kernels.inc"
#undef FXC_KERNEL
      nullptr};
  return rows[index];
}

int64_t fxc_struct_size(const char *name) {
#define FXC_SIZE(type) \
  if (!std::strcmp(name, #type)) return sizeof(type);
  FXC_SIZE(fxc_branch)
  FXC_SIZE(fxc_requantize)
  FXC_SIZE(fxc_conv)
  FXC_SIZE(fxc_matmul)
  FXC_SIZE(fxc_pool)
  FXC_SIZE(fxc_resize)
  FXC_SIZE(fxc_loops)
  FXC_SIZE(fxc_requantize_map)
  FXC_SIZE(fxc_mul)
  FXC_SIZE(fxc_widen)
  FXC_SIZE(fxc_clamp)
  FXC_SIZE(fxc_rescale)
  FXC_SIZE(fxc_table)
  FXC_SIZE(fxc_copy)
  FXC_SIZE(fxc_fill)
  FXC_SIZE(fxc_sum)
  FXC_SIZE(fxc_softmax)
  FXC_SIZE(fxc_layer_norm)
  FXC_SIZE(fxc_embedding)
  FXC_SIZE(fxc_logic)
  FXC_SIZE(fxc_quantize)
  FXC_SIZE(fxc_dequantize)
  FXC_SIZE(fxc_kernel)
  FXC_SIZE(fxc_operand)
  FXC_SIZE(fxc_step)
  FXC_SIZE(fxc_program)
#undef FXC_SIZE
  return 0;
}

}  // extern "C"
