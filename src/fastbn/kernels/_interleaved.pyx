"""The interleaved driver: the channels of a value's neighbours are other channels (NHWC, NLC, NC).

The array is rows of columns. A row holds k positions of all channels, (k, C, S) columns, where k > 1 only for few
channels (so that a row is whole lanes) and S > 1 only for runs too short for the planar driver (`pattern_of`). Each column has sums of
its own; at the end the columns of a channel are folded into one. Positions that fill no row are a last part of one row.

Formula      moments and gradient sums per column, then y = (x - mean) * gamma / sqrt(variance + epsilon) + beta or its
             gradient: see lanes.pxd and job.pxd.
Traffic      training reads x twice and writes y once (the second read comes from cache where x fits one). Inference:
             one read, one write.
Accuracy     a part is at most BLOCK values or MIN_ROWS rows, summed in float64 per column relative to its first row;
             parts merge in order by Chan's formula (moments.pxd), and so do a channel's columns.
Parallel     over (block of rows, chunk of columns), once to sum and once to apply; in between, the columns are merged.
             Of few rows, over groups of channels, each with all of these steps.
             Blocks are cut by shape alone and merged in order, so threads do not change a bit.
"""
from cython cimport floating
from cython.parallel cimport prange
from cpython.pycapsule cimport PyCapsule_New
from libc.string cimport memcpy, memset

from . cimport caches
from .caches cimport is_lean, is_roomy
from ._plan cimport Plan, bind_weights, too_little
from .channels cimport coefficients, load, loaded, settle
from .convert cimport give, is_native, take
from .given_weights cimport Walk, mark, take_repeated, take_weights, walk_from, walk_on, weight, weight_at, weights_at
from .interleaved_cut cimport (
    APIECE, CHUNK, FETCHED, PIECE, SHARE, SHIFTED, STAGED, STEP, STRETCHES, Cut, Grid, Tile, begin_of, cut, cut_group,
    largest_group, table_length, tile_of, walk_of, whole,
)
from .job cimport (
    DONE, DRIVER, INTERRUPTED, NO_MEMORY, UNFIT, Job, Operand, Operation, behind_gate, channels_of, finish, gate_of, is_interrupted,
    kind_beside, kind_of_results, native,
)
from .kinds cimport DOUBLE, size_of
from .lanes cimport IN_BANDS, ROW_BY_ROW, WIDE, apply_rows
from .lines cimport GATHERED, LINE, aligned, away, end_line, fence, fetch_lines, in_line, line, stream_lines
from .marks cimport keep_rows
from .moments cimport CANCELLED, add, exact_reciprocal, from_sums, is_far, merge
from .packs cimport LANES
from .scratch cimport scratch_give, scratch_take
from .stores cimport in_room, is_in_place, place_results, wants_room
from .strips cimport (
    BENT, BYTES, CLIPPED, EACH, ONE, PRESENT, SMOOTH, STRAIGHT, WEIGHTED, Form, Strips, is_weighted, moved,
)
from .sums cimport reduce_near_rows, reduce_rows
from .weights cimport (
    are_finite, choose, fits, from_weighted_sums, hide, larger, largest_in, largest_of, merge_weighted, weigh_rows,
)

include "_interleaved_views.pxi"


# One function for each kind of bend, not inline: what loops there are is compiled once, whoever calls it, and so few in one
# function that their numbers stay in registers. Of all in one, nine in ten fetched addresses from the stack for every pack.
cdef void scale_straight(const Form* form, const Strips* x, int walk, Py_ssize_t ahead, const floating* table,
                         Py_ssize_t stride, bint stream) noexcept nogil:
    apply_rows(x, walk, ahead, table, stride, form, stream, STRAIGHT)


cdef void scale_clipped(const Form* form, const Strips* x, int walk, Py_ssize_t ahead, const floating* table,
                        Py_ssize_t stride, bint stream) noexcept nogil:
    apply_rows(x, walk, ahead, table, stride, form, stream, CLIPPED)


cdef void scale_bent(const Form* form, const Strips* x, int walk, Py_ssize_t ahead, const floating* table,
                     Py_ssize_t stride, bint stream) noexcept nogil:
    apply_rows(x, walk, ahead, table, stride, form, stream, BENT)


cdef void scale_smooth(const Form* form, const Strips* x, int walk, Py_ssize_t ahead, const floating* table,
                       Py_ssize_t stride, bint stream) noexcept nogil:
    apply_rows(x, walk, ahead, table, stride, form, stream, SMOOTH)


cdef void scale_weighted(const Form* form, const Strips* x, int walk, Py_ssize_t ahead, const floating* table,
                         Py_ssize_t stride, bint stream) noexcept nogil:
    apply_rows(x, walk, ahead, table, stride, form, stream, WEIGHTED)


