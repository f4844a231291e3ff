/* Values of the small types, to and from float. To float is exact; from float rounds to nearest, ties to even, and NaN
 * stays NaN, quiet. By the instructions for halves where the level has them, else in integers, which compilers
 * vectorize: the same bits either way, subnormal numbers and the payload of NaN included. */
#ifndef FASTBN_CONVERT_H
#define FASTBN_CONVERT_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__F16C__) || defined(__AVX2__)
#include <immintrin.h>
#endif

enum { FASTBN_FLOAT, FASTBN_DOUBLE, FASTBN_HALF, FASTBN_BFLOAT, FASTBN_UINT8, FASTBN_INT8 };

static inline float fastbn_as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline uint32_t fastbn_as_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float fastbn_from_half(uint16_t x) {
    uint32_t sign = (uint32_t) (x & 0x8000) << 16, m = (uint32_t) (x & 0x7fff) << 13;
    uint32_t normal = m + (112u << 23);
    uint32_t special = (m + (224u << 23)) | (m > 0x0f800000 ? 0x400000 : 0);
    /* 2^-14 (1 + f) - 2^-14: no float on the way is subnormal. Of other values this is not used. */
    uint32_t tiny = fastbn_as_bits(fastbn_as_float((m & 0x7fffff) | 0x38800000) - fastbn_as_float(0x38800000));
    uint32_t y = m < 0x00800000 ? tiny : normal;
    y = m >= 0x0f800000 ? special : y;
    return fastbn_as_float(sign | y);
}

static inline uint16_t fastbn_to_half(float x) {
    uint32_t bits = fastbn_as_bits(x), sign = bits >> 16 & 0x8000, m = bits & 0x7fffffff;
    uint32_t normal = (m - (112u << 23) + 0xfff + (m >> 13 & 1)) >> 13; /* carries up to infinity */
    uint32_t special = m > 0x7f800000 ? 0x7e00 | (m >> 13 & 0x3ff) : 0x7c00;
    /* The last bit of 0.5 is that of the smallest half: the sum rounds where a half does. */
    uint32_t tiny = fastbn_as_bits(fastbn_as_float(m) + 0.5f) - 0x3f000000;
    uint32_t y = m < 0x38800000 ? tiny : normal;
    y = m >= 0x47800000 ? special : y;
    return (uint16_t) (sign | y);
}

static inline float fastbn_from_bfloat(uint16_t x) { return fastbn_as_float((uint32_t) x << 16); }

static inline uint16_t fastbn_to_bfloat(float x) {
    uint32_t bits = fastbn_as_bits(x);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    uint32_t nan = bits >> 16 | 0x40;
    return (uint16_t) ((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded);
}

static inline float fastbn_from_uint8(uint8_t x) { return x; }
static inline float fastbn_from_int8(int8_t x) { return x; }

/* How many values of a contiguous run were converted by special instructions: none, or all. */
static inline ptrdiff_t fastbn_no_load(const void *x, ptrdiff_t n, float *y) { return 0; }
static inline ptrdiff_t fastbn_no_store(const float *x, ptrdiff_t n, void *y) { return 0; }
/* Eight at a time, sixteen in a turn: where a turn of eight happened to lie in two lines of code it took 1.7 times as long.
 * The last ones overlap those before. */
#define FASTBN_LOAD_EIGHT(name, type, eight, sixteen) \
    static inline ptrdiff_t name(const type *x, ptrdiff_t n, float *y) { \
        ptrdiff_t i = 0; \
        if (n < 8) return 0; \
        for (; i <= n - 16; i += 16) sixteen(x + i, y + i, eight) \
        if (i <= n - 8) _mm256_storeu_ps(y + i, eight(x + i)); \
        _mm256_storeu_ps(y + n - 8, eight(x + n - 8)); \
        return n; \
    }
#define FASTBN_TWO_EIGHTS(x, y, eight) { \
        __m256 low = eight(x), high = eight((x) + 8); \
        _mm256_storeu_ps(y, low); \
        _mm256_storeu_ps((y) + 8, high); \
    }
#if defined(__F16C__)
#define FASTBN_HALVES(x) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) (x)))
#if defined(__AVX512F__)
#define FASTBN_SIXTEEN_HALVES(x, y, eight) \
    _mm512_storeu_ps(y, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) (x))));
