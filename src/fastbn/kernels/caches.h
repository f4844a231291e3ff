/* What the ways of walking memory depend on beside shapes, and bits never do. */
#ifndef FASTBN_CACHES_H
#define FASTBN_CACHES_H

#include <stddef.h>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

#define FASTBN_OWN_LEAST ((ptrdiff_t) 1 << 18)
#define FASTBN_OWN_MOST ((ptrdiff_t) 1 << 21) /* more is shared by several cores, and was not measured */

/* Bytes of a core's own cache, its second level. A driver is told when it is imported; until then what most servers have. */
static ptrdiff_t fastbn_own_cache = (ptrdiff_t) 1 << 20;

/* What the system says of it, within reason; what most servers have where it says nothing. Asking takes long in a virtual
 * machine, so it is done once. */
static inline ptrdiff_t fastbn_find_own_cache(void) {
#ifdef _SC_LEVEL2_CACHE_SIZE
    ptrdiff_t size = (ptrdiff_t) sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (size > 0)
        return size < FASTBN_OWN_LEAST ? FASTBN_OWN_LEAST : size > FASTBN_OWN_MOST ? FASTBN_OWN_MOST : size;
#endif
    return (ptrdiff_t) 1 << 20;
}

#endif
