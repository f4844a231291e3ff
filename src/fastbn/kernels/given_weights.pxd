"""Weights as they are given: where they lie, and how they are taken to a tile, each beside its value."""
from .job cimport Weights
from .kinds cimport DOUBLE, FLOAT
from .packs cimport LANES


ctypedef unsigned char mark  # of a mask: 1 where a value counts


ctypedef fused weight:
    mark
    float
    double


ctypedef fused given:
    mark
    float
    double


cdef inline const char* weights_at(const Weights* w, Py_ssize_t n, Py_ssize_t c, Py_ssize_t s) noexcept nogil:
    """Where the weight of (n, c, s) is."""
    return w.data + n // w.repeat * w.major + n % w.repeat * w.minor + c * w.channel + s * w.inner


cdef struct Walk:
    # From one outer index to the next, without the divisions of `weights_at`: they took longer than a row of 64 columns.
    const char* at
    Py_ssize_t left  # steps, this one too, until a weight repeats


cdef inline Walk walk_from(const Weights* w, Py_ssize_t n) noexcept nogil:
    cdef Walk walk
    walk.at = weights_at(w, n, 0, 0)
    walk.left = w.repeat - n % w.repeat
    return walk


cdef inline void walk_on(const Weights* w, Walk* walk) noexcept nogil:
    walk.at += w.minor
    walk.left -= 1
    if walk.left == 0:
        walk.left = w.repeat
        walk.at += w.major - w.repeat * w.minor


cdef inline mark one_of(const Weights* w, mark x) noexcept nogil:
    """A weight of one byte. Of a mask every byte but 0 is 1, as in NumPy: what was viewed as bool may hold others."""
    return x != 0 if w.marks else x


cdef inline double weight_at(const Weights* w, const char* x) noexcept nogil:
    if w.kind == DOUBLE:
        return (<const double*> x)[0]
    if w.kind == FLOAT:
        return (<const float*> x)[0]
    return one_of(w, (<const mark*> x)[0])


cdef inline void spread_by(const given* x, Py_ssize_t step, Py_ssize_t n, Py_ssize_t columns, Py_ssize_t pieces,
                           Py_ssize_t piece, mark most, weight* y) noexcept nogil:
    """n weights, so many bytes apart, each to so many columns, and to what is left of their pieces. Bytes are at most `most`."""
    cdef Py_ssize_t i, j, c
    cdef given one
    cdef weight same
    for i in range(n):
        one = (<const given*> (<const char*> x + i * step))[0]
        if given is mark:
            one = most if most < one else one
        same = <weight> one
        for j in range(pieces):
            for c in range(piece):
                y[i * columns + j * piece + c] = same


cdef inline void spread_as(const given* x, Py_ssize_t step, Py_ssize_t n, Py_ssize_t columns, mark most,
                           weight* y) noexcept nogil:
    """The same, with pieces, and mostly steps, that are constants."""
    if columns == 1 and step == 0:  # one weight
        spread_by(x, 0, 1, n, n, 1, most, y)
    elif columns == 1 and step == sizeof(given):
        spread_by(x, sizeof(given), n, 1, 1, 1, most, y)
    elif columns == 1:
        spread_by(x, step, n, 1, 1, 1, most, y)
    elif columns <= 4:
        spread_by(x, step, n, columns, 1, 4, most, y)
    elif columns <= 8:
        spread_by(x, step, n, columns, 1, 8, most, y)
    elif columns <= LANES:
        spread_by(x, step, n, columns, 1, LANES, most, y)
    else:
        spread_by(x, step, n, columns, (columns + LANES - 1) // LANES, LANES, most, y)


cdef inline void take_weights(const Weights* w, const char* x, Py_ssize_t step, Py_ssize_t n, Py_ssize_t columns,
                              weight* y) noexcept nogil:
    """n weights, so many bytes apart, to y, each to so many columns; if to more than one, y has room for LANES more."""
    cdef mark most = one_of(w, 255)
    if w.kind == DOUBLE:
        spread_as(<const double*> x, step, n, columns, most, y)
    elif w.kind == FLOAT:
        spread_as(<const float*> x, step, n, columns, most, y)
    else:
        spread_as(<const mark*> x, step, n, columns, most, y)


cdef inline void take_repeated(const Weights* w, Py_ssize_t n, Py_ssize_t count, Py_ssize_t columns, weight* y) noexcept nogil:
    """Those of so many outer indices from the n-th on."""
    cdef Py_ssize_t i = 0, steps
    cdef Walk walk
    while i < count:
        walk = walk_from(w, n + i)
        steps = min(walk.left, count - i)
        take_weights(w, walk.at, w.minor, steps, columns, y + i * columns)
        i += steps
