/* The bandwidth limit: what the machine needs merely to read and to write so many cache lines, with hardly any
 * arithmetic. Every thread takes one stretch. Compiled by limit.py when benchmarks run; no part of the package. */
#include <stddef.h>
#if defined(__AVX__) || defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
#define LINE 64

typedef float pack __attribute__((vector_size(BYTES), aligned(4), may_alias));

static inline __attribute__((always_inline)) void put(char *y, pack z, int stream) {
#if defined(__AVX__)
    if (stream) {
        _mm256_stream_ps((float *) y, (__m256) z);
        return;
    }
#elif defined(__SSE2__)
    if (stream) {
        _mm_stream_ps((float *) y, (__m128) z);
        return;
    }
#endif
    *(pack *) y = z;
}

/* Groups of lu lines of u (and of v) become ly lines of y. */
static inline __attribute__((always_inline)) float walk(const char *u, const char *v, char *y, ptrdiff_t groups, int lu,
                                                        int ly, int stream) {
    pack sum[LINE / BYTES] = {{0}};
    float total = 0;
    for (ptrdiff_t i = 0; i < groups; i++)
        for (int line = 0; line < (lu > ly ? lu : ly); line++)
            for (int k = 0; k < LINE / BYTES; k++) {
                ptrdiff_t at = k * BYTES;
                pack x = *(const pack *) (u + (i * lu + (line < lu ? line : 0)) * LINE + at);
                if (v)
                    x += *(const pack *) (v + (i * lu + (line < lu ? line : 0)) * LINE + at);
                if (line < ly)
                    put(y + (i * ly + line) * LINE + at, x * 2.f, stream);
                else
                    sum[k] += x;
            }
    for (int k = 0; k < LINE / BYTES; k++)
        total += sum[k][0];
    return total;
}

/* v may be NULL; ly is 0 where nothing is written. y must be a multiple of LINE where stream is set. */
float limit(const char *u, const char *v, char *y, ptrdiff_t groups, int lu, int ly, int stream, int threads) {
    float total = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : total)
    for (int t = 0; t < threads; t++) {
        ptrdiff_t a = groups * t / threads, n = groups * (t + 1) / threads - a;
        const char *u0 = u + a * lu * LINE, *v0 = v ? v + a * lu * LINE : NULL;
        char *y0 = y + a * ly * LINE;
/* Constants, so that the compiler makes a loop of each. */
#define ONE(LU, LY)                                                                                                \
    if (lu == LU && ly == LY)                                                                                      \
        total += v ? (stream ? walk(u0, v0, y0, n, LU, LY, 1) : walk(u0, v0, y0, n, LU, LY, 0))                    \
                   : (stream ? walk(u0, NULL, y0, n, LU, LY, 1) : walk(u0, NULL, y0, n, LU, LY, 0));
        ONE(1, 0) ONE(1, 1) ONE(1, 2) ONE(1, 4) ONE(2, 1)
    }
    return total;
}
