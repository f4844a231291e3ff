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
from cpython.pycapsule cimport PyCapsule_New
from libc.math cimport NAN
from libc.string cimport memset

from ._plan cimport Plan, bind_weights
from .channels cimport coefficients, load, settle
from .convert cimport DOUBLE, FLOAT, give, is_native, take
from .job cimport (
    DONE, DRIVER, INTERRUPTED, NO_MEMORY, UNFIT, Job, Operand, Operation, behind_gate, channels_of, finish, gate_of,
    is_interrupted,
)
from .lanes cimport PRESENT, WEIGHTED, apply_runs, reduce_runs
from .lines cimport GATHERED, aligned, away, end_line, fence, line, stream_lines
from .marks cimport keep_run
from .moments cimport CANCELLED, add, fold, from_sums, is_far, merge
from .packs cimport ABREAST, LANES
from .planar_cut cimport GROUP, IMAGES, SMALL_RUN, TILE, WAVE, Cut, Span, cut, shares_lines, span_of
from .scratch cimport scratch_give, scratch_take
from .weights cimport (
    are_finite, choose, fits, from_weighted_sums, hide, larger, largest_of, mark, merge_weighted, take_weights, weigh_run,
    weight, weight_at, weights_at,
)

cdef inline bint ready(const Operand* operand, Py_ssize_t n, const floating* typed) noexcept nogil:
    """Whether a run needs no staging; typed only names the type."""
    return operand.inner == sizeof(floating) and n >= LANES and is_native(operand)


cdef inline bint all_ready(const Job* job, Py_ssize_t n, const floating* typed) noexcept nogil:
    """Whether no run that *apply* is about needs staging."""
    return (ready(&job.u, n, typed) and ready(&job.y, n, typed) and (not job.writes_pair or ready(&job.v, n, typed))
            and (not job.form.third or ready(&job.w, n, typed)))


cdef inline const floating* stage(const Operand* operand, const char* x, Py_ssize_t n, floating pad,
                                  floating* tile) noexcept nogil:
    """A run as *reduce* and *apply* want it: x itself where it is that, else a copy of at least LANES values."""
    cdef Py_ssize_t i
    if ready(operand, n, tile):
        return <const floating*> x
    take(operand, x, operand.inner, n, tile, 1)
    for i in range(n, LANES):
        tile[i] = pad
    return tile


cdef inline void reduce_any(const Job* job, bint direct, const char* x, const char* x2, Py_ssize_t channels,
                            Py_ssize_t runs, Py_ssize_t n, const double* p, const double* q, bint shifted, bint abreast,
                            Py_ssize_t next_u, Py_ssize_t next_v, bint begins, double* first, double* second,
                            floating* tile) noexcept nogil:
    """A run of any form, or those of several channels and images that need no staging, into the lanes.

    They begin with it, or are added to. Padding adds nothing: it is p, which *reduce* subtracts, or 0.
    """
    cdef const floating* u = <const floating*> x
    cdef const floating* v = <const floating*> x2
    cdef Py_ssize_t size = sizeof(floating), su = job.u.outer // size, sv = job.v.outer // size
    cdef Py_ssize_t cu = job.u.channel // size, cv = job.v.channel // size
    next_u //= size
    next_v //= size
    if not direct:
        u = stage(&job.u, x, n, <floating> p[0], tile)
        if job.reads_pair:
            v = stage(&job.v, x2, n, 0, tile + TILE)
        n = max(n, <Py_ssize_t> LANES)
    if shifted:
        if job.reads_pair and job.omits:
            reduce_runs(u, cu, su, v, cv, sv, channels, runs, n, p, q, True, True, True, abreast, next_u, next_v,
                        begins, first, second)
        elif job.reads_pair:
            reduce_runs(u, cu, su, v, cv, sv, channels, runs, n, p, q, True, True, False, abreast, next_u, next_v,
                        begins, first, second)
        else:
            reduce_runs(u, cu, su, u, cu, su, channels, runs, n, p, p, False, True, False, abreast, next_u, next_v,
                        begins, first, second)
    elif floating is float:
        if job.reads_pair:
            reduce_runs(u, cu, su, v, cv, sv, channels, runs, n, p, q, True, False, False, abreast, next_u, next_v,
                        begins, first, second)
        else:
            reduce_runs(u, cu, su, u, cu, su, channels, runs, n, p, p, False, False, False, abreast, next_u, next_v,
                        begins, first, second)


