"""The planar driver: the values of a channel are runs (NCHW, NCL, (C, values)).

Formula      moments and gradient sums per channel, then y = (x - mean) * gamma / sqrt(variance + epsilon) + beta or
             its gradient: see lanes.pxd and job.pxd.
Traffic      training reads x once and writes y once from memory while a channel fits the second level cache (the
             second read comes from there); where it does not, x is read twice. Inference: one read, one write.
Accuracy     a part is at most TILE values (or one image group of as many), summed in float64 relative to its first
             value; parts merge in order by Chan's formula (moments.pxd).
Parallel     over groups of neighbouring channels; where channels are few or large, over stretches of memory, once to
             sum and once to apply. Parts are cut by shape alone and every channel merges its own in order, so neither
             the threads nor the way taken change a bit.
"""
from cython cimport floating
from cython.parallel cimport prange
from cpython.exc cimport PyErr_CheckSignals
from libc.stdlib cimport free, malloc

from ._plan cimport Plan
from .job cimport Job, Operand, Operation, coefficients, load
from .lanes cimport LANES, apply_run, fence, reduce_run
from .moments cimport add, fold, from_sums, merge

cdef enum:
    TILE = 4096            # values of a part: float32 and its result fill half of a 32 KB first level cache
    GROUP = 16             # channels taken together at most
    LONG_RUN = 512         # values; shorter neighbouring runs are taken together until they reach this
    CACHED = 1 << 20       # bytes of operands that are still in the second level cache when they are read again
    STRETCH = 1 << 18      # bytes of one task where channels are cut
    WAVE = 1 << 28         # bytes between two looks for signals


cdef struct Cut:
    Py_ssize_t images      # per tile
    Py_ssize_t length      # of a tile's runs
    Py_ssize_t segments    # tiles per image where runs are longer than a tile, else 1
    Py_ssize_t tiles       # per channel
    Py_ssize_t group       # channels whose lanes are kept side by side
    Py_ssize_t span        # channels per task
    Py_ssize_t spans
    Py_ssize_t stretch     # tiles per task
    Py_ssize_t stretches
    Py_ssize_t wave        # tasks between two looks for signals
    bint fused             # one task does all of its channels


