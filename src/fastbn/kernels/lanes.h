/* Packs: vectors of the width that the instruction set level of this build has, through the vector types that GCC and
 * Clang share. Arithmetic on them is element by element, so the width of a pack never shows in a result: LANES virtual
 * lanes are 2, 4, 8 or, with another compiler, 16 packs. */
#ifndef FASTBN_LANES_H
#define FASTBN_LANES_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define FASTBN_LANES 16

#if defined(__GNUC__)
#if defined(__SSE2__)
#include <immintrin.h>
#endif
/* Where there are registers for it, the lanes of two channels or columns are side by side: an addition to a lane waits for
 * the one before, which takes longer than all others of LANES (measured: 0.061 ns per value and core alone, 0.037 side by
 * side; of two operands 0.091 and 0.053). */
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define FASTBN_BYTES 64
#define FASTBN_ABREAST 2
#elif defined(__AVX__)
#define FASTBN_BYTES 32
#define FASTBN_ABREAST 1
#else
#define FASTBN_BYTES 16
#define FASTBN_ABREAST 1
#endif
/* aligned: data are aligned to their items only; may_alias: a pack is read where single values lie */
typedef double fastbn_vd __attribute__((vector_size(FASTBN_BYTES), aligned(8), may_alias));
typedef float fastbn_vf __attribute__((vector_size(FASTBN_BYTES), aligned(4), may_alias));
typedef int64_t fastbn_vm __attribute__((vector_size(FASTBN_BYTES), aligned(8), may_alias));
typedef float fastbn_vh __attribute__((vector_size(FASTBN_BYTES / 2), aligned(4), may_alias));
typedef uint64_t fastbn_vq __attribute__((vector_size(FASTBN_BYTES), aligned(8), may_alias));
typedef uint32_t fastbn_vu __attribute__((vector_size(FASTBN_BYTES), aligned(4), may_alias));
#define FASTBN_VD (FASTBN_BYTES / 8)
#define FASTBN_VF (FASTBN_BYTES / 4)
static inline fastbn_vd fastbn_splat_d(double x) { return x - (fastbn_vd){0}; }
static inline fastbn_vf fastbn_splat_f(float x) { return x - (fastbn_vf){0}; }
/* By intrinsics where there are some: GCC 12 makes three instructions of __builtin_convertvector where one exists. */
static inline fastbn_vd fastbn_widen_f(const float *x) {
#if FASTBN_BYTES == 64
    return (fastbn_vd) _mm512_cvtps_pd(_mm256_loadu_ps(x));
#elif defined(__AVX__)
    return (fastbn_vd) _mm256_cvtps_pd(_mm_loadu_ps(x));
#elif defined(__SSE2__)
    return (fastbn_vd) _mm_cvtps_pd(_mm_castpd_ps(_mm_load_sd((const double *) x)));
#else
    return __builtin_convertvector(*(const fastbn_vh *) x, fastbn_vd);
#endif
}
/* x where the mask has all bits, else 0, whatever x is. */
static inline fastbn_vd fastbn_masked(fastbn_vd x, const int64_t *mask) {
    return (fastbn_vd) ((fastbn_vm) x & *(const fastbn_vm *) mask);
}
/* x, but 0 where v is NaN. */
static inline fastbn_vd fastbn_present(fastbn_vd x, fastbn_vd v) {
#if FASTBN_BYTES == 64
    return (fastbn_vd) _mm512_maskz_mov_pd(_mm512_cmp_pd_mask((__m512d) v, (__m512d) v, _CMP_ORD_Q), (__m512d) x);
#else
    return (fastbn_vd) ((fastbn_vm) x & (fastbn_vm) (v == v));
#endif
}
/* x <= y ? yes : no, and so "no" where x or y is NaN. C has no conditional operator for vectors: where there is no
 * instruction that blends, masks and bits. Where there are masks of bits they are written as such: of a comparison and
 * a blend GCC 12 made two comparisons and a blend. */