cdef inline void apply_any(const Job* job, bint direct, const char* x, const char* x2, const char* x3, char* y,
                           Py_ssize_t runs, Py_ssize_t n, const floating* table, Py_ssize_t channels,
                           floating* tile) noexcept nogil:
    """A run of any form, or those of several channels that need no staging; the table starts at the first one's column."""
    cdef const floating* u = <const floating*> x
    cdef const floating* v = <const floating*> x2
    cdef const floating* w = <const floating*> x3
    cdef floating* z = <floating*> y
    cdef Py_ssize_t m = n, size = sizeof(floating)
    cdef bint unstaged = direct
    if not direct:
        u = stage(&job.u, x, n, 0, tile)
        if job.writes_pair:
            v = stage(&job.v, x2, n, 0, tile + TILE)
        if job.form.third:
            w = stage(&job.w, x3, n, 0, tile + 2 * TILE)
        unstaged = ready(&job.y, n, tile)
        if not unstaged:
            z = tile  # over a staged u
            m = max(n, <Py_ssize_t> LANES)
    apply_runs(u, job.u.channel // size, v, job.v.channel // size, w, job.w.channel // size, z, job.y.channel // size,
               runs, m, table, channels, &job.form, job.streams and unstaged)
    if not unstaged:
        give(&job.y, z, 1, n, y, job.y.inner)


cdef void gate_runs(const Job* gate, bint direct, const char* dy, const char* v, const char* w, char* g,
                    Py_ssize_t runs, Py_ssize_t n, const floating* gates, floating* tile) noexcept nogil:
    """Runs of dy times the derivative of the activation. Not inline: it would cost the calls beside it theirs."""
    apply_any(gate, direct, dy, v, w, g, runs, n, gates, gate.channels, tile)


cdef inline char* at(const Operand* operand, Py_ssize_t n, Py_ssize_t c, Py_ssize_t s) noexcept nogil:
    """Where (n, c, s) is."""
    return operand.data + n * operand.outer + c * operand.channel + s * operand.inner


cdef inline Operand in_tile(Py_ssize_t length, const floating* typed) noexcept nogil:
    """The operand that runs of that length are when they lie side by side in a tile."""
    cdef Operand o
    o.data = NULL
    o.kind = FLOAT if floating is float else DOUBLE
    o.size = o.inner = sizeof(floating)
    o.outer, o.channel = 0, length * o.size
    return o


cdef inline Operand staged(const Operand* operand, Py_ssize_t length, const floating* typed) noexcept nogil:
    """The operand that neighbouring runs become when they are converted together; native ones stay."""
    return operand[0] if is_native(operand) else in_tile(length, typed)


