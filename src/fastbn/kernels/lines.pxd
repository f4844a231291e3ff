"""Lines of the caches: tiles that lie well in them, and results that are stored past them in whole ones."""
from cython cimport floating

from .packs cimport prefetch

cdef extern from "lanes.h" nogil:
    enum:
        LINE "FASTBN_LINE"  # bytes
    ctypedef struct line "fastbn_line":  # what is left of one
        Py_ssize_t n
    void stream_lines "fastbn_stream_lines"(line* rest, char* y, const char* x, Py_ssize_t n)
    void end_line "fastbn_end_line"(line* rest)
    void fence "fastbn_fence"()

cdef enum:
    GATHERED = 512  # values of results that are put together to store lines whole
    PAGE = 4096     # bytes of a page


cdef inline Py_ssize_t in_line(const char* x) noexcept nogil:
    """Bytes from the beginning of a line to x."""
    return <Py_ssize_t> (<size_t> x % LINE)


cdef inline floating* aligned(floating* buffer) noexcept nogil:
    """The first of the next LANES places of a buffer at which no pack will lie in two lines of a cache."""
    return <floating*> ((<size_t> buffer + LINE - 1) // LINE * LINE)


cdef inline Py_ssize_t away(const char* tile, const char* u, const char* y) noexcept nogil:
    """Bytes, in whole lines and less than a page, to where a tile is far from u and y within a page.

    Loads wait for stores to the same place of another page that were not carried out yet: where the stack happened to lie,
    passes took twice as long.
    """
    cdef Py_ssize_t d = <Py_ssize_t> (<size_t> (y - u) % PAGE)
    d = d // 2 if d > PAGE // 2 else (d + PAGE) // 2  # the middle of the longer way from one to the other
    return <Py_ssize_t> (<size_t> (u + d - tile) % PAGE) // LINE * LINE


cdef inline void fetch_lines(const char* x, Py_ssize_t bytes) noexcept nogil:
    """Fetch a stretch of memory to a first level cache."""
    cdef Py_ssize_t i = 0
    while i < bytes:
        prefetch(x + i)
        i += LINE