static inline fastbn_vd fastbn_select_d(fastbn_vd x, fastbn_vd y, fastbn_vd yes, fastbn_vd no) {
#if FASTBN_BYTES == 64
    __mmask8 mask = _mm512_cmp_pd_mask((__m512d) x, (__m512d) y, _CMP_LE_OQ);
    return (fastbn_vd) _mm512_mask_blend_pd(mask, (__m512d) no, (__m512d) yes);
#elif defined(__AVX__)
    return (fastbn_vd) _mm256_blendv_pd((__m256d) no, (__m256d) yes, _mm256_cmp_pd((__m256d) x, (__m256d) y, _CMP_LE_OQ));
#else
    fastbn_vq mask = (fastbn_vq) (x <= y);
    return (fastbn_vd) ((mask & (fastbn_vq) yes) | (~mask & (fastbn_vq) no));
#endif
}
static inline fastbn_vf fastbn_select_f(fastbn_vf x, fastbn_vf y, fastbn_vf yes, fastbn_vf no) {
#if FASTBN_BYTES == 64
    __mmask16 mask = _mm512_cmp_ps_mask((__m512) x, (__m512) y, _CMP_LE_OQ);
    return (fastbn_vf) _mm512_mask_blend_ps(mask, (__m512) no, (__m512) yes);
#elif defined(__AVX__)
    return (fastbn_vf) _mm256_blendv_ps((__m256) no, (__m256) yes, _mm256_cmp_ps((__m256) x, (__m256) y, _CMP_LE_OQ));
#else
    fastbn_vu mask = (fastbn_vu) (x <= y);
    return (fastbn_vf) ((mask & (fastbn_vu) yes) | (~mask & (fastbn_vu) no));
#endif
}
/* x < y ? x : y, and x > y ? x : y, so y where x or y is NaN: min and max, where there are such instructions. */
static inline fastbn_vd fastbn_smaller_d(fastbn_vd x, fastbn_vd y) {
#if FASTBN_BYTES == 64
    return (fastbn_vd) _mm512_min_pd((__m512d) x, (__m512d) y);
#elif defined(__AVX__)
    return (fastbn_vd) _mm256_min_pd((__m256d) x, (__m256d) y);
#elif defined(__SSE2__)
    return (fastbn_vd) _mm_min_pd((__m128d) x, (__m128d) y);
#else
    fastbn_vq mask = (fastbn_vq) (x < y);
    return (fastbn_vd) ((mask & (fastbn_vq) x) | (~mask & (fastbn_vq) y));
#endif
}
static inline fastbn_vf fastbn_smaller_f(fastbn_vf x, fastbn_vf y) {
#if FASTBN_BYTES == 64
    return (fastbn_vf) _mm512_min_ps((__m512) x, (__m512) y);
#elif defined(__AVX__)
    return (fastbn_vf) _mm256_min_ps((__m256) x, (__m256) y);
#elif defined(__SSE2__)
    return (fastbn_vf) _mm_min_ps((__m128) x, (__m128) y);
#else
    fastbn_vu mask = (fastbn_vu) (x < y);
    return (fastbn_vf) ((mask & (fastbn_vu) x) | (~mask & (fastbn_vu) y));
#endif
}
static inline fastbn_vd fastbn_larger_d(fastbn_vd x, fastbn_vd y) {
#if FASTBN_BYTES == 64
    return (fastbn_vd) _mm512_max_pd((__m512d) x, (__m512d) y);
#elif defined(__AVX__)
    return (fastbn_vd) _mm256_max_pd((__m256d) x, (__m256d) y);
#elif defined(__SSE2__)
    return (fastbn_vd) _mm_max_pd((__m128d) x, (__m128d) y);
#else
    fastbn_vq mask = (fastbn_vq) (x > y);
    return (fastbn_vd) ((mask & (fastbn_vq) x) | (~mask & (fastbn_vq) y));
#endif
}
static inline fastbn_vf fastbn_larger_f(fastbn_vf x, fastbn_vf y) {
#if FASTBN_BYTES == 64
    return (fastbn_vf) _mm512_max_ps((__m512) x, (__m512) y);
#elif defined(__AVX__)
    return (fastbn_vf) _mm256_max_ps((__m256) x, (__m256) y);
#elif defined(__SSE2__)
    return (fastbn_vf) _mm_max_ps((__m128) x, (__m128) y);
#else
    fastbn_vu mask = (fastbn_vu) (x > y);
    return (fastbn_vf) ((mask & (fastbn_vu) x) | (~mask & (fastbn_vu) y));
#endif
}
/* The larger bits of each lane of a pack and of as many numbers. */
static inline fastbn_vd fastbn_larger_bits_f(fastbn_vd most, const float *x) {
#if FASTBN_BYTES == 64
    return (fastbn_vd) _mm512_max_epu32((__m512i) most, _mm512_loadu_si512(x));
#elif defined(__AVX2__)
    return (fastbn_vd) _mm256_max_epu32((__m256i) most, _mm256_loadu_si256((const __m256i *) x));
#else
    fastbn_vu a = (fastbn_vu) most, b = *(const fastbn_vu *) x, mask = (fastbn_vu) (a > b);
    return (fastbn_vd) ((mask & a) | (~mask & b));
#endif
}
static inline fastbn_vd fastbn_larger_bits_d(fastbn_vd most, const double *x) {
#if FASTBN_BYTES == 64
    return (fastbn_vd) _mm512_max_epu64((__m512i) most, _mm512_loadu_si512(x));
#else
    fastbn_vq a = (fastbn_vq) most, b = *(const fastbn_vq *) x, mask = (fastbn_vq) (a > b);
    return (fastbn_vd) ((mask & a) | (~mask & b));
#endif
}
/* 2^n from n + 1.5 * 2^52 (or 2^23), whose last bits are n. */
static inline fastbn_vd fastbn_power_d(fastbn_vd n) { return (fastbn_vd) (((fastbn_vq) n + 1023) << 52); }
static inline fastbn_vf fastbn_power_f(fastbn_vf n) { return (fastbn_vf) (((fastbn_vu) n + 127) << 23); }
/* t + x * y where the product is exact: there, and only there, fused and separate rounding are the same. The instruction is
 * written out, so that the sum stays where it is: of an intrinsic GCC 12 made the form whose result takes the place of a
 * factor, and moved the sums of a loop around (eleven moves for twelve operations). */
