/* A flat program: steps in order, each one kernel on operands in an arena, in external tensors or at fixed addresses. */

#ifndef FXC_PROGRAM_H
#define FXC_PROGRAM_H

#include "kernel_row.h"

#ifdef __cplusplus
extern "C" {
#endif

#define FXC_MAX_OPERANDS (FXC_MAX_BRANCHES + 2)

/* Spaces of an operand's address: fixed (constants), the arena of the call, or external tensor number space - FXC_EXTERNAL. */
enum { FXC_FIXED = 0, FXC_ARENA = 1, FXC_EXTERNAL = 2 };

typedef struct {
  int64_t offset; /* bytes; an address for FXC_FIXED */
  int64_t base, bytes; /* the buffer in the arena that the operand lies in: what a sanitized build lets the kernel touch */
  int32_t space, reserved;
} fxc_operand;

typedef struct {
  fxc_run run;        /* NULL: params are tasks (fxc_task), and a unit is one of them */
  const void *params;
  int32_t units; /* work units, shared among the threads */
  int32_t inputs;
  fxc_operand out, in[FXC_MAX_OPERANDS];
} fxc_step;

/* Steps that one thread runs in order, whole. */
typedef struct {
  const fxc_step *steps;
  int32_t count, reserved;
} fxc_task;

typedef struct {
  const fxc_step *steps;
  int32_t count, reserved;
  int64_t scratch_offset, scratch_bytes; /* of thread t: arena + scratch_offset + t * scratch_bytes */
  int64_t arena_bytes;
} fxc_program;

/* Runs all steps on `threads` threads. `nanoseconds` is NULL, or receives the time thread 0 spent on each step (its wait
   before the step included). Calls from several threads at once are safe with an arena each. */
void fxc_run_program(const fxc_program *program, uint8_t *arena, void *const *external, int32_t threads, int64_t *nanoseconds);

/* The kernel table: rows in order of preference, NULL past the end. */
const fxc_kernel *fxc_kernel_row(int32_t index);

/* sizeof of a parameter struct by name, 0 if there is none: whoever mirrors the structs checks that they agree. */
int64_t fxc_struct_size(const char *name);

#ifdef __cplusplus
}
#endif
#endif
