from .job cimport Job

cdef int carry_out(Job* job, bint wide, threads, Py_ssize_t serial) except -1
