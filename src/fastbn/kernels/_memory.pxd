cimport numpy as cnp

cpdef empty_like(cnp.ndarray x, cnp.dtype dtype=*)
