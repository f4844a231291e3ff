cdef extern from "scratch.h" nogil:
    void* scratch_take "fastbn_scratch_take"(size_t size)
    void scratch_give "fastbn_scratch_give"(void* data, size_t size)  # of the size it was taken with; NULL is nothing