static inline fastbn_vd fastbn_add_exact_product(fastbn_vd t, fastbn_vd x, fastbn_vd y) {
#if FASTBN_BYTES == 64
    __asm__("vfmadd231pd %2, %1, %0" : "+v"(t) : "v"(x), "v"(y));
    return t;
#elif defined(__FMA__)
    __asm__("vfmadd231pd %2, %1, %0" : "+x"(t) : "x"(x), "x"(y));
    return t;
#else
    return t + x * y;
#endif
}
/* t + x by a unit that multiplies, where there is one: on some processors the one that adds also widens. */
static inline fastbn_vd fastbn_add_by_product(fastbn_vd t, fastbn_vd x) {
#if defined(__FMA__)
    return fastbn_add_exact_product(t, x, fastbn_splat_d(1));
#else
    return t + x;
#endif
}
#else
typedef double fastbn_vd;
typedef float fastbn_vf;
#define FASTBN_VD 1
#define FASTBN_VF 1
#define FASTBN_ABREAST 1
#define fastbn_splat_d(x) (x)
#define fastbn_splat_f(x) (x)
static inline fastbn_vd fastbn_widen_f(const float *x) { return *x; }
static inline fastbn_vd fastbn_masked(fastbn_vd x, const int64_t *mask) { return *mask ? x : 0; }
static inline fastbn_vd fastbn_present(fastbn_vd x, fastbn_vd v) { return v == v ? x : 0; }
#define fastbn_select_d(x, y, yes, no) ((x) <= (y) ? (yes) : (no))
#define fastbn_select_f(x, y, yes, no) ((x) <= (y) ? (yes) : (no))
#define fastbn_smaller_d(x, y) ((x) < (y) ? (x) : (y))
#define fastbn_smaller_f(x, y) ((x) < (y) ? (x) : (y))
#define fastbn_larger_d(x, y) ((x) > (y) ? (x) : (y))
#define fastbn_larger_f(x, y) ((x) > (y) ? (x) : (y))
static inline fastbn_vd fastbn_larger_bits_f(fastbn_vd most, const float *x) {
    uint32_t a, b;
    memcpy(&a, &most, sizeof(a));
    memcpy(&b, x, sizeof(b));
    if (b > a) memcpy(&most, &b, sizeof(b));
    return most;
}
static inline fastbn_vd fastbn_larger_bits_d(fastbn_vd most, const double *x) {
    uint64_t a, b;
    memcpy(&a, &most, sizeof(a));
    memcpy(&b, x, sizeof(b));
    return b > a ? *x : most;
}
static inline fastbn_vd fastbn_power_d(fastbn_vd n) {
    uint64_t bits;
    memcpy(&bits, &n, sizeof(bits));
    bits = (bits + 1023) << 52;
    memcpy(&n, &bits, sizeof(bits));
    return n;
}
static inline fastbn_vf fastbn_power_f(fastbn_vf n) {
    uint32_t bits;
    memcpy(&bits, &n, sizeof(bits));
    bits = (bits + 127) << 23;
    memcpy(&n, &bits, sizeof(bits));
    return n;
}
static inline fastbn_vd fastbn_add_exact_product(fastbn_vd t, fastbn_vd x, fastbn_vd y) { return t + x * y; }
static inline fastbn_vd fastbn_add_by_product(fastbn_vd t, fastbn_vd x) { return t + x; }
#endif
/* -|x|; the sign of NaN too is set. */
static inline fastbn_vd fastbn_minus_size_d(fastbn_vd x) {
#if defined(__GNUC__)
    return (fastbn_vd) ((fastbn_vq) x | (uint64_t) 1 << 63);
#else
    return copysign(x, -1);
#endif
}
static inline fastbn_vf fastbn_minus_size_f(fastbn_vf x) {
#if defined(__GNUC__)
    return (fastbn_vf) ((fastbn_vu) x | (uint32_t) 1 << 31);
#else
    return copysignf(x, -1);
#endif
}
/* s * 2^n, rounded once, of a whole n and s between 1/2 and 2: in two factors, where there is no instruction for it. */
static inline fastbn_vd fastbn_times_power_d(fastbn_vd s, fastbn_vd n) {
#if FASTBN_BYTES == 64
    return (fastbn_vd) _mm512_scalef_pd((__m512d) s, (__m512d) n);
#else
    fastbn_vd half = (n * 0.5 + 6755399441055744.0) - 6755399441055744.0;
    return (s * fastbn_power_d(half + 6755399441055744.0)) * fastbn_power_d((n - half) + 6755399441055744.0);
#endif
}
static inline fastbn_vf fastbn_times_power_f(fastbn_vf s, fastbn_vf n) {
#if FASTBN_BYTES == 64
    return (fastbn_vf) _mm512_scalef_ps((__m512) s, (__m512) n);
#else
    fastbn_vf half = (n * 0.5f + 12582912.0f) - 12582912.0f;
    return (s * fastbn_power_f(half + 12582912.0f)) * fastbn_power_f((n - half) + 12582912.0f);
#endif
}
/* Which values of all lanes count. Marks are bytes, 0 or not. */
#if FASTBN_BYTES == 64
typedef __mmask16 fastbn_vk;
static inline fastbn_vk fastbn_marked(const uint8_t *m) {
    __m128i x = _mm_loadu_si128((const __m128i *) m);
    return _mm_test_epi8_mask(x, x);
}
static inline fastbn_vk fastbn_numbers_f(const float *x) {
    __m512 y = _mm512_loadu_ps(x);
    return _mm512_cmp_ps_mask(y, y, _CMP_ORD_Q);
}
static inline fastbn_vk fastbn_numbers_d(const double *x) {
    __m512d low = _mm512_loadu_pd(x), high = _mm512_loadu_pd(x + 8);
    return (fastbn_vk) (_mm512_cmp_pd_mask(low, low, _CMP_ORD_Q) | _mm512_cmp_pd_mask(high, high, _CMP_ORD_Q) << 8);
}
static inline fastbn_vk fastbn_both(fastbn_vk a, fastbn_vk b) { return a & b; }
static inline int fastbn_how_many(fastbn_vk k) { return __builtin_popcount(k); }
/* Pack j of all lanes, 0 where a value does not count. */
static inline fastbn_vd fastbn_kept(fastbn_vd x, fastbn_vk k, int j) {
    return (fastbn_vd) _mm512_maskz_mov_pd((__mmask8) (k >> j * FASTBN_VD), (__m512d) x);
}
typedef __m128i fastbn_vc; /* up to 255 of each lane */
static inline fastbn_vc fastbn_count(fastbn_vc c, fastbn_vk k) { return _mm_mask_add_epi8(c, k, c, _mm_set1_epi8(1)); }
#elif defined(__GNUC__) && defined(__SSE2__)
typedef __m128i fastbn_vk; /* a byte each, of all bits or none */
static inline fastbn_vk fastbn_marked(const uint8_t *m) {
    __m128i none = _mm_cmpeq_epi8(_mm_loadu_si128((const __m128i *) m), _mm_setzero_si128());
    return _mm_xor_si128(none, _mm_set1_epi8(-1));
}
static inline __m128i fastbn_ordered(const float *x) {
    __m128 y = _mm_loadu_ps(x);
    return _mm_castps_si128(_mm_cmpord_ps(y, y));
}
static inline fastbn_vk fastbn_numbers_f(const float *x) {
    return _mm_packs_epi16(_mm_packs_epi32(fastbn_ordered(x), fastbn_ordered(x + 4)),
                           _mm_packs_epi32(fastbn_ordered(x + 8), fastbn_ordered(x + 12)));
}
static inline __m128i fastbn_ordered_4(const double *x) {
    __m128d low = _mm_loadu_pd(x), high = _mm_loadu_pd(x + 2);
    return _mm_castps_si128(_mm_shuffle_ps(_mm_castpd_ps(_mm_cmpord_pd(low, low)),
                                           _mm_castpd_ps(_mm_cmpord_pd(high, high)), _MM_SHUFFLE(2, 0, 2, 0)));
}
static inline fastbn_vk fastbn_numbers_d(const double *x) {
    return _mm_packs_epi16(_mm_packs_epi32(fastbn_ordered_4(x), fastbn_ordered_4(x + 4)),
                           _mm_packs_epi32(fastbn_ordered_4(x + 8), fastbn_ordered_4(x + 12)));
}
static inline fastbn_vk fastbn_both(fastbn_vk a, fastbn_vk b) { return _mm_and_si128(a, b); }
static inline int fastbn_how_many(fastbn_vk k) {
    __m128i halves = _mm_sad_epu8(_mm_sub_epi8(_mm_setzero_si128(), k), _mm_setzero_si128());
    return _mm_cvtsi128_si32(halves) + _mm_extract_epi16(halves, 4);
}
#if defined(__AVX2__)
/* All marks in both halves, and a shuffle within each: cheaper than to load four and widen them across. */
static inline fastbn_vd fastbn_kept(fastbn_vd x, fastbn_vk k, int j) {
    const __m256i first = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    __m256i places = _mm256_add_epi8(first, _mm256_set1_epi8((char) (4 * j)));
    return (fastbn_vd) _mm256_and_pd((__m256d) x, _mm256_castsi256_pd(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(k), places)));
}
#else
static inline fastbn_vd fastbn_kept(fastbn_vd x, fastbn_vk k, int j) {
    const char *bytes = (const char *) &k + j * FASTBN_VD;
    int16_t two;
    __m128i mask;
    memcpy(&two, bytes, sizeof(two));
    mask = _mm_cvtsi32_si128(two);
    mask = _mm_unpacklo_epi8(mask, mask);
    mask = _mm_unpacklo_epi16(mask, mask);
    mask = _mm_unpacklo_epi32(mask, mask);
    return (fastbn_vd) _mm_and_pd((__m128d) x, _mm_castsi128_pd(mask));
}
#endif
typedef __m128i fastbn_vc;
static inline fastbn_vc fastbn_count(fastbn_vc c, fastbn_vk k) { return _mm_sub_epi8(c, k); }
#else
typedef struct { int8_t at[FASTBN_LANES]; } fastbn_vk;
#define FASTBN_EACH(expression) \
    fastbn_vk k; \
    for (int i = 0; i < FASTBN_LANES; i++) k.at[i] = (expression) ? -1 : 0; \
    return k