cdef Cut cut(const Job* job, Py_ssize_t itemsize) noexcept nogil:
    cdef Cut k
    cdef Py_ssize_t channel_bytes = job.outer * job.inner * itemsize * (2 if job.reads_pair else 1)
    cdef Py_ssize_t tile_bytes
    # The first four decide about parts, so they depend on the shape alone.
    k.segments = (job.inner + TILE - 1) // TILE
    k.length = (job.inner + k.segments - 1) // k.segments
    k.images = max(<Py_ssize_t> 1, TILE // k.length) if k.segments == 1 else 1
    k.tiles = (job.outer + k.images - 1) // k.images * k.segments
    k.group = max(<Py_ssize_t> 1, min(<Py_ssize_t> GROUP, LONG_RUN // job.inner))
    k.fused = (job.reduces and job.applies and channel_bytes * k.group <= CACHED
               and job.channels >= 2 * job.threads * k.group)
    tile_bytes = k.images * k.length * itemsize
    if k.fused:
        k.span = k.group
        k.stretch = k.tiles
    else:  # in the order of memory
        k.span = min(job.channels, max(k.group, STRETCH // tile_bytes // k.group * k.group))
        k.stretch = max(<Py_ssize_t> 1, STRETCH // (tile_bytes * k.span))
    k.spans = (job.channels + k.span - 1) // k.span
    k.stretches = (k.tiles + k.stretch - 1) // k.stretch
    k.wave = max(<Py_ssize_t> 1, WAVE // (tile_bytes * k.span * k.stretch))
    return k


cdef inline const floating* stage(const floating* x, Py_ssize_t stride, Py_ssize_t n, floating pad,
                                  floating* tile) noexcept nogil:
    """A run as *reduce* and *apply* want it: x itself where it is contiguous, else a copy of at least LANES values."""
    cdef Py_ssize_t i
    if stride == 1 and n >= LANES:
        return x
    for i in range(n):
        tile[i] = x[i * stride]
    for i in range(n, LANES):
        tile[i] = pad
    return tile


cdef inline void reduce_any(const Job* job, const floating* u, const floating* v, Py_ssize_t n, double p, double q,
                            double* first, double* second, floating* tile) noexcept nogil:
    """A run of any stride and length into the lanes. Padding adds nothing: it is p, which *reduce* subtracts."""
    u = stage(u, job.u.inner, n, <floating> p, tile)
    if job.reads_pair:
        v = stage(v, job.v.inner, n, 0, tile + TILE)
        reduce_run(u, v, max(n, <Py_ssize_t> LANES), p, q, True, first, second)
    else:
        reduce_run(u, u, max(n, <Py_ssize_t> LANES), p, p, False, first, second)


cdef inline void apply_any(const Job* job, const floating* u, const floating* v, floating* y, Py_ssize_t n,
                           floating p, floating a, floating c, floating q, floating b, floating* tile) noexcept nogil:
    cdef bint direct = job.y.inner == 1 and n >= LANES
    cdef floating* z = y if direct else tile + 2 * TILE
    cdef Py_ssize_t i
    u = stage(u, job.u.inner, n, 0, tile)
    if job.writes_pair:
        v = stage(v, job.v.inner, n, 0, tile + TILE)
        if job.streams and direct:
            apply_run(u, v, z, n, p, a, c, q, b, True, True)
        else:
            apply_run(u, v, z, max(n, <Py_ssize_t> LANES), p, a, c, q, b, True, False)
    elif job.streams and direct:
        apply_run(u, u, z, n, p, a, c, q, b, False, True)
    else:
        apply_run(u, u, z, max(n, <Py_ssize_t> LANES), p, a, c, q, b, False, False)
    if not direct:
        for i in range(n):
            y[i * job.y.inner] = z[i]


cdef inline floating* at(const Operand* operand, Py_ssize_t n, Py_ssize_t c, Py_ssize_t s, floating* typed) noexcept nogil:
    """Where (n, c, s) is; typed only names the type."""
    return <floating*> operand.data + n * operand.outer + c * operand.channel + s * operand.inner


cdef void reduce_tile(const Job* job, const Cut* k, Py_ssize_t tile, Py_ssize_t c0, Py_ssize_t c1, double* parts,
                      floating* buffer) noexcept nogil:
    """One tile of channels c0..c1 to its parts, lying as [channel][tile](first, second)."""
    cdef double first[GROUP * LANES]
    cdef double second[GROUP * LANES]
    cdef double p[GROUP]
    cdef double q[GROUP]
    cdef double* part
    cdef Py_ssize_t n0 = tile // k.segments * k.images
    cdef Py_ssize_t n1 = min(n0 + k.images, job.outer)
    cdef Py_ssize_t s0 = tile % k.segments * k.length
    cdef Py_ssize_t s1 = min(s0 + k.length, job.inner)
    cdef Py_ssize_t c, n, j
    for c in range(c1 - c0):
        if job.reads_pair:
            p[c] = 0
            q[c] = load(&job.mean, c0 + c, 0)
        else:
            p[c] = at(&job.u, n0, c0 + c, s0, buffer)[0]
            q[c] = p[c]
        for j in range(c * LANES, (c + 1) * LANES):
            first[j] = 0
            second[j] = 0
    for n in range(n0, n1):
        for c in range(c1 - c0):
            reduce_any(job, at(&job.u, n, c0 + c, s0, buffer), at(&job.v, n, c0 + c, s0, buffer), s1 - s0, p[c],
                           q[c], first + c * LANES, second + c * LANES, buffer)
    for c in range(c1 - c0):
        part = parts + ((c0 + c) * k.tiles + tile) * 2
        part[0] = fold(first + c * LANES)
        part[1] = fold(second + c * LANES)
        if not job.reads_pair:
            from_sums(p[c], (n1 - n0) * (s1 - s0), part, part + 1)


cdef void merge_channel(const Job* job, const Cut* k, Py_ssize_t c, const double* parts) noexcept nogil:
    """The parts of a channel, in order, to job.first[c] and job.second[c]."""
    cdef const double* part = parts + c * k.tiles * 2
    cdef Py_ssize_t tile, images, length
    cdef double count, done
    job.first[c] = part[0]
    job.second[c] = part[1]
    done = min(k.images, job.outer) * k.length
    for tile in range(1, k.tiles):
        part += 2
        if job.reads_pair:
            add(job.first + c, job.second + c, part, part + 1, 1)
        else:
            images = min(k.images, job.outer - tile // k.segments * k.images)
            length = min(k.length, job.inner - tile % k.segments * k.length)
            count = images * length
            merge(done, job.first + c, job.second + c, count, part, part + 1, 1)
            done += count


cdef void apply_tiles(const Job* job, const Cut* k, Py_ssize_t t0, Py_ssize_t t1, Py_ssize_t c0, Py_ssize_t c1,
                      floating* buffer) noexcept nogil:
    cdef floating p[GROUP]
    cdef floating a[GROUP]
    cdef floating shift[GROUP]
    cdef floating q[GROUP]
    cdef floating b[GROUP]
    cdef Py_ssize_t c, n, n0, s0, length, tile
    for c in range(c1 - c0):
        coefficients(job, c0 + c, p + c, a + c, shift + c, q + c, b + c)
    for tile in range(t0, t1):
        n0 = tile // k.segments * k.images
        s0 = tile % k.segments * k.length
        length = min(k.length, job.inner - s0)
        for n in range(n0, min(n0 + k.images, job.outer)):
            for c in range(c1 - c0):
                apply_any(job, at(&job.u, n, c0 + c, s0, buffer), at(&job.v, n, c0 + c, s0, buffer),
                              at(&job.y, n, c0 + c, s0, buffer), length, p[c], a[c], shift[c], q[c], b[c], buffer)


cdef enum Step:
    REDUCE
    APPLY
    BOTH


cdef void do_task(const Job* job, const Cut* k, Step step, Py_ssize_t task, double* parts, floating* typed) noexcept nogil:
    """One span of channels along one stretch of tiles."""
    cdef floating buffer[3 * TILE]
    cdef Py_ssize_t begin = task % k.spans * k.span
    cdef Py_ssize_t end = min(begin + k.span, job.channels)
    cdef Py_ssize_t t0 = task // k.spans * k.stretch
    cdef Py_ssize_t t1 = min(t0 + k.stretch, k.tiles)
    cdef Py_ssize_t t, c, g, groups = (end - begin + k.group - 1) // k.group
    if step != APPLY:
        for t in range(t0, t1):
            for g in range(groups):
                c = begin + g * k.group
                reduce_tile(job, k, t, c, min(c + k.group, end), parts, buffer)
    if step == BOTH:
        for c in range(begin, end):
            merge_channel(job, k, c, parts)
        apply_tiles(job, k, t0, t1, begin, end, buffer)
    if step == APPLY:
        for t in range(t0, t1):
            for g in range(groups):
                c = begin + g * k.group
                apply_tiles(job, k, t, t + 1, c, min(c + k.group, end), buffer)
    if step != REDUCE and job.streams:
        fence()


cdef int do_step(const Job* job, const Cut* k, Step step, double* parts, floating* typed) except -1:
    """All tasks of a step, in waves, looking for signals in between."""
    cdef Py_ssize_t tasks = k.spans * k.stretches, begin = 0, end, task
    cdef int threads = job.threads
    while begin < tasks:
        end = min(begin + k.wave, tasks)
        for task in prange(begin, end, nogil=True, schedule="static", num_threads=threads):
            do_task(job, k, step, task, parts, typed)
        begin = end
        if begin < tasks:
            PyErr_CheckSignals()
    return 0


cdef int do_job(const Job* job, floating* typed) except -1:
    cdef Cut k = cut(job, sizeof(floating))
    cdef Py_ssize_t c
    cdef int threads = job.threads
    cdef double* parts = NULL
    if job.reduces:
        parts = <double*> malloc(job.channels * k.tiles * 2 * sizeof(double))
        if parts == NULL:
            raise MemoryError
    try:
        if k.fused:
            do_step(job, &k, BOTH, parts, typed)
            return 0
        if job.reduces:
            do_step(job, &k, REDUCE, parts, typed)
            for c in prange(job.channels, nogil=True, schedule="static", num_threads=threads):
                merge_channel(job, &k, c, parts)
        if job.applies:
            do_step(job, &k, APPLY, parts, typed)
        return 0
    finally:
        free(parts)


def run(Plan plan, int operation, u, v, y, gamma, beta, mean, variance, double epsilon, first, second, int threads):
    """Carry out a plan. Every array was checked; those an operation does not use are None."""
    cdef Job job
    plan.bind(&job, <Operation> operation, u, v, y, gamma, beta, mean, variance, epsilon, first, second, threads)
    if plan.wide:
        do_job(&job, <double*> NULL)
    else:
        do_job(&job, <float*> NULL)
