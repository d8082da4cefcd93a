/* What the processor and the operating system offer: asked once per process, at the first call. */

#ifndef FXC_CPU_H
#define FXC_CPU_H

#ifdef __cplusplus
extern "C" {
#endif

/* 1 if kernels of `isa` can run here: "scalar", "avx2", "avxvnni", "avx512vnni", "amx", "dotprod", "i8mm"; 0 for any other
   name. Both the instructions and the operating system's support for their registers are needed. */
int fxc_has_isa(const char *isa);

/* 1 if the int8 tile instructions can run here. Linux gives a process the large tile registers only when it asks for them;
   the permission holds for all threads of the process, so the first call asks. */
int fxc_amx_available(void);

#ifdef __cplusplus
}
#endif
#endif