static inline fastbn_vk fastbn_marked(const uint8_t *m) { FASTBN_EACH(m[i]); }
static inline fastbn_vk fastbn_numbers_f(const float *x) { FASTBN_EACH(x[i] == x[i]); }
static inline fastbn_vk fastbn_numbers_d(const double *x) { FASTBN_EACH(x[i] == x[i]); }
static inline fastbn_vk fastbn_both(fastbn_vk a, fastbn_vk b) { FASTBN_EACH(a.at[i] & b.at[i]); }
static inline int fastbn_how_many(fastbn_vk k) {
    int n = 0;
    for (int i = 0; i < FASTBN_LANES; i++) n -= k.at[i];
    return n;
}
static inline fastbn_vd fastbn_kept(fastbn_vd x, fastbn_vk k, int j) {
    int64_t mask[FASTBN_VD];
    for (int i = 0; i < FASTBN_VD; i++) mask[i] = k.at[j * FASTBN_VD + i];
    return fastbn_masked(x, mask);
}
typedef struct { uint8_t at[FASTBN_LANES]; } fastbn_vc;
static inline fastbn_vc fastbn_count(fastbn_vc c, fastbn_vk k) {
    for (int i = 0; i < FASTBN_LANES; i++) c.at[i] = (uint8_t) (c.at[i] - k.at[i]);
    return c;
}
#endif
/* The largest of n numbers; NaN where one of them is negative, -0.0, infinite or NaN. The bits of numbers that are not
 * negative are in order, and those of all others are beyond infinity. */
