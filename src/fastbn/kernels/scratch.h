/* Memory of a call beside its arrays: what is large is kept for the next one.
 *
 * malloc gives large blocks back to the system when they are freed, and the pages of the next one are cleared anew, one
 * fault after the other: for some rows of very many channels that took longer than the call. Nobody waits here: who finds
 * the kept blocks in use goes to malloc, so a process that forks at such a moment loses nothing but them.
 */
#ifndef FASTBN_SCRATCH_H
#define FASTBN_SCRATCH_H

#include <stddef.h>
#include <stdlib.h>

#define FASTBN_KEPT 1
#define FASTBN_UNMARKED ((size_t) 1 << 26)
#include "blocks.h"

#if defined(__GNUC__)
#define FASTBN_SCRATCH_LEAST ((size_t) 1 << 17) /* bytes: less, malloc keeps by itself */
#define FASTBN_SCRATCH_MOST ((size_t) 1 << 22)  /* more belongs to so many values that the faults do not matter, */
#define FASTBN_SCRATCH_BLOCK ((size_t) 1 << 25) /* unless it is beyond what malloc keeps, and as large as x: a block */
#define FASTBN_SCRATCH_KEPT 4

static struct {
    void *data;
    size_t size;
} fastbn_scratch_kept[FASTBN_SCRATCH_KEPT];
static char fastbn_scratch_lock;

static void *fastbn_scratch_take(size_t size) {
    void *data = NULL;
    if (FASTBN_HAS_BLOCKS && size >= FASTBN_SCRATCH_BLOCK) return fastbn_block_take(size);
    if (size >= FASTBN_SCRATCH_LEAST && size <= FASTBN_SCRATCH_MOST
        && !__atomic_test_and_set(&fastbn_scratch_lock, __ATOMIC_ACQUIRE)) {
        for (int i = 0; i < FASTBN_SCRATCH_KEPT && data == NULL; i++)
            if (fastbn_scratch_kept[i].size == size) {
                data = fastbn_scratch_kept[i].data;
                fastbn_scratch_kept[i].data = NULL;
                fastbn_scratch_kept[i].size = 0;
            }
        __atomic_clear(&fastbn_scratch_lock, __ATOMIC_RELEASE);
    }
    return data != NULL ? data : malloc(size);
}

/* Of the size it was taken with. */
static void fastbn_scratch_give(void *data, size_t size) {
    if (FASTBN_HAS_BLOCKS && size >= FASTBN_SCRATCH_BLOCK) {
        if (data != NULL) fastbn_block_give(data);
        return;
    }
    if (data != NULL && size >= FASTBN_SCRATCH_LEAST && size <= FASTBN_SCRATCH_MOST
        && !__atomic_test_and_set(&fastbn_scratch_lock, __ATOMIC_ACQUIRE)) {
        void *oldest = fastbn_scratch_kept[FASTBN_SCRATCH_KEPT - 1].data;
        for (int i = FASTBN_SCRATCH_KEPT - 1; i > 0; i--) fastbn_scratch_kept[i] = fastbn_scratch_kept[i - 1];
        fastbn_scratch_kept[0].data = data;
        fastbn_scratch_kept[0].size = size;
        __atomic_clear(&fastbn_scratch_lock, __ATOMIC_RELEASE);
        data = oldest;
    }
    free(data);
}
#else
static void *fastbn_scratch_take(size_t size) { return malloc(size); }
static void fastbn_scratch_give(void *data, size_t size) {
    (void) size;
    free(data);
}
#endif

#endif
