/* Packs: vectors of the width that the instruction set level of this build has, through the vector types that GCC and
 * Clang share. Arithmetic on them is element by element, so the width of a pack never shows in a result: LANES virtual
 * lanes are 2, 4, 8 or, with another compiler, 16 packs. */
#ifndef FASTBN_LANES_H
#define FASTBN_LANES_H

#define FASTBN_LANES 16

#if defined(__GNUC__)
#if defined(__AVX512F__)
#define FASTBN_BYTES 64
#elif defined(__AVX__)
#define FASTBN_BYTES 32
#else
#define FASTBN_BYTES 16
#endif
/* aligned: data are aligned to their items only; may_alias: a pack is read where single values lie */
typedef double fastbn_vd __attribute__((vector_size(FASTBN_BYTES), aligned(8), may_alias));
typedef float fastbn_vf __attribute__((vector_size(FASTBN_BYTES), aligned(4), may_alias));
typedef float fastbn_vh __attribute__((vector_size(FASTBN_BYTES / 2), aligned(4), may_alias));
#define FASTBN_VD (FASTBN_BYTES / 8)
#define FASTBN_VF (FASTBN_BYTES / 4)
static inline fastbn_vd fastbn_splat_d(double x) { return x - (fastbn_vd){0}; }
static inline fastbn_vf fastbn_splat_f(float x) { return x - (fastbn_vf){0}; }
static inline fastbn_vd fastbn_widen_f(const float *x) {
    return __builtin_convertvector(*(const fastbn_vh *) x, fastbn_vd);
}
#else
typedef double fastbn_vd;
typedef float fastbn_vf;
#define FASTBN_VD 1
#define FASTBN_VF 1
#define fastbn_splat_d(x) (x)
#define fastbn_splat_f(x) (x)
static inline fastbn_vd fastbn_widen_f(const float *x) { return *x; }
#endif
static inline fastbn_vd fastbn_widen_d(const double *x) { return *(const fastbn_vd *) x; }

#define FASTBN_ND (FASTBN_LANES / FASTBN_VD) /* packs of doubles in all lanes */
#define FASTBN_NF (FASTBN_LANES / FASTBN_VF) /* packs of floats in all lanes */

/* Weights of the last, overlapping chunk of a run: from entry n on, LANES - n zeros and n ones. */
static const double fastbn_last[2 * FASTBN_LANES] = {
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

#endif