static inline double fastbn_largest_f(const float *x, ptrdiff_t n) {
    uint32_t most = 0, bits;
    float found;
    for (ptrdiff_t i = 0; i < n; i++) {
        memcpy(&bits, x + i, sizeof(bits));
        most = bits > most ? bits : most;
    }
    memcpy(&found, &most, sizeof(found));
    return most < 0x7f800000 ? found : NAN;
}
static inline double fastbn_largest_d(const double *x, ptrdiff_t n) {
    uint64_t most = 0, bits;
    double found;
    for (ptrdiff_t i = 0; i < n; i++) {
        memcpy(&bits, x + i, sizeof(bits));
        most = bits > most ? bits : most;
    }
    memcpy(&found, &most, sizeof(found));
    return most >> 52 < 0x7ff ? found : NAN;
}
static inline fastbn_vc fastbn_load_counts(const uint8_t *at) {
    fastbn_vc c;
    memcpy(&c, at, sizeof(c));
    return c;
}
static inline void fastbn_store_counts(uint8_t *at, fastbn_vc c) { memcpy(at, &c, sizeof(c)); }

/* Stores past the caches, to addresses that are multiples of a pack's size. */
#if FASTBN_BYTES == 64
static inline void fastbn_stream_d(double *y, fastbn_vd z) { _mm512_stream_pd(y, (__m512d) z); }
static inline void fastbn_stream_f(float *y, fastbn_vf z) { _mm512_stream_ps(y, (__m512) z); }
#elif defined(__GNUC__) && defined(__AVX__)
static inline void fastbn_stream_d(double *y, fastbn_vd z) { _mm256_stream_pd(y, (__m256d) z); }
static inline void fastbn_stream_f(float *y, fastbn_vf z) { _mm256_stream_ps(y, (__m256) z); }
#elif defined(__GNUC__) && defined(__SSE2__)
static inline void fastbn_stream_d(double *y, fastbn_vd z) { _mm_stream_pd(y, (__m128d) z); }
static inline void fastbn_stream_f(float *y, fastbn_vf z) { _mm_stream_ps(y, (__m128) z); }
#else
static inline void fastbn_stream_d(double *y, fastbn_vd z) { *(fastbn_vd *) y = z; }
static inline void fastbn_stream_f(float *y, fastbn_vf z) { *(fastbn_vf *) y = z; }
#endif
/* Before another thread may read what was streamed. */
static inline void fastbn_fence(void) {
#if defined(__GNUC__) && defined(__SSE2__)
    _mm_sfence();
#endif
}

