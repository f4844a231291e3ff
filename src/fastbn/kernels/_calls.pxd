from .job cimport Job

cdef int carry_out(Job* job, bint wide, threads, Py_ssize_t serial) except -1
cdef int train(Job* job, bint wide, threads, Py_ssize_t serial, int ddof, double share) except -1