cdef inline Py_ssize_t side_by_side(const Operand* operand, Py_ssize_t length) noexcept nogil:
    """How many channels' runs of that length can be converted at once; 0 where the values of a run are apart."""
    if is_native(operand):
        return GROUP if operand.inner == operand.size and length >= LANES else 0
    if operand.inner != operand.size or length < LANES:
        return 0
    return max(<Py_ssize_t> 1, TILE // length) if operand.channel == length * operand.size else 1


cdef inline const char* convert(const Operand* operand, const char* x, Py_ssize_t n, floating* tile) noexcept nogil:
    """Where n values that lie side by side are in the type of arithmetic: in the tile, or where they were."""
    if is_native(operand):
        return x
    take(operand, x, operand.size, n, tile, 1)
    return <const char*> tile


cdef inline void put_parts(const Cut* k, Py_ssize_t tile, Py_ssize_t c0, Py_ssize_t c1, const double* first,
                           const double* second, double* parts) noexcept nogil:
    """The lanes of channels c0..c1 to their parts, lying as [channel][tile](first, second)."""
    cdef double* part
    cdef Py_ssize_t c
    for c in range(c1 - c0):
        part = parts + ((c0 + c) * k.tiles + tile) * 2
        part[0] = fold(first + c * LANES)
        part[1] = fold(second + c * LANES)


cdef void sum_tile(const Job* job, const Cut* k, Py_ssize_t tile, Py_ssize_t c0, Py_ssize_t c1, const double* p,
                   const double* q, bint shifted, double* parts, const floating* gates, floating* buffer) noexcept nogil:
    """Both sums of one tile of channels c0..c1 to their parts."""
    cdef double sums[(2 * GROUP + 1) * LANES]
    cdef double* first = aligned(<double*> sums)
    cdef double* second = first + GROUP * LANES
    cdef Span t = span_of(job, k, tile)
    cdef Job near = job[0]
    cdef Job gate
    cdef Py_ssize_t together = c1 - c0
    cdef bint converts = not is_native(&job.u) or (job.reads_pair and not is_native(&job.v))
    cdef bint direct, gate_direct = False
    cdef const char* u
    cdef const char* v
    cdef const char* w
    cdef char* g
    cdef floating* scratch = buffer + 3 * TILE if job.gated else buffer
    cdef Py_ssize_t c, n, i, m, several, at_once = 1, next_u, next_v, step_u, images, most = 1
    if converts:
        together = side_by_side(&job.u, t.length)
        if job.reads_pair:
            together = min(together, side_by_side(&job.v, t.length))
        converts = together > 0
        together = max(together, <Py_ssize_t> 1)
    if converts:
        near.u = staged(&job.u, t.length, buffer)
        near.v = staged(&job.v, t.length, buffer)
    step_u = near.u.channel
    if job.gated:
        gate = gate_of(&near)
        if gate.y.data == NULL:
            gate.y = in_tile(t.length, buffer)
        gate_direct = all_ready(&gate, t.length, buffer)
        near.u = gate.y
    direct = ready(&near.u, t.length, buffer) and (not job.reads_pair or ready(&near.v, t.length, buffer))
    if direct and not converts and not job.gated and t.length < SMALL_RUN:
        most = IMAGES
    if direct and (not job.gated or gate_direct):
        at_once = c1 - c0 if not job.gated or job.kept.data != NULL else max(<Py_ssize_t> 1, TILE // t.length)
    n = t.n0
    while n < t.n1:
        images = min(most, t.n1 - n)
        c = 0
        while c < c1 - c0:
            m = min(c1 - c0 - c, together)
            u = at(&job.u, n, c0 + c, t.s0)
            v = at(&job.v, n, c0 + c, t.s0)
            if converts:
                u = convert(&job.u, u, m * t.length, buffer)
                if job.reads_pair:
                    v = convert(&job.v, v, m * t.length, buffer + TILE)
            next_u, next_v = (step_u, near.v.channel) if k.fetches else (<Py_ssize_t> 0, <Py_ssize_t> 0)
            i = c
            while i < c + m:
                several = min(c + m - i, at_once)
                if k.fetches and i + several == c1 - c0:
                    # After the last channel comes the first of another image.
                    if several > 1:
                        several -= 1
                    else:
                        next_u, next_v = job.u.outer - i * step_u, near.v.outer - i * near.v.channel
                g = <char*> u
                if job.gated:
                    w = at(&job.w, n, c0 + i, t.s0)
                    g = <char*> (buffer + 2 * TILE)
                    if job.kept.data != NULL:
                        g = at(&job.kept, n, c0 + i, t.s0)
                    gate_runs(&gate, gate_direct, u, w if job.by_output else v, w, g, several, t.length, gates + c0 + i,
                              scratch)
                reduce_any(&near, direct, g, v, several, images, t.length, p + i, q + i, shifted, k.abreast, next_u + (u - g),
                           next_v, n == t.n0, first + i * LANES, second + i * LANES, scratch)
                u += several * step_u
                v += several * near.v.channel
                i += several
            c += m
        n += images
    put_parts(k, tile, c0, c1, first, second, parts)


include "_planar_weights.pxi"


cdef void reduce_tile(const Job* job, const Cut* k, Py_ssize_t tile, Py_ssize_t c0, Py_ssize_t c1, double* parts,
                      const floating* gates, floating* buffer) noexcept nogil:
    """One tile of channels c0..c1 to its parts."""
    cdef double p[GROUP]
    cdef double q[GROUP]
    cdef double* part
    cdef double squares
    cdef Job behind
    cdef const Job* rest = job
    cdef Span t = span_of(job, k, tile)
    cdef double count = (t.n1 - t.n0) * t.length
    cdef Py_ssize_t c
    if job.weighs and not job.reads_pair:
        count_parts(job, k, tile, c0, c1, parts, buffer)
        return
    for c in range(c1 - c0):
        p[c] = 0
        q[c] = load(&job.mean, c0 + c, 0) if job.reads_pair else 0
        if floating is double and not job.reads_pair:
            p[c] = (<floating*> at(&job.u, t.n0, c0 + c, t.s0))[0]
    if job.omits:  # there is NaN: without looking for it all sums would be found again
        if job.weights.data != NULL:
            hide_tile(job, k, tile, c0, c1, q, parts, buffer)
        else:
            sum_tile(job, k, tile, c0, c1, p, q, True, parts, gates, buffer)
        return
    sum_tile(job, k, tile, c0, c1, p, q, floating is double, parts, gates, buffer)
    if job.gated and job.kept.data != NULL:
        behind = behind_gate(job)
        rest = &behind
    for c in range(c1 - c0):
        part = parts + ((c0 + c) * k.tiles + tile) * 2
        squares = part[1]
        if not job.reads_pair:
            from_sums(p[c], count, part, part + 1)
        if floating is float:
            if not job.reads_pair:
                if part[1] * CANCELLED < squares:
                    p[c] = <float> part[0]
                    sum_tile(rest, k, tile, c0 + c, c0 + c + 1, p + c, p + c, True, parts, gates, buffer)
                    from_sums(p[c], count, part, part + 1)
            elif is_far(q[c], load(&job.variance, c0 + c, 1)):
                sum_tile(rest, k, tile, c0 + c, c0 + c + 1, p + c, q + c, True, parts, gates, buffer)
            else:
                part[1] -= q[c] * part[0]
        if job.weighs and not are_finite(part[0], part[1]):
            hide_tile(job, k, tile, c0 + c, c0 + c + 1, q + c, parts, buffer)


cdef inline void merge_channel(const Job* job, const Cut* k, Py_ssize_t c, double* parts) noexcept nogil:
    cdef const double* part = parts + c * k.tiles * 2
    cdef Py_ssize_t tile, images, length
    cdef double count, done
    if job.weighs and not job.reads_pair:
        merge_weighted_channel(job, k, c, parts)
        return
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


cdef void merge_channels(const Job* job, const Cut* k, Py_ssize_t c0, Py_ssize_t c1, double* parts) noexcept nogil:
    """The parts of channels c0..c1, in order, to job.first and job.second."""
    cdef Py_ssize_t c
    for c in range(c0, c1):
        merge_channel(job, k, c, parts)


include "_planar_results.pxi"


cdef enum Step:
    REDUCE
    APPLY
    BOTH  # what was summed is applied while it is in a cache


cdef void reduce_segments(const Job* job, const Cut* k, Py_ssize_t tile, Py_ssize_t count, Py_ssize_t c, double* parts,
                          floating* buffer) noexcept nogil:
    """Tiles of one long run, as channels of a job of their own: their sums can be side by side."""
    cdef Job own = channels_of(job, c, c + 1)
    cdef Cut one = k[0]
    cdef Py_ssize_t n = tile // k.segments, s = tile % k.segments * k.length
    own.outer, own.channels, own.inner = 1, count, k.length
    own.u.data = at(&own.u, n, 0, s)
    own.u.channel = k.length * own.u.inner
    if own.reads_pair:
        own.v.data = at(&own.v, n, 0, s)
        own.v.channel = k.length * own.v.inner
    own.mean.stride = own.variance.stride = 0
    one.segments = one.tiles = 1
    reduce_tile(&own, &one, 0, 0, count, parts + (c * k.tiles + tile) * 2, <const floating*> NULL, buffer)


cdef void reduce_tiles(const Job* job, const Cut* k, Py_ssize_t t0, Py_ssize_t t1, Py_ssize_t c0, Py_ssize_t c1,
                       double* parts, const floating* table, floating* buffer) noexcept nogil:
    """Tiles t0..t1 of channels c0..c1 in the order of memory: image after image, group after group, run after run."""
    cdef Py_ssize_t t = t0, end, i, c, first
    cdef bint abreast = k.abreast and k.segments > 1 and not job.gated and not job.weighs
    while t < t1:
        first = t // k.segments * k.segments
        end = min(first + k.segments, t1)
        c = c0
        while c < c1:
            i = t
            while abreast and i + ABREAST <= min(end, first + job.inner // k.length):
                reduce_segments(job, k, i, ABREAST, c, parts, buffer)
                i += ABREAST
            while i < end:
                reduce_tile(job, k, i, c, min(c + k.group, c1), parts, table + 5 * job.channels, buffer)
                i += 1
            c += k.group
        t = end


cdef void do_task(const Job* job, const Cut* k, Step step, Py_ssize_t task, double* parts, floating* table) noexcept nogil:
    """One span of channels along one stretch of tiles, or one stretch of memory."""
    cdef floating room[7 * TILE + LANES]
    cdef floating* buffer = aligned(room)
    cdef Py_ssize_t c0 = task % k.spans * k.span
    cdef Py_ssize_t c1 = min(c0 + k.span, job.channels)
    cdef Py_ssize_t t0 = task // k.spans * k.stretch
    cdef Py_ssize_t t1 = min(t0 + k.stretch, k.tiles)
    if step == APPLY:
        apply_rest(job, k, task * k.portion, min((task + 1) * k.portion, k.pieces), 0, job.channels, table, buffer)
        return
    reduce_tiles(job, k, t0, t1, c0, c1, parts, table, buffer)
    if step == BOTH:
        merge_channels(job, k, c0, c1, parts)
        coefficients(job, c0, c1, job.channels, table)
        apply_rest(job, k, 0, job.outer * (c1 - c0) * k.cuts, c0, c1, table, buffer)


cdef void do_tasks(const Job* job, const Cut* k, Step step, Py_ssize_t begin, Py_ssize_t end, double* parts,
                   floating* table) noexcept nogil:
    """Neighbouring tasks, one after the other; after sums in the opposite order: what came last is still in a cache."""
    cdef Py_ssize_t i
    for i in range(end - begin):
        do_task(job, k, step, end - 1 - i if step == APPLY and job.reduces else begin + i, parts, table)


cdef int do_step(const Job* job, const Cut* k, Step step, double* parts, floating* table) noexcept nogil:
    """All tasks of a step, in waves, looking for signals in between."""
    cdef Py_ssize_t tasks = k.portions if step == APPLY else k.spans * k.stretches
    cdef Py_ssize_t wave = k.wave if step != APPLY else max(<Py_ssize_t> 1, WAVE // (k.portion * k.cut * job.y.size))
    cdef Py_ssize_t begin = 0, end, share
    cdef int threads = job.threads
    while begin < tasks:
        end = min(begin + wave, tasks)
        if threads == 1:  # a team of one would cost more than a small call
            do_tasks(job, k, step, begin, end, parts, table)
        else:
            for share in prange(threads, schedule="static", num_threads=threads):
                do_tasks(job, k, step, begin + (end - begin) * share // threads,
                         begin + (end - begin) * (share + 1) // threads, parts, table)
        begin = end
        if begin < tasks and job.interruptible and is_interrupted():
            return INTERRUPTED
    return DONE


cdef int do_steps(const Job* job, const Cut* k, double* parts, floating* table) noexcept nogil:
    cdef Py_ssize_t c
    cdef int threads = job.threads, status
    cdef Job gate
    if job.gated:
        gate = gate_of(job)
        coefficients(&gate, 0, job.channels, job.channels, table + 5 * job.channels)
    if k.fused:
        return do_step(job, k, BOTH, parts, table)
    if job.reduces:
        status = do_step(job, k, REDUCE, parts, table)
        if status != DONE:
            return status
        if job.weights.unchecked and not are_fit(job, k, parts):
            return UNFIT
        if threads == 1:
            merge_channels(job, k, 0, job.channels, parts)
        else:
            for c in prange(job.channels, schedule="static", num_threads=threads):
                merge_channels(job, k, c, c + 1, parts)
    if job.applies:
        coefficients(job, 0, job.channels, job.channels, table)
        return do_step(job, k, APPLY, parts, table)
    return DONE


cdef int do_job(const Job* job, floating* typed) noexcept nogil:
    cdef Cut k = cut(job)
    cdef Job own = job[0]
    cdef int status = NO_MEMORY
    cdef Py_ssize_t sums = job.channels * k.tiles * (2 + job.weighs + job.weights.unchecked)
    cdef bint keeps = job.first != NULL or not job.reduces
    cdef size_t parts_size = (sums + (0 if keeps else 3 * job.channels)) * sizeof(double)
    cdef double* parts = <double*> scratch_take(parts_size) if job.reduces else NULL
    cdef Py_ssize_t tables = 10 if job.gated else 5  # the second is of the gate
    cdef bint tabulates = job.applies or job.gated
    cdef size_t table_size = job.channels * tables * sizeof(floating)
    cdef floating* table = <floating*> scratch_take(table_size) if tabulates else NULL
    if (parts != NULL or not job.reduces) and (table != NULL or not tabulates):
        if not keeps:
            own.first, own.second = parts + sums, parts + sums + job.channels
            if job.weighs and not job.reads_pair:
                own.total = own.second + job.channels
        status = do_steps(&own, &k, parts, table)
        if status == DONE and own.settles:
            settle(&own)
    scratch_give(parts, parts_size)
    scratch_give(table, table_size)
    return status


cdef int do_any(const Job* job, bint wide) noexcept nogil:
    if wide:
        return do_job(job, <double*> NULL)
    return do_job(job, <float*> NULL)


def run(Plan plan, int operation, u, v, y, gamma, beta, mean, variance, double epsilon, first, second, int threads,
        w=None, bend=None, bint by_output=False, kept=None, counting=None):
    """Carry out a plan, unless unchecked weights turn out not to fit; whether it was carried out.

    Every array was checked; those an operation does not use are None.
    """
    cdef Job job
    plan.bind(&job, <Operation> operation, u, v, y, gamma, beta, mean, variance, epsilon, first, second, threads, w,
              bend, by_output, kept)
    bind_weights(&job, counting)
    cdef int status
    cdef bint wide = plan.wide
    with nogil:
        status = do_any(&job, wide)
    return not finish(status)


ENTRY = PyCapsule_New(<void*> do_any, DRIVER, NULL)
