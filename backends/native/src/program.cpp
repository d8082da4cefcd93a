// Runs flat programs: one parallel region per inference, in which the threads share every step. See program.h.

#include "program.h"

#include <omp.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>

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

// Who computes what. Every step's units are cut into one range per thread. A thread takes its own range of the step at hand
// (neighboring steps then read what this core has in its caches), and after it any range that nobody has begun: a thread
// that does not get a core, because the machine is busy, holds nobody up. A step begins when all ranges before it are done.
class Schedule {
 public:
  explicit Schedule(int64_t steps) : steps_(steps) {
    for (Claim &claim : claims_) claim.steps.store(0, std::memory_order_relaxed);
  }

  // The next range to run: false at the end of the program. `team`: threads taking part, at most kMaxThreads.
  bool next(int thread, int team, int64_t *step, int *range) {
    for (int64_t waits = 0;; ++waits) {
      const int64_t done = done_.load(std::memory_order_acquire);
      *step = done / team;
      if (*step == steps_) return false;
      for (int i = 0; i < team; ++i) {
        *range = thread + i < team ? thread + i : thread + i - team;
        int64_t claimed = *step;
        if (claims_[*range].steps.load(std::memory_order_relaxed) == claimed &&
            claims_[*range].steps.compare_exchange_strong(claimed, claimed + 1, std::memory_order_relaxed))
          return true;
      }
      wait_while(done, waits);
    }
  }

  void finish() { done_.fetch_add(1, std::memory_order_acq_rel); }

  static const int kMaxThreads = 128;

 private:
  // Spins, because steps last microseconds; later sleeps, because somebody else may need the core.
  void wait_while(int64_t done, int64_t waits) {
    for (int spins = 0; spins < kSpins; ++spins) {
      if (done_.load(std::memory_order_acquire) != done) return;
      pause();
    }
    if (waits > kPatience) std::this_thread::sleep_for(std::chrono::microseconds(50));
  }

  static const int kSpins = 1000, kPatience = 4;
  struct alignas(64) Claim {
    std::atomic<int64_t> steps;  // how many steps had this range taken
  };
  const int64_t steps_;
  alignas(64) std::atomic<int64_t> done_{0};  // ranges, of all steps
  Claim claims_[kMaxThreads];
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

// What a thread needs to run steps.
struct Worker {
  const fxc_program &program;
  uint8_t *arena;
  void *const *external;
  void *scratch;
  bool alone;  // the only thread
};

void run_range(const Worker &worker, const fxc_step &step, int range, int ranges) {
  const int32_t begin = static_cast<int32_t>(static_cast<int64_t>(step.units) * range / ranges);
  const int32_t end = static_cast<int32_t>(static_cast<int64_t>(step.units) * (range + 1) / ranges);
  if (begin == end) return;
  const fxc_task *tasks = static_cast<const fxc_task *>(step.run ? nullptr : step.params);
  for (int32_t i = begin; tasks && i < end; ++i)
    for (int32_t s = 0; s < tasks[i].count; ++s) run_range(worker, tasks[i].steps[s], 0, 1);
  if (tasks) return;
  if (worker.alone) fence(worker.program, step, worker.arena);
  const void *in[FXC_MAX_OPERANDS];
  for (int32_t i = 0; i < step.inputs; ++i) in[i] = address(step.in[i], worker.arena, worker.external);
  step.run(step.params, in, address(step.out, worker.arena, worker.external), begin, end, worker.scratch);
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
  Schedule schedule(program->count);
  if (threads > Schedule::kMaxThreads) threads = Schedule::kMaxThreads;
  if (nanoseconds) std::memset(nanoseconds, 0, sizeof *nanoseconds * static_cast<size_t>(program->count));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int thread = omp_get_thread_num(), team = omp_get_num_threads();  // may be fewer than asked for
    uint8_t *scratch = arena + program->scratch_offset + thread * program->scratch_bytes;
    const Worker worker = {*program, arena, external, scratch, team == 1};
    int64_t step, start = nanoseconds ? now() : 0;
    for (int range; schedule.next(thread, team, &step, &range);) {
      run_range(worker, program->steps[step], range, team);
      schedule.finish();
      if (!nanoseconds || thread > 0) continue;
      const int64_t end = now();
      nanoseconds[step] += end - start, start = end;
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
  FXC_SIZE(fxc_sums)
  FXC_SIZE(fxc_bilinear_linear)
  FXC_SIZE(fxc_bilinear_matmul)
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
  FXC_SIZE(fxc_task)
  FXC_SIZE(fxc_program)
#undef FXC_SIZE
  return 0;
}

}  // extern "C"