/* Stretches of memory in whole lines past the caches. What is left of the last line waits for the stretch that follows:
 * storing one line both ways takes as long as storing dozens. */
#define FASTBN_LINE 64
typedef struct {
    char *at;
    ptrdiff_t n;
    char bytes[FASTBN_LINE];
} fastbn_line;

static inline void fastbn_stream_line(char *y, const char *x) {
#if defined(__GNUC__)
    for (ptrdiff_t j = 0; j < FASTBN_LINE; j += FASTBN_BYTES)
        fastbn_stream_f((float *) (y + j), *(const fastbn_vf *) (x + j));
#else
    memcpy(y, x, FASTBN_LINE);
#endif
}

static inline void fastbn_end_line(fastbn_line *rest) {
    if (rest->n) memcpy(rest->at, rest->bytes, (size_t) rest->n);
    rest->n = 0;
}

/* n bytes at x to y. */
static inline void fastbn_stream_lines(fastbn_line *rest, char *y, const char *x, ptrdiff_t n) {
    ptrdiff_t i;
    if (rest->n && y == rest->at + rest->n) {
        i = FASTBN_LINE - rest->n < n ? FASTBN_LINE - rest->n : n;
        memcpy(rest->bytes + rest->n, x, (size_t) i);
        rest->n += i;
        if (rest->n < FASTBN_LINE) return;
        fastbn_stream_line(rest->at, rest->bytes);
    } else {
        fastbn_end_line(rest);
        i = -(ptrdiff_t) ((uintptr_t) y % FASTBN_LINE) & (FASTBN_LINE - 1);
        if (i > n) i = n;
        memcpy(y, x, (size_t) i);
    }
    for (; i <= n - FASTBN_LINE; i += FASTBN_LINE) fastbn_stream_line(y + i, x + i);
    memcpy(rest->bytes, x + i, (size_t) (n - i));
    rest->at = y + i;
    rest->n = n - i;
}