cdef void scale_present(const Form* form, const Strips* x, int walk, Py_ssize_t ahead, const floating* table,
                        Py_ssize_t stride, bint stream) noexcept nogil:
    apply_rows(x, walk, ahead, table, stride, form, stream, PRESENT)


cdef void scale(const Form* form, const Strips* x, int walk, Py_ssize_t ahead, const floating* table,
                Py_ssize_t stride, bint stream) noexcept nogil:
    """*apply* to rows."""
    if form.bend == STRAIGHT:
        scale_straight(form, x, walk, ahead, table, stride, stream)
    elif form.bend == CLIPPED:
        scale_clipped(form, x, walk, ahead, table, stride, stream)
    elif form.bend == BENT:
        scale_bent(form, x, walk, ahead, table, stride, stream)
    elif form.bend == SMOOTH:
        scale_smooth(form, x, walk, ahead, table, stride, stream)
    elif form.bend == WEIGHTED:
        scale_weighted(form, x, walk, ahead, table, stride, stream)
    else:
        scale_present(form, x, walk, ahead, table, stride, stream)


cdef View gated(const Job* job, const Cut* k, bint inside, const View* u, const View* v, Py_ssize_t row, Py_ssize_t rows,
                Py_ssize_t column, Py_ssize_t columns, const floating* gates, floating* buffer) noexcept nogil:
    """dy, a view, times the derivative of the activation, in the buffer, or where it is kept as it is.

    v is a view of x. There is room behind the result for what the derivative is told from.
    """
    cdef View g, w
    cdef const View* source = v
    cdef bint rounds = job.kept.data != NULL and job.kept.data != job.exact.data, dense_w
    cdef bint direct = (job.exact.data != NULL and not rounds and inside and is_native(&job.exact)
                        and dense(job, k, &job.exact))
    g = View(<char*> buffer, whole(columns), native(gates))
    w = u[0]
    if direct:
        g = view(job, k, &job.exact, True, row, rows, column, columns, buffer)
    if job.by_output or job.gate.third:
        dense_w = dense(job, k, &job.w)
        w = view(job, k, &job.w, dense_w and inside and is_native(&job.w), row, rows, column, columns,
                 buffer + STAGED)
        if job.by_output:
            source = &w
    cdef Strips x = strips(u, source, &w, &g, rows, whole(columns), EACH)
    scale(&job.gate, &x, walk_of(False), 0, gates + column, k.padded, False)
    if job.exact.data != NULL and not direct:
        carry_rows(job, k, &job.exact, row, rows, column, columns, <floating*> g.data, True)
    if rounds:
        carry_rows(job, k, &job.kept, row, rows, column, columns, <floating*> g.data, True)
    return g


include "_interleaved_weights.pxi"
include "_interleaved_sums.pxi"
include "_interleaved_results.pxi"


