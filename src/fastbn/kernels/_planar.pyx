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

from . cimport caches
from .caches cimport is_roomy
from ._plan cimport Plan, bind_weights, too_little
from .channels cimport coefficients, load, settle
from .convert cimport give, is_native, take
from .given_weights cimport mark, take_weights, weight, weight_at, weights_at
from .job cimport (
    DONE, DRIVER, INTERRUPTED, NO_MEMORY, UNFIT, Job, Operand, Operation, behind_gate, channels_of, finish, gate_of,
    is_interrupted, kind_beside, kind_of_results, native,
)
from .kinds cimport DOUBLE, FLOAT, size_of
from .lanes cimport apply_runs
from .lines cimport GATHERED, LINE, aligned, away, end_line, fence, fetch_lines, line, stream_lines
from .marks cimport keep_run
from .moments cimport CANCELLED, add, exact_reciprocal, fold, from_sums, is_far, merge
from .packs cimport ABREAST, LANES
from .planar_cut cimport (
    BACK, GROUP, IMAGES, JOINED, SMALL_RUN, SMALL_STAGED_RUN, TILE, WAVE, Cut, Span, all_ready, cut, ready, shares_lines, span_of,
    weights_ready,
)
from .scratch cimport scratch_give, scratch_take
from .stores cimport in_room, place_results, wants_room
from .strips cimport EACH, SMOOTH, STRAIGHT, Form, Strips, is_weighted, moved
from .sums cimport reduce_runs
from .weights cimport (
    are_finite, choose, fits, from_weighted_sums, hide, larger, largest_in, largest_of, merge_weighted, weigh_runs,
)

cdef inline const floating* stage(const Operand* operand, const char* x, Py_ssize_t n, floating pad,
                                  floating* tile) noexcept nogil:
    """A run as *reduce* and *apply* want it: x itself where it is that, else a copy of at least LANES values."""
    cdef Py_ssize_t i
    if ready(operand, n, native(tile)):
        return <const floating*> x
    take(operand, x, operand.inner, n, tile, 1)
    for i in range(n, LANES):
        tile[i] = pad
    return tile


cdef inline void reduce_any(const Job* job, bint direct, const char* x, const char* x2, Py_ssize_t channels,
                            Py_ssize_t runs, Py_ssize_t n, const double* p, const double* q, bint shifted, bint abreast,
                            Py_ssize_t next_u, Py_ssize_t next_v, bint second_level, bint begins, double* first,
                            double* second, floating* tile) noexcept nogil:
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
                        False, begins, first, second)
        elif job.reads_pair:
            reduce_runs(u, cu, su, v, cv, sv, channels, runs, n, p, q, True, True, False, abreast, next_u, next_v,
                        False, begins, first, second)
        else:
            reduce_runs(u, cu, su, u, cu, su, channels, runs, n, p, p, False, True, False, abreast, next_u, next_v,
                        second_level, begins, first, second)
    elif floating is float:
        if job.reads_pair:
            reduce_runs(u, cu, su, v, cv, sv, channels, runs, n, p, q, True, False, False, abreast, next_u, next_v,
                        False, begins, first, second)
        else:
            reduce_runs(u, cu, su, u, cu, su, channels, runs, n, p, p, False, False, False, abreast, next_u, next_v,
                        second_level, begins, first, second)


