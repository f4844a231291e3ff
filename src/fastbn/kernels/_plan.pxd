from .job cimport Job, Operation, Parameter


cdef enum Pattern:
    PLANAR
    INTERLEAVED


cdef class Plan:
    cdef readonly Py_ssize_t outer, channels, inner
    cdef readonly bint wide
    cdef readonly Pattern pattern
    cdef Py_ssize_t[3] u_strides
    cdef Py_ssize_t[3] v_strides
    cdef Py_ssize_t[3] y_strides

    cdef int bind(self, Job* job, Operation operation, u, v, y, gamma, beta, mean, variance, double epsilon,
                  first, second, int threads) except -1


cdef int bind_parameter(Parameter* parameter, array) except -1