cdef inline void repeat(const floating* x, Py_ssize_t n, Py_ssize_t times, floating* y) noexcept nogil:
    """Each of n numbers so many times. As long as there is room for whole lanes they are filled, and the numbers that follow
    take what was too much."""
    cdef Py_ssize_t lanes = whole(times), filled = max(<Py_ssize_t> 0, n - (lanes + times - 1) // times + 1), i, j, s
    cdef floating value
    for i in range(filled):
        value = x[i]
        for j in range(lanes // LANES):
            for s in range(LANES):
                y[i * times + j * LANES + s] = value
    for i in range(filled, n):
        for s in range(times):
            y[i * times + s] = x[i]


cdef void tabulate(const Job* job, const Cut* k, Py_ssize_t c0, Py_ssize_t c1, floating* table) noexcept nogil:
    """The coefficients of the columns of channels c0..c1.

    The table is [p, a, shift, q, b][column], and behind it the same of channels where a channel has several columns.
    """
    cdef bint spread = k.columns > job.channels
    cdef Py_ssize_t stride = job.channels if spread else k.padded
    cdef floating* channel = table + 5 * k.padded if spread else table
    cdef Py_ssize_t i, j
    coefficients(job, c0, c1, stride, channel)
    for j in range(5 if job.form.pair else 3):  # the last two are a second operand's
        if spread and job.inner == 1:
            for i in range(k.positions):
                memcpy(table + j * k.padded + i * job.channels + c0, channel + j * stride + c0, (c1 - c0) * sizeof(floating))
        elif spread:
            for i in range(k.positions):
                repeat(channel + j * stride + c0, c1 - c0, job.inner,
                       table + j * k.padded + (i * job.channels + c0) * job.inner)
        if c1 == job.channels:
            for i in range(k.columns, k.padded):
                table[j * k.padded + i] = 0


cdef inline void wrap(const Cut* k, floating* table) noexcept nogil:
    """The first columns of a table once more behind its last: see `apply_stretch`."""
    cdef Py_ssize_t j
    for j in range(5):
        memcpy(table + j * k.padded + k.columns, table + j * k.padded, LANES * sizeof(floating))


cdef void finish_channels(const Job* job, const Cut* k, Py_ssize_t c0, Py_ssize_t c1, double* parts,
                          floating* table) noexcept nogil:
    """From the parts of channels c0..c1 to their statistics and to the coefficients of their columns."""
    cdef Py_ssize_t i
    if job.reduces:
        for i in range(k.positions):
            merge_blocks(job, k, (i * job.channels + c0) * job.inner, (i * job.channels + c1) * job.inner, parts)
        if k.columns > job.channels:
            fold_columns(job, k, c0, c1, parts)
        elif job.first != parts:  # else they are where they shall be
            memcpy(job.first + c0, parts + c0, (c1 - c0) * sizeof(double))
            memcpy(job.second + c0, parts + k.columns + c0, (c1 - c0) * sizeof(double))
            if job.weighs and not job.reads_pair:
                memcpy(job.total + c0, parts + 2 * k.sums.blocks * k.columns + c0, (c1 - c0) * sizeof(double))
    if job.applies:
        tabulate(job, k, c0, c1, table)


cdef void do_tasks(const Job* job, const Cut* k, Py_ssize_t begin, Py_ssize_t end, double* parts, const floating* table,
                   const floating* gates) noexcept nogil:
    """Neighbouring tasks, one after the other; after sums in the opposite order: what came last is still in a cache."""
    cdef Py_ssize_t i
    for i in range(end - begin):
        if parts != NULL:
            reduce_block(job, k, begin + i, parts, gates)
        else:
            apply_block(job, k, end - 1 - i if job.reduces else begin + i, table, gates)


cdef int do_blocks(const Job* job, const Cut* k, double* parts, const floating* table,
                   const floating* gates) noexcept nogil:
    """Reduce all blocks to parts, or apply the table to them, in waves, looking for signals in between."""
    cdef const Grid* g = &k.sums if parts != NULL else &k.results
    cdef Py_ssize_t tasks = g.blocks * g.chunks, begin = 0, end, even, share
    cdef int threads = job.threads
    while begin < tasks:
        end = min(begin + g.wave, tasks)
        even = max(begin, min(end, tasks - g.chunks if k.rest else tasks))  # a row that is not full takes next to no time
        if threads == 1:  # a team of one would cost more than a small call
            do_tasks(job, k, begin, end, parts, table, gates)
        else:
            for share in prange(threads, schedule="static", num_threads=threads):
                do_tasks(job, k, begin + (even - begin) * share // threads,
                         end if share == threads - 1 else begin + (even - begin) * (share + 1) // threads, parts, table, gates)
        begin = end
        if begin < tasks and job.interruptible and is_interrupted():
            return INTERRUPTED
    return DONE


cdef int do_steps(const Job* job, const Cut* k, double* parts, floating* tables) noexcept nogil:
    """A job, or a group of its channels. A table of the gate follows that of the results."""
    cdef Py_ssize_t share, shares = (job.channels + SHARE - 1) // SHARE
    cdef int threads = job.threads, status
    cdef floating* table = tables
    cdef floating* gates = tables + table_length(k, job.channels) if job.gated else NULL
    cdef Job gate, behind
    cdef const Job* rest = job
    if job.gated:
        gate = gate_of(job)
        tabulate(&gate, k, 0, job.channels, gates)
        behind = behind_gate(job)
        rest = &behind
    # Packs of coefficients shall begin with lines where those of y do.
    if job.applies and (is_shifted(rest, k) or is_late(rest, k)):
        table += <Py_ssize_t> (<size_t> job.y.data % (LANES * job.y.size)) // job.y.size
    if job.reduces:
        status = do_blocks(job, k, parts, table, gates)
        if status != DONE:
            return status
        if job.weights.unchecked and not are_fit(k, parts):
            return UNFIT
    if threads == 1 or shares == 1:
        finish_channels(job, k, 0, job.channels, parts, table)
    else:
        for share in prange(shares, schedule="static", num_threads=threads):
            finish_channels(job, k, share * SHARE, min((share + 1) * SHARE, job.channels), parts, table)
    if not job.applies:
        return DONE
    if k.columns % LANES == 0:
        wrap(k, table)
    status = do_blocks(rest, k, NULL, table, gates)
    if status == DONE and job.settles:
        settle(job)
    return status


cdef struct Room:
    # Doubles of the parts of a job, and behind them of numbers per channel; bytes of its tables; numbers that come through its
    # gate. All are whole lines.
    Py_ssize_t parts, numbers, tables, gated


cdef inline Room room_of(const Job* job, const Cut* k, bint near, Py_ssize_t size) noexcept nogil:
    cdef Room room
    room.parts = room.numbers = room.tables = room.gated = 0
    if job.reduces:
        room.parts = whole(k.sums.blocks * k.columns * (3 if job.weighs else 2)
                           + k.sums.blocks * k.sums.chunks * job.weights.unchecked)
        if job.first == NULL and k.columns > job.channels:
            room.numbers = 3 * whole(job.channels)
    if job.applies or job.gated:
        room.tables = table_length(k, job.channels) * (2 if job.gated else 1) * size
    if wants_room(job, near):
        room.gated = whole(job.outer * job.channels * job.inner)
    return room


cdef inline void take_numbers(Job* job, const Cut* k, const Room* room, double* parts) noexcept nogil:
    """A place for numbers per channel that nobody keeps: that of the columns' in the first part, if that is the same."""
    cdef double* numbers = parts if room.numbers == 0 else parts + room.parts
    cdef Py_ssize_t step = k.columns if room.numbers == 0 else whole(job.channels)
    if not job.reduces or job.first != NULL:
        return
    job.first, job.second = numbers, numbers + step
    if job.weighs and not job.reads_pair:
        job.total = parts + 2 * k.sums.blocks * k.columns if room.numbers == 0 else numbers + 2 * step


cdef void do_group(const Job* job, const Cut* g, Py_ssize_t group, const Room* room, double* parts, floating* table,
                   floating* gated) noexcept nogil:
    """All steps of a group of channels."""
    cdef Py_ssize_t c0 = begin_of(job, g, group), c1 = begin_of(job, g, group + 1)
    cdef Job own = channels_of(job, c0, c1)
    cdef Cut other
    own.threads = 1
    own.interruptible = False
    if c1 - c0 != g.group:
        other = cut_group(&own, g, c1 - c0)
        g = &other
    take_numbers(&own, g, room, parts)
    if gated != NULL:
        own.exact = in_room(&own, gated, own.channels)
    do_steps(&own, g, parts, table)


cdef int do_groups(const Job* job, const Cut* k, const Room* room, double* parts, floating* table,
                   floating* gated) noexcept nogil:
    """All groups, each cut like this one."""
    cdef Py_ssize_t groups = (job.channels + k.group - 1) // k.group, share, i
    cdef Py_ssize_t numbers = room.parts + room.numbers, tables = room.tables // <Py_ssize_t> sizeof(floating)
    cdef int threads = job.threads
    if threads == 1:
        for i in range(groups):
            do_group(job, k, i, room, parts, table, gated)
        return DONE
    for share in prange(threads, schedule="static", num_threads=threads):
        for i in range(groups * share // threads, groups * (share + 1) // threads):
            do_group(job, k, i, room, parts + share * numbers, table + share * tables, gated + share * room.gated)
    return DONE


cdef int do_job(const Job* given, floating* typed) noexcept nogil:
    cdef Job job = given[0], own
    place_results(&job, False)
    cdef Cut k = cut(&job), g
    cdef Room room
    cdef int status = NO_MEMORY, shares = 1
    cdef size_t parts_size, tables_size
    own = job
    if k.group == job.channels and too_little(&job):
        own.threads = 1
        k = cut(&own)
    if k.group < job.channels:
        shares = job.threads
        own = channels_of(&job, 0, largest_group(&job, &k))
        g = cut_group(&own, &k, own.channels)
        room = room_of(&own, &g, True, sizeof(floating))
        own = channels_of(&job, 0, k.group)
        g = cut_group(&own, &k, k.group)
    else:
        room = room_of(&job, &k, False, sizeof(floating))
    parts_size = ((room.parts + room.numbers) * shares + LANES) * sizeof(double)
    tables_size = room.tables * shares + LANES * sizeof(floating)
    cdef double* parts = <double*> scratch_take(parts_size) if room.parts else NULL
    cdef floating* table = <floating*> scratch_take(tables_size) if room.tables else NULL
    cdef size_t gated_size = (room.gated * shares + LANES) * sizeof(floating)
    cdef floating* gated = <floating*> scratch_take(gated_size) if room.gated else NULL
    if gated == NULL:  # then it is found twice
        room.gated = 0
    if (parts != NULL or not room.parts) and (table != NULL or not room.tables):
        if k.group < job.channels:
            status = do_groups(&job, &g, &room, aligned(parts), aligned(table), aligned(gated))
        else:
            if gated != NULL:
                own.exact = in_room(&own, aligned(gated), own.channels)
            take_numbers(&own, &k, &room, aligned(parts))
            status = do_steps(&own, &k, aligned(parts), aligned(table))
    scratch_give(parts, parts_size)
    scratch_give(table, tables_size)
    scratch_give(gated, gated_size)
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