cdef void bend_together(const Job* job, const char* u, const char* v, const char* w, char* y, Py_ssize_t runs, Py_ssize_t n,
                        const floating* table, Py_ssize_t channels) noexcept nogil:
    """`apply_any` with a smooth activation to short runs: all that comes before it into a tile, then the tile as one run.

    What is left over of a short run would take longest.
    """
    cdef floating room[TILE + LANES]
    cdef floating* tile = aligned(<floating*> room)
    cdef floating[5] same = [0, 1, -0.0, 0, 0]  # coefficients that change no bit, not even a sign
    cdef Form straight = job.form, bend = job.form
    cdef const Operand* operand = &job.v if job.form.pair else &job.u
    cdef const char* x = v if job.form.pair else u
    cdef Py_ssize_t r = 0, step = n * sizeof(floating), m
    cdef int kind = native(table)
    cdef Strips before, behind
    straight.bend, straight.pair, bend.third = STRAIGHT, False, False
    while r < runs:
        m = min(runs - r, TILE // n)
        before = Strips(x + r * operand.channel, x, w + r * job.w.channel, <char*> tile, operand.channel, 0, job.w.channel, step,
                        m, n, kind, kind, EACH)
        apply_runs(&before, table + r, channels, &straight, False)
        behind = Strips(<char*> tile, <char*> tile, w, y + r * step, 0, 0, 0, 0, 1, m * n, kind, kind, EACH)
        if job.form.pair:
            behind.u, behind.kind_u = u + r * job.u.channel, job.u.kind
        apply_runs(&behind, same, 1, &bend, job.streams)
        r += m


cdef inline bint bends_together(const Job* job, Py_ssize_t n) noexcept nogil:
    """Whether runs of that length, which need no staging, are short ones with a smooth activation, and lie side by side."""
    return (job.form.bend == SMOOTH and n < SMALL_RUN and job.y.channel == n * job.y.size
            and (not job.form.pair or job.u.channel == n * job.u.size))


cdef inline void apply_any(const Job* job, bint direct, int kind, const char* u, const char* v, const char* w, char* y,
                           Py_ssize_t runs, Py_ssize_t n, const floating* table, Py_ssize_t channels,
                           floating* tile) noexcept nogil:
    """A run of any form, or those of several channels, of a kind, that need no staging; the table starts at the first one's
    column."""
    cdef char* z = y
    cdef Py_ssize_t m = n
    cdef bint unstaged = direct
    cdef Strips x
    if not direct:
        kind = native(tile)
        u = <const char*> stage(&job.u, u, n, 0, tile)
        if job.writes_pair:
            v = <const char*> stage(&job.v, v, n, 0, tile + TILE)
        if job.form.third:
            w = <const char*> stage(&job.w, w, n, 0, tile + 2 * TILE)
        unstaged = ready(&job.y, n, kind)
        if not unstaged:
            z = <char*> tile  # over a staged u
            m = max(n, <Py_ssize_t> LANES)
    elif runs > 1 and bends_together(job, n):
        bend_together(job, u, v, w, y, runs, n, table, channels)
        return
    x = Strips(u, v, w, z, job.u.channel, job.v.channel, job.w.channel, job.y.channel, runs, m,
               job.u.kind if direct else kind, kind, EACH)
    apply_runs(&x, table, channels, &job.form, job.streams and unstaged)
    if not unstaged:
        give(&job.y, <const floating*> z, 1, n, y, job.y.inner)


cdef void gate_runs(const Job* gate, bint direct, const char* dy, const char* v, const char* w, char* g,
                    Py_ssize_t runs, Py_ssize_t n, const floating* gates, floating* tile) noexcept nogil:
    """Runs of dy times the derivative of the activation. Not inline: it would cost the calls beside it theirs."""
    apply_any(gate, direct, native(tile), dy, v, w, g, runs, n, gates, gate.channels, tile)


cdef inline char* at(const Operand* operand, Py_ssize_t n, Py_ssize_t c, Py_ssize_t s) noexcept nogil:
    """Where (n, c, s) is."""
    return operand.data + n * operand.outer + c * operand.channel + s * operand.inner


cdef inline Operand in_tile(Py_ssize_t length, int kind) noexcept nogil:
    """The operand that runs of that length are when they lie side by side in a tile."""
    cdef Operand o
    o.data = NULL
    o.kind = kind
    o.size = o.inner = size_of(kind)
    o.outer, o.channel = 0, length * o.size
    return o


cdef inline Operand staged(const Operand* operand, Py_ssize_t length, int kind) noexcept nogil:
    """The operand of a kind that neighbouring runs become when they are converted together; those of that kind stay."""
    return operand[0] if operand.kind == kind else in_tile(length, kind)


cdef inline Py_ssize_t side_by_side(const Operand* operand, Py_ssize_t length, int kind) noexcept nogil:
    """How many channels' runs of that length can be converted at once; 0 where the values of a run are apart."""
    if operand.inner != operand.size or length < LANES:
        return 0
    if operand.kind == kind:
        return GROUP
    return max(<Py_ssize_t> 1, TILE // length) if operand.channel == length * operand.size else 1


cdef inline const char* convert(const Operand* operand, const char* x, Py_ssize_t n, int kind, floating* tile) noexcept nogil:
    """Where n values that lie side by side are of that kind: in the tile, in the type of arithmetic, or where they were."""
    if operand.kind == kind:
        return x
    take(operand, x, operand.size, n, tile, 1)
    return <const char*> tile


include "_planar_weights.pxi"
include "_planar_sums.pxi"
include "_planar_results.pxi"


cdef void apply_back(const Job* job, const Cut* k, Py_ssize_t c0, Py_ssize_t c1, const floating* table,
                     floating* buffer) noexcept nogil:
    """`apply_rest` to channels c0..c1, the last images first: what was summed last is nearest."""
    cdef Py_ssize_t pieces = (c1 - c0) * k.cuts
    cdef Py_ssize_t images = max(<Py_ssize_t> 1, BACK // (pieces * k.cut)), end = job.outer, begin
    while end > 0:
        begin = max(<Py_ssize_t> 0, end - images)
        apply_rest(job, k, begin * pieces, end * pieces, c0, c1, table, buffer)
        end = begin


cdef enum Step:
    REDUCE
    APPLY
    BOTH  # what was summed is applied while it is in a cache


cdef void do_task(const Job* given, const Cut* k, Step step, Py_ssize_t task, Py_ssize_t share, double* parts,
                  floating* table) noexcept nogil:
    """One span of channels along one stretch of tiles, or one stretch of memory."""
    cdef floating room[7 * TILE + LANES]
    cdef floating* buffer = aligned(room)
    cdef Py_ssize_t c0 = task % k.spans * k.span
    cdef Py_ssize_t c1 = min(c0 + k.span, given.channels)
    cdef Py_ssize_t t0 = task // k.spans * k.stretch
    cdef Py_ssize_t t1 = min(t0 + k.stretch, k.tiles)
    cdef const Job* job = given
    cdef Job own
    if k.room:
        own = given[0]
        own.exact.data += share * k.room - c0 * own.exact.channel
        job = &own
    if step == APPLY:
        apply_rest(job, k, task * k.portion, min((task + 1) * k.portion, k.pieces), 0, job.channels, table, buffer)
        return
    reduce_tiles(job, k, t0, t1, c0, c1, parts, table, buffer)
    if step == BOTH:
        merge_channels(job, k, c0, c1, parts)
        coefficients(job, c0, c1, job.channels, table)
        apply_back(job, k, c0, c1, table, buffer)


cdef void do_tasks(const Job* job, const Cut* k, Step step, Py_ssize_t begin, Py_ssize_t end, Py_ssize_t share, double* parts,
                   floating* table) noexcept nogil:
    """Neighbouring tasks, one after the other; after sums in the opposite order: what came last is still in a cache."""
    cdef Py_ssize_t i
    for i in range(end - begin):
        do_task(job, k, step, end - 1 - i if step == APPLY and job.reduces else begin + i, share, parts, table)


cdef int do_step(const Job* job, const Cut* k, Step step, double* parts, floating* table) noexcept nogil:
    """All tasks of a step, in waves, looking for signals in between."""
    cdef Py_ssize_t tasks = k.portions if step == APPLY else k.spans * k.stretches
    cdef Py_ssize_t wave = k.wave if step != APPLY else max(<Py_ssize_t> 1, WAVE // (k.portion * k.cut * job.y.size))
    cdef Py_ssize_t begin = 0, end, share
    cdef int threads = job.threads
    while begin < tasks:
        end = min(begin + wave, tasks)
        if threads == 1:  # a team of one would cost more than a small call
            do_tasks(job, k, step, begin, end, 0, parts, table)
        else:
            for share in prange(threads, schedule="static", num_threads=threads):
                do_tasks(job, k, step, begin + (end - begin) * share // threads,
                         begin + (end - begin) * (share + 1) // threads, share, parts, table)
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
        status = do_step(job, k, BOTH, parts, table)
        return UNFIT if status == DONE and job.weights.unchecked and not are_fit(job, k, parts) else status
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
    cdef Job own = job[0]
    place_results(&own, (own.inner <= JOINED or own.y.size < 4) and shares_lines(&own.y, own.inner, own.inner))
    cdef Cut k = cut(&own)
    cdef int status = NO_MEMORY
    if not k.fused and too_little(job):
        own.threads = 1
        k = cut(&own)
    cdef Py_ssize_t sums = job.channels * k.tiles * (2 + job.weighs + job.weights.unchecked)
    cdef bint keeps = job.first != NULL or not job.reduces
    cdef size_t parts_size = (sums + (0 if keeps else 3 * job.channels)) * sizeof(double)
    cdef double* parts = <double*> scratch_take(parts_size) if job.reduces else NULL
    cdef Py_ssize_t tables = 10 if job.gated else 5  # the second is of the gate
    cdef bint tabulates = job.applies or job.gated
    cdef size_t table_size = job.channels * tables * sizeof(floating)
    cdef floating* table = <floating*> scratch_take(table_size) if tabulates else NULL
    cdef size_t room_size = 0
    cdef floating* room = NULL
    if wants_room(&own, k.fused):
        room_size = own.outer * own.channels * own.inner * sizeof(floating)
        if k.fused:
            k.room = (own.outer * k.span * own.inner * <Py_ssize_t> sizeof(floating) + LINE - 1) // LINE * LINE
            room_size = own.threads * k.room
        room_size += LANES * sizeof(floating)
        room = <floating*> scratch_take(room_size)
        if room == NULL:  # then it is found twice
            k.room = 0
        else:
            own.exact = in_room(&own, aligned(room), k.span if k.fused else own.channels)
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
    scratch_give(room, room_size)
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


def set_own_cache(Py_ssize_t size):
    """Walk memory as is best with so many bytes of cache for each core; return what it was. The bits stay the same."""
    before = caches.own_cache
    caches.own_cache = size
    return before


caches.own_cache = caches.find_own_cache()
ENTRY = PyCapsule_New(<void*> do_any, DRIVER, NULL)
