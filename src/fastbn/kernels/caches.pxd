"""Sizes of caches, as far as the system's word for them can be taken.

That is a core's own one. Of the last level a virtual machine reports what all its processor's cores share (320 MB, of which
32 were within reach), so its thresholds are measured ones.
"""

cdef extern from "caches.h" nogil:
    Py_ssize_t own_cache "fastbn_own_cache"  # bytes of a core's second level
    Py_ssize_t find_own_cache "fastbn_find_own_cache"()

cdef enum:
    ROOMY = 3 << 19
    LEAN = 1 << 20  # below


cdef inline bint is_roomy() noexcept nogil:
    """Whether cores have so much of their own that the last level is no faster than memory.

    On processors with 2 MB for each core the last level is spread over all of them, and one core reads from it as slowly as
    from memory (measured: 27 GB/s from 3 MB to 100 MB). So there is nothing to be had by staying within it.
    """
    return own_cache >= ROOMY


cdef inline bint is_lean() noexcept nogil:
    """Whether cores have so little of their own that much is left to the last level.

    Processors with 256 or 512 KB for each core have a last level that a few cores share and that is near to them. What one
    thread works on stays there, if all threads together take a part of it only.
    """
    return own_cache < LEAN


cdef inline bint is_middling() noexcept nogil:
    """Whether cores have neither much nor little of their own: 1 MB, beside a last level that a few cores share."""
    return not is_roomy() and not is_lean()
