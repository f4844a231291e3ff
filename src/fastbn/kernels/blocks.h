/* Memory of large results, kept for the next one of about the same size.
 *
 * A fresh allocation above what malloc keeps (32 MB with glibc) is mapped anew for every call, and its pages are cleared
 * one fault after the other while the kernel writes: up to half the time of a call. Blocks given back are kept here
 * instead. Those that make more than FASTBN_UNMARKED bytes together are marked with MADV_FREE: the system takes their
 * pages when it needs them, and only then. Marking 8 MB takes a third of the time of a training call that writes them.
 * Nobody waits: who finds the kept blocks in use maps a block anew or gives it back to the system, so a process that forks at
 * such a moment loses nothing but what is kept.
 */
#ifndef FASTBN_BLOCKS_H
#define FASTBN_BLOCKS_H

#include <stddef.h>
#include <string.h>

#if defined(__linux__) && defined(__GNUC__)
#include <sys/mman.h>
#endif

#if defined(__linux__) && defined(__GNUC__) && defined(MADV_FREE)
#define FASTBN_HAS_BLOCKS 1
#ifndef FASTBN_KEPT
#define FASTBN_KEPT 2                       /* blocks: a loop holds the last result while it makes the next */
#endif
#ifndef FASTBN_UNMARKED
#define FASTBN_UNMARKED ((size_t) 1 << 27)  /* bytes */
#endif
#define FASTBN_ROUND ((size_t) 1 << 21)     /* a huge page */
#define FASTBN_PAGE ((size_t) 1 << 16)      /* a page of any size that systems use */

typedef struct {
    void *data;
    size_t size; /* 0: there is none */
    size_t unmarked; /* its size, or 0 if it is marked */
} fastbn_block;

static fastbn_block fastbn_kept_blocks[FASTBN_KEPT];
static size_t fastbn_kept_unmarked; /* bytes of them all */
static char fastbn_kept_lock;

static inline size_t fastbn_rounded(size_t size) { return (size + FASTBN_ROUND - 1) / FASTBN_ROUND * FASTBN_ROUND; }

static inline int fastbn_lock_kept(void) { return !__atomic_test_and_set(&fastbn_kept_lock, __ATOMIC_ACQUIRE); }

static inline void fastbn_unlock_kept(void) { __atomic_clear(&fastbn_kept_lock, __ATOMIC_RELEASE); }

static inline size_t fastbn_block_size(const void *data) { return *(const size_t *) ((const char *) data - FASTBN_PAGE); }

static inline void fastbn_block_unmap(void *data) {
    munmap((char *) data - FASTBN_PAGE, fastbn_block_size(data) + FASTBN_PAGE);
}

/* Give all kept blocks back to the system; whether there were any. */
static int fastbn_drop_kept(void) {
    fastbn_block out[FASTBN_KEPT];
    int i, dropped = 0;
    if (!fastbn_lock_kept())
        return 0;
    memcpy(out, fastbn_kept_blocks, sizeof out);
    for (i = 0; i < FASTBN_KEPT; i++) {
        fastbn_kept_unmarked -= out[i].unmarked;
        fastbn_kept_blocks[i].size = fastbn_kept_blocks[i].unmarked = 0;
    }
    fastbn_unlock_kept();
    for (i = 0; i < FASTBN_KEPT; i++)
        if (out[i].size) {
            fastbn_block_unmap(out[i].data);
            dropped = 1;
        }
    return dropped;
}

static inline char *fastbn_map(size_t size) {
    return mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

static void *fastbn_block_take(size_t size) {
    void *data = NULL;
    int i;
    size = fastbn_rounded(size);
    if (fastbn_lock_kept()) {
        for (i = 0; i < FASTBN_KEPT && data == NULL; i++)
            if (fastbn_kept_blocks[i].size == size) {
                data = fastbn_kept_blocks[i].data;
                fastbn_kept_unmarked -= fastbn_kept_blocks[i].unmarked;
                fastbn_kept_blocks[i].size = fastbn_kept_blocks[i].unmarked = 0;
            }
        fastbn_unlock_kept();
    }
    if (data != NULL)
        return data;
    /* Mapped with room to start at a huge page, behind a page that knows the size. */
    char *start = fastbn_map(size + 2 * FASTBN_ROUND);
    if (start == MAP_FAILED && fastbn_drop_kept())
        start = fastbn_map(size + 2 * FASTBN_ROUND);
    if (start == MAP_FAILED)
        return NULL;
    char *end = start + size + 2 * FASTBN_ROUND;
    char *block = start + 2 * FASTBN_ROUND - (size_t) start % FASTBN_ROUND;
    if (block - FASTBN_PAGE > start)
        munmap(start, (size_t) (block - FASTBN_PAGE - start));
    if (block + size < end)
        munmap(block + size, (size_t) (end - block - size));
    *(size_t *) (block - FASTBN_PAGE) = size;
#ifdef MADV_HUGEPAGE
    madvise(block, size, MADV_HUGEPAGE);
#endif
    return block;
}

/* Keep a block, as it is if it can be without going beyond the bound, or marked; the oldest goes. Whether it is kept. */
static int fastbn_keep(void *data, size_t size, int marked) {
    fastbn_block out;
    size_t unmarked = marked ? 0 : size;
    int i;
    if (!fastbn_lock_kept())
        return 0;
    if (fastbn_kept_unmarked + unmarked > FASTBN_UNMARKED) {
        fastbn_unlock_kept();
        return 0;
    }
    out = fastbn_kept_blocks[FASTBN_KEPT - 1];
    for (i = FASTBN_KEPT - 1; i > 0; i--)
        fastbn_kept_blocks[i] = fastbn_kept_blocks[i - 1];
    fastbn_kept_blocks[0].data = data;
    fastbn_kept_blocks[0].size = size;
    fastbn_kept_blocks[0].unmarked = unmarked;
    fastbn_kept_unmarked += unmarked;
    fastbn_kept_unmarked -= out.unmarked;
    fastbn_unlock_kept();
    if (out.size)
        fastbn_block_unmap(out.data);
    return 1;
}

static void fastbn_block_give(void *data) {
    size_t size = fastbn_block_size(data);
    if (!fastbn_keep(data, size, 0) && (madvise(data, size, MADV_FREE) != 0 || !fastbn_keep(data, size, 1)))
        fastbn_block_unmap(data);
}

#else
#define FASTBN_HAS_BLOCKS 0
static void *fastbn_block_take(size_t size) { return NULL; }
static void fastbn_block_give(void *data) {}
static size_t fastbn_block_size(const void *data) { return 0; }
#endif

#endif
