"""What the OpenMP runtime says, for Python. The policy built on it is in `fastbn.threads`."""

from .omp cimport omp_get_max_threads, omp_get_num_procs, omp_in_parallel
from .omp cimport openmp_version as _openmp_version


def openmp_version():
    """Return the date of the OpenMP specification the kernels were built with (yyyymm), 0 without OpenMP."""
    return _openmp_version


def max_threads():
    """Return the size of the team that the calling thread may start now; threadpoolctl's limits change it."""
    return omp_get_max_threads()


def num_procs():
    """Return how many processors the OpenMP runtime sees."""
    return omp_get_num_procs()


def in_parallel():
    """Return True inside an active parallel region."""
    return omp_in_parallel() != 0
