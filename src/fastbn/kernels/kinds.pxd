"""Types of values in memory."""

cdef extern from "convert.h" nogil:
    enum:
        FLOAT "FASTBN_FLOAT"
        DOUBLE "FASTBN_DOUBLE"
        # What follows is computed in float.
        HALF "FASTBN_HALF"
        BFLOAT "FASTBN_BFLOAT"
        # What follows is never written: results are float.
        UINT8 "FASTBN_UINT8"
        INT8 "FASTBN_INT8"


cdef inline Py_ssize_t size_of(int kind) noexcept nogil:
    """Bytes of a value."""
    return 8 if kind == DOUBLE else 4 if kind == FLOAT else 1 if kind >= UINT8 else 2
