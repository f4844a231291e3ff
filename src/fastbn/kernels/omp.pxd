# The only file where OpenMP symbols appear. Kernels cimport from here and need no #ifdef: a build without
# OpenMP gets constants that describe one thread. Macros rather than static functions, so that a module that
# uses only some of them is free of unused-function warnings with every compiler.

cdef extern from *:
    """
    #ifdef _OPENMP
    #include <omp.h>
    #define FASTBN_OPENMP_VERSION _OPENMP
    #else
    #define FASTBN_OPENMP_VERSION 0
    #define omp_get_max_threads() 1
    #define omp_get_num_procs() 1
    #define omp_get_num_threads() 1
    #define omp_get_thread_num() 0
    #define omp_in_parallel() 0
    #endif
    """
    const int openmp_version "FASTBN_OPENMP_VERSION"  # date of the specification (yyyymm), 0 without OpenMP
    int omp_get_max_threads() noexcept nogil
    int omp_get_num_procs() noexcept nogil
    int omp_get_num_threads() noexcept nogil
    int omp_get_thread_num() noexcept nogil
    int omp_in_parallel() noexcept nogil
