"""Where results live: large ones in blocks that are kept for the next call (blocks.h), through NumPy's allocator hooks."""
from cpython.pycapsule cimport PyCapsule_New
from cpython.ref cimport Py_INCREF
from libc.string cimport memcpy, memset, strcpy

cimport numpy as cnp

cnp.import_array()

cdef extern from "blocks.h" nogil:
    const bint HAS_BLOCKS "FASTBN_HAS_BLOCKS"
    void* block_take "fastbn_block_take"(size_t size)
    void block_give "fastbn_block_give"(void* data)
    size_t block_size "fastbn_block_size"(const void* data)

cdef extern from "numpy/ndarrayobject.h":
    ctypedef struct Allocator "PyDataMemAllocator":
        void* ctx
        void* (*malloc)(void* ctx, size_t size) noexcept nogil
        void* (*calloc)(void* ctx, size_t count, size_t size) noexcept nogil
        void* (*realloc)(void* ctx, void* data, size_t size) noexcept nogil
        void (*free)(void* ctx, void* data, size_t size) noexcept nogil

    ctypedef struct Handler "PyDataMem_Handler":
        char name[127]
        unsigned char version
        Allocator allocator

    object set_handler "PyDataMem_SetHandler"(object handler)
    object new_like "PyArray_NewLikeArray"(cnp.ndarray prototype, cnp.NPY_ORDER order, void* dtype, int subok)

cdef enum:
    LARGE = 1 << 24  # bytes: less, malloc keeps by itself, so that its pages need not be faulted in again


cdef void* take(void* ctx, size_t size) noexcept nogil:
    return block_take(size)


cdef void* take_zeros(void* ctx, size_t count, size_t size) noexcept nogil:
    cdef void* data = block_take(count * size)
    if data != NULL:
        memset(data, 0, count * size)
    return data


cdef void* resize(void* ctx, void* data, size_t size) noexcept nogil:
    cdef void* other = block_take(size)
    if other != NULL:
        memcpy(other, data, min(size, block_size(data)))
        block_give(data)
    return other


cdef void give(void* ctx, void* data, size_t size) noexcept nogil:
    block_give(data)


cdef Handler handler
strcpy(handler.name, b"fastbn blocks")
handler.version = 1
handler.allocator.ctx = NULL
handler.allocator.malloc = take
handler.allocator.calloc = take_zeros
handler.allocator.realloc = resize
handler.allocator.free = give

cdef object capsule = PyCapsule_New(<void*> &handler, "mem_handler", NULL)


cpdef empty_like(cnp.ndarray x, cnp.dtype dtype=None):
    """An uninitialized ndarray of x's shape and order of axes in memory, and of its type if none is given."""
    cdef Py_ssize_t size = cnp.PyArray_SIZE(x) * (cnp.PyArray_ITEMSIZE(x) if dtype is None else dtype.itemsize)
    if not HAS_BLOCKS or size < LARGE:
        return new_as(x, dtype)
    before = set_handler(capsule)
    try:
        return new_as(x, dtype)
    finally:
        set_handler(before)


cdef inline object new_as(cnp.ndarray x, cnp.dtype dtype):
    if dtype is None:
        return new_like(x, cnp.NPY_KEEPORDER, NULL, 0)
    Py_INCREF(dtype)  # the call takes a reference over
    return new_like(x, cnp.NPY_KEEPORDER, <void*> dtype, 0)
