/* Packs of float from and to values of 16 bits, the same bits as by convert.h, for levels that have instructions for halves.
 * On others a run is converted in a tile first. And packs of bytes. */
#ifndef FASTBN_SMALL_PACKS_H
#define FASTBN_SMALL_PACKS_H

#include "convert.h"
#include "lanes.h"

/* Bytes, which are numbers from 0 to 255, at every level. */
#if defined(__GNUC__)
typedef uint8_t fastbn_vbd __attribute__((vector_size(FASTBN_VD)));
typedef uint8_t fastbn_vbf __attribute__((vector_size(FASTBN_VF)));
static inline fastbn_vd fastbn_load_bytes_d(const void *x) {
    fastbn_vbd bytes;
    memcpy(&bytes, x, sizeof(bytes));
    return __builtin_convertvector(bytes, fastbn_vd);
}
static inline fastbn_vf fastbn_load_bytes_f(const void *x) {
#if FASTBN_BYTES == 64
    return (fastbn_vf) _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *) x)));
#elif defined(__AVX2__)
    return (fastbn_vf) _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *) x)));
#else
    fastbn_vbf bytes;
    memcpy(&bytes, x, sizeof(bytes));
    return __builtin_convertvector(bytes, fastbn_vf);
#endif
}
#else
static inline fastbn_vd fastbn_load_bytes_d(const void *x) { return *(const uint8_t *) x; }
static inline fastbn_vf fastbn_load_bytes_f(const void *x) { return *(const uint8_t *) x; }
#endif

#if defined(__GNUC__) && defined(__AVX2__) && defined(__F16C__)
#define FASTBN_HAS_SMALL_PACKS 1
#if FASTBN_BYTES == 64
typedef __m256i fastbn_vs; /* a pack of 16 bits */
#define FASTBN_LOAD_BITS(x) _mm256_loadu_si256((const __m256i *) (x))
#define FASTBN_STORE_BITS(y, z) _mm256_storeu_si256((__m256i *) (y), z)
#define FASTBN_STREAM_BITS(y, z) _mm256_stream_si256((__m256i *) (y), z)
#define FASTBN_WIDEN_HALVES(x) ((fastbn_vf) _mm512_cvtph_ps(x))
#define FASTBN_NARROW_HALVES(z) _mm512_cvtps_ph((__m512) (z), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
#define FASTBN_RAISE_BITS(x) ((fastbn_vu) _mm512_cvtepu16_epi32(FASTBN_LOAD_BITS(x)) << 16)
#define FASTBN_LOWER_BITS(z) _mm512_cvtepi32_epi16((__m512i) ((z) >> 16))
/* The bits of z made quiet where it is NaN, else those that are rounded; one instruction less than a selection. */
#define FASTBN_QUIET_OR(z, rounded) \
    ((fastbn_vu) _mm512_mask_or_epi32((__m512i) (rounded), _mm512_cmp_ps_mask((__m512) (z), (__m512) (z), _CMP_UNORD_Q), \
                                      (__m512i) (z), _mm512_set1_epi32(0x400000)))
#else
typedef __m128i fastbn_vs;
#define FASTBN_LOAD_BITS(x) _mm_loadu_si128((const __m128i *) (x))
#define FASTBN_STORE_BITS(y, z) _mm_storeu_si128((__m128i *) (y), z)
#define FASTBN_STREAM_BITS(y, z) _mm_stream_si128((__m128i *) (y), z)
#define FASTBN_WIDEN_HALVES(x) ((fastbn_vf) _mm256_cvtph_ps(x))
#define FASTBN_NARROW_HALVES(z) _mm256_cvtps_ph((__m256) (z), _MM_FROUND_TO_NEAREST_INT)
#define FASTBN_RAISE_BITS(x) fastbn_raise_words(x)
#define FASTBN_LOWER_BITS(z) fastbn_lower_words((__m256i) (z))
#define FASTBN_QUIET_OR(z, rounded) \
    ((fastbn_vu) fastbn_select_f(z, z, (fastbn_vf) (rounded), (fastbn_vf) ((fastbn_vu) (z) | 0x400000)))
#endif
static inline void fastbn_store_small(void *y, fastbn_vs z, int stream) {
    if (stream)
        FASTBN_STREAM_BITS(y, z);
    else
        FASTBN_STORE_BITS(y, z);
}
static inline fastbn_vf fastbn_load_half_pack(const void *x) { return FASTBN_WIDEN_HALVES(FASTBN_LOAD_BITS(x)); }
static inline void fastbn_store_half_pack(void *y, fastbn_vf z, int stream) {
    fastbn_store_small(y, FASTBN_NARROW_HALVES(z), stream);
}
static inline fastbn_vf fastbn_load_bfloat_pack(const void *x) {
    return (fastbn_vf) FASTBN_RAISE_BITS(x);
}
/* `fastbn_to_bfloat` of a pack. */
static inline void fastbn_store_bfloat_pack(void *y, fastbn_vf z, int stream) {
    fastbn_vu bits = (fastbn_vu) z, rounded = bits + 0x7fff + (bits >> 16 & 1);
    fastbn_store_small(y, FASTBN_LOWER_BITS(FASTBN_QUIET_OR(z, rounded)), stream);
}
#else
#define FASTBN_HAS_SMALL_PACKS 0
/* Never called. */
static inline fastbn_vf fastbn_load_half_pack(const void *x) { return *(const fastbn_vf *) x; }
static inline fastbn_vf fastbn_load_bfloat_pack(const void *x) { return *(const fastbn_vf *) x; }
static inline void fastbn_store_half_pack(void *y, fastbn_vf z, int stream) { *(fastbn_vf *) y = z; }
static inline void fastbn_store_bfloat_pack(void *y, fastbn_vf z, int stream) { *(fastbn_vf *) y = z; }
#endif

#endif
