/* Packs of float from and to values of 16 bits, the same bits as by convert.h, for levels that have instructions for halves.
 * On others a run is converted in a tile first. */
#ifndef FASTBN_SMALL_PACKS_H
#define FASTBN_SMALL_PACKS_H

#include "convert.h"
#include "lanes.h"

#if defined(__GNUC__) && defined(__AVX2__) && defined(__F16C__)
#define FASTBN_HAS_SMALL_PACKS 1
#if FASTBN_BYTES == 64
typedef __m256i fastbn_vs; /* a pack of 16 bits */
static inline fastbn_vs fastbn_load_bits(const void *x) { return _mm256_loadu_si256((const __m256i *) x); }
static inline void fastbn_store_bits(void *y, fastbn_vs z, int stream) {
    if (stream)
        _mm256_stream_si256((__m256i *) y, z);
    else
        _mm256_storeu_si256((__m256i *) y, z);
}
static inline fastbn_vf fastbn_widen_halves(fastbn_vs x) { return (fastbn_vf) _mm512_cvtph_ps(x); }
static inline fastbn_vs fastbn_narrow_halves(fastbn_vf z) {
    return _mm512_cvtps_ph((__m512) z, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
static inline fastbn_vf fastbn_widen_bfloats(fastbn_vs x) {
    return (fastbn_vf) _mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16);
}
static inline fastbn_vs fastbn_narrow_bfloats(fastbn_vf z) {
    __m512i bits = (__m512i) z;
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    __mmask16 nan = _mm512_cmp_ps_mask((__m512) z, (__m512) z, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}
#else
typedef __m128i fastbn_vs;
static inline fastbn_vs fastbn_load_bits(const void *x) { return _mm_loadu_si128((const __m128i *) x); }
static inline void fastbn_store_bits(void *y, fastbn_vs z, int stream) {
    if (stream)
        _mm_stream_si128((__m128i *) y, z);
    else
        _mm_storeu_si128((__m128i *) y, z);
}
static inline fastbn_vf fastbn_widen_halves(fastbn_vs x) { return (fastbn_vf) _mm256_cvtph_ps(x); }
static inline fastbn_vs fastbn_narrow_halves(fastbn_vf z) {
    return _mm256_cvtps_ph((__m256) z, _MM_FROUND_TO_NEAREST_INT);
}
static inline fastbn_vf fastbn_widen_bfloats(fastbn_vs x) {
    return (fastbn_vf) _mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16);
}
static inline fastbn_vs fastbn_narrow_bfloats(fastbn_vf z) {
    __m256i bits = (__m256i) z;
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    __m256i nan = (__m256i) _mm256_cmp_ps((__m256) z, (__m256) z, _CMP_UNORD_Q);
    rounded = _mm256_blendv_epi8(rounded, _mm256_or_si256(bits, _mm256_set1_epi32(0x400000)), nan);
    rounded = _mm256_srai_epi32(rounded, 16); /* with its sign, so that packing keeps all bits */
    rounded = _mm256_permute4x64_epi64(_mm256_packs_epi32(rounded, rounded), 0x08);
    return _mm256_castsi256_si128(rounded);
}
#endif
static inline fastbn_vf fastbn_load_half_pack(const void *x) { return fastbn_widen_halves(fastbn_load_bits(x)); }
static inline fastbn_vf fastbn_load_bfloat_pack(const void *x) { return fastbn_widen_bfloats(fastbn_load_bits(x)); }
static inline void fastbn_store_half_pack(void *y, fastbn_vf z, int stream) {
    fastbn_store_bits(y, fastbn_narrow_halves(z), stream);
}
static inline void fastbn_store_bfloat_pack(void *y, fastbn_vf z, int stream) {
    fastbn_store_bits(y, fastbn_narrow_bfloats(z), stream);
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
