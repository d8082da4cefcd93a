/* A row of the kernel table: one implementation of one operator for one instruction set. kernels.inc lists the rows. */

#ifndef FXC_KERNEL_ROW_H
#define FXC_KERNEL_ROW_H

#include <stddef.h>
#include <stdint.h>

#include "fxc_kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef void (*fxc_run)(const void *params, const void *const *in, void *out, int32_t begin, int32_t end, void *scratch);

/* The packed weights serve every batch and image size: packing may depend on weights, channels, groups, kernel, requantization
   and row, never on batch, sizes or strides (what depends on those is decided in run()).

   Rows of one operator stand in order of preference: the first whose instruction set the processor has and that accepts the
   parameters is taken. Functions may be NULL where the comment says so. */
typedef struct {
  const char *name;                             /* fxc_<type>_<op>_<tile>__<isa> */
  const char *op;                               /* "conv", "pool", ... */
  const char *isa;                              /* "scalar", "avx2", "avx512vnni", "amx", "dotprod" */
  int (*accepts)(const void *params);           /* NULL: any parameters */
  size_t (*packed_bytes)(const void *params);   /* NULL: weights are used as they are */
  void (*pack)(const void *params, void *packed); /* from params->weight (scalar layout) to 64-byte aligned `packed` */
  int32_t (*units)(const void *params);         /* number of work units run() may be given */
  size_t (*scratch_bytes)(const void *params);  /* NULL: none. Per thread, 64-byte aligned */
  fxc_run run;                                  /* with params->weight pointing to the packed weights */
} fxc_kernel;

#ifdef __cplusplus
}
#endif
#endif