#if defined(__GNUC__)
#define fastbn_prefetch(x) __builtin_prefetch(x)
#define fastbn_prefetch_second(x) __builtin_prefetch(x, 0, 2) /* to a second level cache */
#define fastbn_prefetch_once(x) __builtin_prefetch(x, 0, 0) /* what is read once, and need not push others out */
#else
#define fastbn_prefetch(x) ((void) 0)
#define fastbn_prefetch_second(x) ((void) 0)
#define fastbn_prefetch_once(x) ((void) 0)
#endif

/* To a second level cache, or to the first: what comes from memory waits in fewer places on its way to the first. */
static inline void fastbn_prefetch_to(const void *x, int second) {
    if (second)
        fastbn_prefetch_second(x);
    else
        fastbn_prefetch(x);
}

static inline fastbn_vd fastbn_widen_d(const double *x) { return *(const fastbn_vd *) x; }

#define FASTBN_ND (FASTBN_LANES / FASTBN_VD) /* packs of doubles in all lanes */
#define FASTBN_NF (FASTBN_LANES / FASTBN_VF) /* packs of floats in all lanes */

/* Masks of the last, overlapping chunk of a run: from entry n on, LANES - n zeros and n times all bits. */
static const int64_t fastbn_last[2 * FASTBN_LANES] = {
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};

/* The same as marks. */
static const uint8_t fastbn_last_marks[2 * FASTBN_LANES] = {
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

/* Coefficients of x^13 to x^2 in exp(x), 1 / 13! to 1 / 2!; and of x^6 to x^2 for float: those whose largest relative error for
 * |x| <= ln 2 / 2 is the least, 3.1e-9 (by Remez's exchange), for which the series needs one term more. */
static const double fastbn_series[17] = {
    1. / 6227020800, 1. / 479001600, 1. / 39916800, 1. / 3628800, 1. / 362880, 1. / 40320,
    1. / 5040, 1. / 720, 1. / 120, 1. / 24, 1. / 6, 1. / 2,
    0.0013814598646664034, 0.00836871687972814, 0.041668388045313996, 0.16666520631709497, 0.49999993447796487};

#endif