#else
#define FASTBN_SIXTEEN_HALVES FASTBN_TWO_EIGHTS
#endif
FASTBN_LOAD_EIGHT(fastbn_load_halves, uint16_t, FASTBN_HALVES, FASTBN_SIXTEEN_HALVES)
static inline ptrdiff_t fastbn_store_halves(const float *x, ptrdiff_t n, uint16_t *y) {
    ptrdiff_t i = 0;
    if (n < 8) return 0;
#if defined(__AVX512F__)
    for (; i <= n - 16; i += 16)
        _mm256_storeu_si256((__m256i *) (y + i),
                            _mm512_cvtps_ph(_mm512_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#endif
    for (; i <= n - 8; i += 8)
        _mm_storeu_si128((__m128i *) (y + i), _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128((__m128i *) (y + n - 8),
                     _mm256_cvtps_ph(_mm256_loadu_ps(x + n - 8), _MM_FROUND_TO_NEAREST_INT));
    return n;
}
#else
#define fastbn_load_halves fastbn_no_load
#define fastbn_store_halves fastbn_no_store
#endif

/* Where registers have two halves: eight values that a load puts into both, each of them to its place by a shuffle within a
 * half. Instructions that widen or narrow go across halves, which takes two steps of the few units that shuffle. */
#if defined(__AVX2__) && !defined(__AVX512F__)
/* Values of 16 bits, to the upper ones of 32. */
static inline __m256i fastbn_raise_words(const void *x) {
    const __m256i places = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7,
                                            -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) x)), places);
}
/* And back. */
static inline __m128i fastbn_lower_words(__m256i x) {
    const __m256i places = _mm256_setr_epi8(2, 3, 6, 7, 10, 11, 14, 15, -1, -1, -1, -1, -1, -1, -1, -1,
                                            -1, -1, -1, -1, -1, -1, -1, -1, 2, 3, 6, 7, 10, 11, 14, 15);
    x = _mm256_shuffle_epi8(x, places);
    return _mm_or_si128(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
}
/* Bytes, to the highest of 32 bits. */
static inline __m256i fastbn_raise_bytes(const void *x) {
    const __m256i places = _mm256_setr_epi8(-1, -1, -1, 0, -1, -1, -1, 1, -1, -1, -1, 2, -1, -1, -1, 3,
                                            -1, -1, -1, 4, -1, -1, -1, 5, -1, -1, -1, 6, -1, -1, -1, 7);
    return _mm256_shuffle_epi8(_mm256_broadcastq_epi64(_mm_loadl_epi64((const __m128i *) x)), places);
}
#define FASTBN_BFLOATS(x) _mm256_castsi256_ps(fastbn_raise_words(x))
#define FASTBN_UINT8S(x) _mm256_cvtepi32_ps(_mm256_srli_epi32(fastbn_raise_bytes(x), 24))
#define FASTBN_INT8S(x) _mm256_cvtepi32_ps(_mm256_srai_epi32(fastbn_raise_bytes(x), 24))
FASTBN_LOAD_EIGHT(fastbn_load_bfloats, uint16_t, FASTBN_BFLOATS, FASTBN_TWO_EIGHTS)
FASTBN_LOAD_EIGHT(fastbn_load_uint8s, uint8_t, FASTBN_UINT8S, FASTBN_TWO_EIGHTS)
FASTBN_LOAD_EIGHT(fastbn_load_int8s, int8_t, FASTBN_INT8S, FASTBN_TWO_EIGHTS)
#else
#define fastbn_load_bfloats fastbn_no_load
#define fastbn_load_uint8s fastbn_no_load
#define fastbn_load_int8s fastbn_no_load
#endif

/* The one loop in and the one loop out, made for each type: distances are bytes on the side of the type, values on the
 * side of float, and the two sides never overlap. */
#define FASTBN_LOAD(name, type, one, many) \
    static void name(const char *restrict x, ptrdiff_t sx, ptrdiff_t n, float *restrict y, ptrdiff_t sy) { \
        ptrdiff_t i; \
        if (sx == (ptrdiff_t) sizeof(type) && sy == 1) \
            for (i = many((const type *) x, n, y); i < n; i++) y[i] = one(((const type *) x)[i]); \
        else \
            for (i = 0; i < n; i++) y[i * sy] = one(*(const type *) (x + i * sx)); \
    }
#define FASTBN_STORE(name, type, one, many) \
    static void name(const float *restrict x, ptrdiff_t sx, ptrdiff_t n, char *restrict y, ptrdiff_t sy) { \
        ptrdiff_t i; \
        if (sy == (ptrdiff_t) sizeof(type) && sx == 1) \
            for (i = many(x, n, (type *) y); i < n; i++) ((type *) y)[i] = one(x[i]); \
        else \
            for (i = 0; i < n; i++) *(type *) (y + i * sy) = one(x[i * sx]); \
    }

FASTBN_LOAD(fastbn_load_half, uint16_t, fastbn_from_half, fastbn_load_halves)
FASTBN_LOAD(fastbn_load_bfloat, uint16_t, fastbn_from_bfloat, fastbn_load_bfloats)
FASTBN_LOAD(fastbn_load_uint8, uint8_t, fastbn_from_uint8, fastbn_load_uint8s)
FASTBN_LOAD(fastbn_load_int8, int8_t, fastbn_from_int8, fastbn_load_int8s)
FASTBN_STORE(fastbn_store_half, uint16_t, fastbn_to_half, fastbn_store_halves)
FASTBN_STORE(fastbn_store_bfloat, uint16_t, fastbn_to_bfloat, fastbn_no_store)

static inline void fastbn_load(int kind, const char *x, ptrdiff_t sx, ptrdiff_t n, float *y, ptrdiff_t sy) {
    switch (kind) {
    case FASTBN_HALF: fastbn_load_half(x, sx, n, y, sy); break;
    case FASTBN_BFLOAT: fastbn_load_bfloat(x, sx, n, y, sy); break;
    case FASTBN_UINT8: fastbn_load_uint8(x, sx, n, y, sy); break;
    case FASTBN_INT8: fastbn_load_int8(x, sx, n, y, sy); break;
    }
}

static inline void fastbn_store(int kind, const float *x, ptrdiff_t sx, ptrdiff_t n, char *y, ptrdiff_t sy) {
    if (kind == FASTBN_HALF)
        fastbn_store_half(x, sx, n, y, sy);
    else
        fastbn_store_bfloat(x, sx, n, y, sy);
}

#endif
