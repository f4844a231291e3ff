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

from ._plan cimport Plan, bind_weights
from .channels cimport coefficients, load, loaded, settle
from .convert cimport give, is_native, take
from .interleaved_cut cimport CHUNK, FETCHED, PIECE, SHARE, STEP, STAGED, Cut, Grid, Tile, cut, cut_group, tile_of, whole
from .job cimport (
    DONE, DRIVER, INTERRUPTED, NO_MEMORY, UNFIT, Job, Operand, Operation, behind_gate, channels_of, finish, gate_of, is_interrupted,
)
from .lanes cimport PRESENT, WEIGHTED, Form, apply_rows, reduce_rows
from .lines cimport GATHERED, aligned, away, end_line, fence, line, stream_lines
from .marks cimport keep_rows
from .moments cimport CANCELLED, add, from_sums, is_far, merge
from .packs cimport LANES
from .scratch cimport scratch_give, scratch_take
from .weights cimport (
    Walk, are_finite, choose, fits, from_weighted_sums, hide, larger, largest_of, mark, merge_weighted, take_weights,
    walk_from, walk_on, weigh_rows, weight, weight_at, weights_at,
)

cdef inline bint dense(const Job* job, const Cut* k, const Operand* operand) noexcept nogil:
    """Whether the columns of a row lie side by side."""
    return ((job.inner == 1 or operand.inner == operand.size)
            and (job.channels == 1 or operand.channel == job.inner * operand.size)
            and (k.positions == 1 or operand.outer == job.channels * job.inner * operand.size))


cdef inline Py_ssize_t offset(const Job* job, const Operand* operand, Py_ssize_t column) noexcept nogil:
    """Bytes from the start of a row to a column."""
    cdef Py_ssize_t position = column // job.inner
    return (position // job.channels * operand.outer + position % job.channels * operand.channel
            + column % job.inner * operand.inner)


cdef struct View:
    # Some rows of a piece of columns, in place or staged.
    char* data
    Py_ssize_t stride


cdef inline View view(const Job* job, const Cut* k, const Operand* operand, bint is_dense, bint direct, Py_ssize_t row,
                      Py_ssize_t rows, Py_ssize_t column, Py_ssize_t columns, floating* buffer) noexcept nogil:
    """The operand itself where its columns are native, dense and whole lanes, else a copy padded with zeros."""
    cdef View w
    cdef Py_ssize_t stride = k.positions * operand.outer, m = whole(columns)
    cdef bint gapless = is_dense and columns == m and stride == m * operand.size
    cdef char* x = operand.data + row * stride
    cdef Py_ssize_t r, j
    if direct:
        w.data = x + column * operand.size
        w.stride = stride // <Py_ssize_t> sizeof(floating)
        return w
    w.data = <char*> buffer
    w.stride = m
    if gapless:
        take(operand, x + column * operand.size, operand.size, rows * m, buffer, 1)
    elif is_dense:
        for r in range(rows):
            take(operand, x + r * stride + column * operand.size, operand.size, columns, buffer + r * m, 1)
    else:
        for j in range(columns):
            take(operand, x + offset(job, operand, column + j), stride, rows, buffer + j, m)
    for j in range(columns, m):
        for r in range(rows):
            buffer[r * m + j] = 0
    return w


cdef inline void unstage(const Job* job, const Cut* k, const Operand* operand, bint is_dense, const floating* buffer,
                         Py_ssize_t row, Py_ssize_t rows, Py_ssize_t column, Py_ssize_t columns) noexcept nogil:
    cdef Py_ssize_t stride = k.positions * operand.outer, m = whole(columns)
    cdef char* y = operand.data + row * stride
    cdef Py_ssize_t r, j
    if is_dense and columns == m and stride == m * operand.size:
        give(operand, buffer, 1, rows * m, y + column * operand.size, operand.size)
    elif is_dense:
        for r in range(rows):
            give(operand, buffer + r * m, 1, columns, y + r * stride + column * operand.size, operand.size)
    else:
        for j in range(columns):
            give(operand, buffer + j, m, rows, y + offset(job, operand, column + j), stride)


cdef void scale(const Form* form, const View* u, const View* v, const View* w, const View* y, Py_ssize_t rows,
                Py_ssize_t columns, bint large, Py_ssize_t ahead, const floating* p, Py_ssize_t stride, bint stream) noexcept nogil:
    """*apply* to views. Not inline: its many forms are compiled once, whoever calls it."""
    apply_rows(<floating*> u.data, u.stride, <floating*> v.data, v.stride, <floating*> w.data, w.stride,
               <floating*> y.data, y.stride, rows, columns, large, ahead, p, p + stride, p + 2 * stride, p + 3 * stride, p + 4 * stride,
               form, stream)


cdef View gated(const Job* job, const Cut* k, bint inside, const View* u, const View* v, Py_ssize_t row,
                       Py_ssize_t rows, Py_ssize_t column, Py_ssize_t columns, const floating* gates,
                       floating* buffer) noexcept nogil:
    """dy, a view, times the derivative of the activation, in the buffer; or where it is kept.

    v is a view of x. There is room behind the result for what the derivative is told from.
    """
    cdef View g, w
    cdef const View* source = v
    cdef bint dense_kept = job.kept.data != NULL and dense(job, k, &job.kept), dense_w
    cdef bint direct = dense_kept and inside and is_native(&job.kept)
    g.data, g.stride = <char*> buffer, whole(columns)
    w = u[0]
    if direct:
        g = view(job, k, &job.kept, True, True, row, rows, column, columns, buffer)
    if job.by_output or job.gate.third:
        dense_w = dense(job, k, &job.w)
        w = view(job, k, &job.w, dense_w, dense_w and inside and is_native(&job.w), row, rows, column, columns,
                 buffer + STAGED)
        if job.by_output:
            source = &w
    scale(&job.gate, u, source, &w, &g, rows, whole(columns), False, 0, gates + column, k.padded, False)
    if job.kept.data != NULL and not direct:
        unstage(job, k, &job.kept, dense_kept, <floating*> g.data, row, rows, column, columns)
        g = view(job, k, &job.kept, dense_kept, False, row, rows, column, columns, buffer)
    return g


cdef void add_rows(const View* u, const View* v, Py_ssize_t rows, Py_ssize_t ahead, Py_ssize_t width, const double* p,
                   const double* q, bint pair, bint shifted, bint omits, double* first, double* second,
                   const floating* typed) noexcept nogil:
    """*reduce* of views. Float64 data are always relative to a shift, and so is a gradient of which some is missing."""
    if omits:
        reduce_rows(<floating*> u.data, u.stride, <floating*> v.data, v.stride, rows, ahead, width, p, q, True, True, True,
                    first, second)
    elif shifted or floating is double:
        if pair:
            reduce_rows(<floating*> u.data, u.stride, <floating*> v.data, v.stride, rows, ahead, width, p, q, True, True,
                        False, first, second)
        else:
            reduce_rows(<floating*> u.data, u.stride, <floating*> u.data, u.stride, rows, ahead, width, p, p, False, True,
                        False, first, second)
    elif pair:
        reduce_rows(<floating*> u.data, u.stride, <floating*> v.data, v.stride, rows, ahead, width, p, q, True, False, False,
                    first, second)
    else:
        reduce_rows(<floating*> u.data, u.stride, <floating*> u.data, u.stride, rows, ahead, width, p, p, False, False, False,
                    first, second)


include "_interleaved_weights.pxi"


cdef void sum_rows(const Job* job, const Cut* k, const Tile* t, const double* p, const double* q, bint shifted,
                   double* first, double* second, const floating* gates) noexcept nogil:
    """Both sums of every column of a tile."""
    cdef floating room[4 * STAGED + LANES]
    cdef floating* ub = aligned(room)
    cdef floating* vb = ub + STAGED
    cdef floating* gb = vb + STAGED
    cdef bint dense_u = dense(job, k, &job.u), dense_v = job.reads_pair and dense(job, k, &job.v)
    cdef bint direct_u = dense_u and is_native(&job.u), direct_v = dense_v and is_native(&job.v)
    # What is direct is taken in whole lanes; the columns that are left over are staged.
    cdef Py_ssize_t width = t.columns // LANES * LANES if direct_u or direct_v else 0
    cdef Py_ssize_t most = CHUNK if dense_u and (dense_v or not job.reads_pair) else PIECE
    if job.gated and not ((job.kept.data == NULL or dense(job, k, &job.kept))
                          and (not (job.by_output or job.gate.third) or dense(job, k, &job.w))):
        most = PIECE
    cdef double edge[4 * LANES]
    cdef Py_ssize_t j, r, rows, n, m, step, stop = t.columns
    cdef bint inside
    cdef View u, v
    memset(first, 0, whole(t.columns) * sizeof(double))
    memset(second, 0, whole(t.columns) * sizeof(double))
    if direct_u and (direct_v or not job.reads_pair) and not job.gated and t.columns % LANES and t.columns >= LANES:
        # The last lanes overlap those before: what is left over needs no staging, and is all that is taken from their sums.
        stop = width
        j = t.columns - LANES
        memcpy(edge, p + j, LANES * sizeof(double))
        memcpy(edge + LANES, q + j, LANES * sizeof(double))
        memset(edge + 2 * LANES, 0, 2 * LANES * sizeof(double))
        u = v = view(job, k, &job.u, True, True, t.row, t.rows, t.column + j, LANES, ub)
        if job.reads_pair:
            v = view(job, k, &job.v, True, True, t.row, t.rows, t.column + j, LANES, vb)
        add_rows(&u, &v, t.rows, k.ahead, LANES, edge, edge + LANES, job.reads_pair, shifted, job.reads_pair and job.omits,
                 edge + 2 * LANES, edge + 3 * LANES, gates)
        for j in range(width, t.columns):
            first[j] = edge[3 * LANES + j - t.columns]
            second[j] = edge[4 * LANES + j - t.columns]
    for step in range((t.rows + k.sums.step - 1) // k.sums.step):
        r = step * k.sums.step
        rows = min(k.sums.step, t.rows - r)
        j = 0
        while j < stop:
            inside = j < width
            n = min((width if inside else t.columns) - j, most)
            m = whole(n)
            u = view(job, k, &job.u, dense_u, direct_u and inside, t.row + r, rows, t.column + j, n, ub)
            v = u
            if job.reads_pair:
                v = view(job, k, &job.v, dense_v, direct_v and inside, t.row + r, rows, t.column + j, n, vb)
            if job.gated:
                u = gated(job, k, inside, &u, &v, t.row + r, rows, t.column + j, n, gates, gb)
            add_rows(&u, &v, rows, k.ahead, m, p + j, q + j, job.reads_pair, shifted,
                     job.reads_pair and job.omits, first + j, second + j, gates)
            j += n


cdef enum:
    APART = CHUNK + 5 * LANES  # numbers of columns: not a power of two, or all would share some sets of a first level cache


cdef bint spread_means(const Job* job, const Tile* t, double* means, double* room, bint* far) noexcept nogil:
    """The means that columns of a gradient have, and which are far from 0; whether any is."""
    cdef const double* mean
    cdef const double* variance
    cdef Py_ssize_t c = t.column // job.inner % job.channels, s = t.column % job.inner, j = 0, i, n
    cdef double value
    cdef bint distant, some = False
    while j < t.columns and job.inner == 1:
        n = min(t.columns - j, job.channels - c)
        mean = loaded(&job.mean, c, n, 0, means + j)
        variance = loaded(&job.variance, c, n, 1, room)
        for i in range(n):
            means[j + i] = mean[i]
            far[j + i] = is_far(mean[i], variance[i])
            some |= far[j + i]
        j += n
        c = 0
    while j < t.columns:
        n = min(t.columns - j, job.inner - s)
        value = load(&job.mean, c, 0)
        distant = is_far(value, load(&job.variance, c, 1))
        some |= distant
        for i in range(j, j + n):
            means[i] = value
            far[i] = distant
        j += n
        s = 0
        c = c + 1 if c + 1 < job.channels else 0
    return some


cdef void reduce_block(const Job* job, const Cut* k, Py_ssize_t task, double* parts, const floating* gates) noexcept nogil:
    """A task's columns to its parts, lying as [block][first, second][column]."""
    cdef Tile t = tile_of(k, &k.sums, task)
    cdef double room[4 * APART + LANES]
    cdef double* p = aligned(<double*> room)
    cdef double* q = p + APART
    cdef double* first = q + APART
    cdef double* second = first + APART
    cdef bint far[CHUNK]
    cdef bint again = False
    cdef Job rest
    cdef double* part = parts + task // k.sums.chunks * 2 * k.columns + t.column
    cdef double* squares = part + k.columns
    cdef const char* u0 = job.u.data + t.row * k.positions * job.u.outer
    cdef Py_ssize_t j
    if job.weighs and not job.reads_pair:
        count_block(job, k, task, parts, gates)
        return
    memset(p, 0, whole(t.columns) * sizeof(double))
    if job.reads_pair:
        memset(q, 0, whole(t.columns) * sizeof(double))
    if floating is double and not job.reads_pair:
        for j in range(t.columns):
            p[j] = (<const floating*> (u0 + offset(job, &job.u, t.column + j)))[0]
    if job.reads_pair:
        again = spread_means(job, &t, q, first, far) and floating is float
    if job.omits and job.weights.data != NULL:  # there is NaN: without looking for it all sums would be found again
        hide_block(job, k, &t, p, q, part, squares, gates)
        return
    if job.omits:
        sum_rows(job, k, &t, p, q, True, first, second, gates)
        memcpy(part, first, t.columns * sizeof(double))
        memcpy(squares, second, t.columns * sizeof(double))
        return
    sum_rows(job, k, &t, p, q, floating is double, first, second, gates)
    if not job.reads_pair:
        for j in range(t.columns):
            part[j] = first[j]
            squares[j] = second[j]
            from_sums(p[j], t.rows, part + j, squares + j)
        if floating is float:
            for j in range(t.columns):
                far[j] = squares[j] * CANCELLED < second[j]
                again |= far[j]
                p[j] = <float> part[j]
    else:
        for j in range(t.columns):
            part[j] = first[j]
            squares[j] = second[j]
            if floating is float:
                squares[j] -= q[j] * part[j]
    if again:
        rest = behind_gate(job) if job.gated and job.kept.data != NULL else job[0]
        sum_rows(&rest, k, &t, p, q, True, first, second, gates)
        if not job.reads_pair:
            for j in range(t.columns):
                from_sums(p[j], t.rows, first + j, second + j)
        for j in range(t.columns):
            part[j] = first[j] if far[j] else part[j]
            squares[j] = second[j] if far[j] else squares[j]
    if job.weighs:
        hide_block(job, k, &t, p, q, part, squares, gates)


include "_interleaved_results.pxi"


cdef void merge_blocks(const Job* job, const Cut* k, Py_ssize_t j0, Py_ssize_t j1, double* parts) noexcept nogil:
    """Columns j0..j1 of the parts of all blocks, in order, into the first."""
    cdef double* part
    cdef Py_ssize_t block, width
    cdef double count, done = min(k.sums.height, k.rows)
    cdef double* totals = parts + 2 * k.sums.blocks * k.columns
    for block in range(1, k.sums.blocks):
        part = parts + block * 2 * k.columns
        width = j1 - j0
        count = min(k.sums.height, k.rows - block * k.sums.height)
        if k.rest and block == k.sums.blocks - 1:
            width = min(width, k.rest - j0)
            count = 1
        if job.reads_pair:
            add(parts + j0, parts + k.columns + j0, part + j0, part + k.columns + j0, width)
        elif job.weighs:
            merge_weighted(totals + j0, parts + j0, parts + k.columns + j0, totals + block * k.columns + j0, part + j0,
                           part + k.columns + j0, width)
        else:
            merge(done, parts + j0, parts + k.columns + j0, count, part + j0, part + k.columns + j0, width)
        done += count


cdef void fold_columns(const Job* job, const Cut* k, Py_ssize_t c0, Py_ssize_t c1, const double* parts) noexcept nogil:
    """The columns of channels c0..c1, in order, to job.first and job.second; channels side by side, so that one division does."""
    cdef double[SHARE] first
    cdef double[SHARE] second
    cdef double[SHARE] total
    cdef bint weighted = job.weighs and not job.reads_pair
    cdef Py_ssize_t i, s, j, m, n, c = c0
    cdef double count, done
    cdef const double* totals = parts + 2 * k.sums.blocks * k.columns
    while c < c1:
        n = min(c1 - c, <Py_ssize_t> SHARE)
        done = 0
        for i in range(k.positions):
            count = k.rows + (1 if i * job.channels * job.inner < k.rest else 0)
            for s in range(job.inner):
                j = (i * job.channels + c) * job.inner + s
                for m in range(n):
                    first[m] = parts[j + m * job.inner]
                    second[m] = parts[k.columns + j + m * job.inner]
                    if weighted:
                        total[m] = totals[j + m * job.inner]
                if done == 0:
                    memcpy(job.first + c, first, n * sizeof(double))
                    memcpy(job.second + c, second, n * sizeof(double))
                    if weighted:
                        memcpy(job.total + c, total, n * sizeof(double))
                elif job.reads_pair:
                    add(job.first + c, job.second + c, first, second, n)
                elif weighted:
                    merge_weighted(job.total + c, job.first + c, job.second + c, total, first, second, n)
                else:
                    merge(done, job.first + c, job.second + c, count, first, second, n)
                done += count
        c += n


cdef void tabulate(const Job* job, const Cut* k, Py_ssize_t c0, Py_ssize_t c1, floating* table) noexcept nogil:
    """The coefficients of the columns of channels c0..c1.

    The table is [p, a, shift, q, b][column], and behind it the same of channels where a channel has several columns.
    """
    cdef bint spread = k.columns > job.channels
    cdef Py_ssize_t stride = job.channels if spread else k.padded
    cdef floating* channel = table + 5 * k.padded if spread else table
    cdef Py_ssize_t c, i, s, j
    coefficients(job, c0, c1, stride, channel)
    for j in range(5):
        if spread:
            for i in range(k.positions):
                for c in range(c0, c1):
                    for s in range(job.inner):
                        table[j * k.padded + (i * job.channels + c) * job.inner + s] = channel[j * stride + c]
        if c1 == job.channels:
            for i in range(k.columns, k.padded):
                table[j * k.padded + i] = 0


cdef void finish_channels(const Job* job, const Cut* k, Py_ssize_t c0, Py_ssize_t c1, double* parts,
                          floating* table) noexcept nogil:
    """From the parts of channels c0..c1 to their statistics and to the coefficients of their columns."""
    cdef Py_ssize_t i
    if job.reduces:
        for i in range(k.positions):
            merge_blocks(job, k, (i * job.channels + c0) * job.inner, (i * job.channels + c1) * job.inner, parts)
        if job.first == parts:  # they are where they shall be
            pass
        elif k.columns == job.channels:
            memcpy(job.first + c0, parts + c0, (c1 - c0) * sizeof(double))
            memcpy(job.second + c0, parts + k.columns + c0, (c1 - c0) * sizeof(double))
            if job.weighs and not job.reads_pair:
                memcpy(job.total + c0, parts + 2 * k.sums.blocks * k.columns + c0, (c1 - c0) * sizeof(double))
        else:
            fold_columns(job, k, c0, c1, parts)
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
            apply_block(job, k, end - 1 - i, table, gates)


cdef int do_blocks(const Job* job, const Cut* k, double* parts, const floating* table,
                   const floating* gates) noexcept nogil:
    """Reduce all blocks to parts, or apply the table to them, in waves, looking for signals in between."""
    cdef const Grid* g = &k.sums if parts != NULL else &k.results
    cdef Py_ssize_t tasks = g.blocks * g.chunks, begin = 0, end, share
    cdef int threads = job.threads
    while begin < tasks:
        end = min(begin + g.wave, tasks)
        if threads == 1:  # a team of one would cost more than a small call
            do_tasks(job, k, begin, end, parts, table, gates)
        else:
            for share in prange(threads, schedule="static", num_threads=threads):
                do_tasks(job, k, begin + (end - begin) * share // threads,
                         begin + (end - begin) * (share + 1) // threads, parts, table, gates)
        begin = end
        if begin < tasks and job.interruptible and is_interrupted():
            return INTERRUPTED
    return DONE


cdef int do_steps(const Job* job, const Cut* k, double* parts, floating* table, floating* gates) noexcept nogil:
    cdef Py_ssize_t share, shares = (job.channels + SHARE - 1) // SHARE
    cdef int threads = job.threads, status
    cdef Job gate, rest = behind_gate(job) if job.gated and job.kept.data != NULL else job[0]
    if job.gated:
        gate = gate_of(job)
        tabulate(&gate, k, 0, job.channels, gates)
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
    status = do_blocks(&rest, k, NULL, table, gates)
    if status == DONE and job.settles:
        settle(job)
    return status


cdef struct Room:
    # Doubles of the parts of a job, and behind them of numbers per channel; bytes of its tables. All are whole lines.
    Py_ssize_t parts, numbers, tables


cdef inline Room room_of(const Job* job, const Cut* k, Py_ssize_t size) noexcept nogil:
    cdef Room room
    room.parts = room.numbers = room.tables = 0
    if job.reduces:
        room.parts = whole(k.sums.blocks * k.columns * (3 if job.weighs else 2)
                           + k.sums.blocks * k.sums.chunks * job.weights.unchecked)
        if job.first == NULL and k.columns > job.channels:
            room.numbers = 3 * whole(job.channels)
    if job.applies or job.gated:
        room.tables = 5 * (k.padded + whole(job.channels)) * (2 if job.gated else 1) * size  # a second one is of the gate
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


cdef void do_group(const Job* job, const Cut* k, Py_ssize_t c0, const Room* room, double* parts, floating* table) noexcept nogil:
    """All steps of a group of channels."""
    cdef Py_ssize_t c1 = min(c0 + k.group, job.channels)
    cdef Job own = channels_of(job, c0, c1)
    cdef Cut g = cut_group(&own, k, c1 - c0)
    own.threads = 1
    own.interruptible = False
    take_numbers(&own, &g, room, parts)
    do_steps(&own, &g, parts, table, table + 5 * (g.padded + whole(own.channels)))


cdef int do_groups(const Job* job, const Cut* k, const Room* room, double* parts, floating* table) noexcept nogil:
    cdef Py_ssize_t groups = (job.channels + k.group - 1) // k.group, share, i
    cdef Py_ssize_t numbers = room.parts + room.numbers, tables = room.tables // <Py_ssize_t> sizeof(floating)
    cdef int threads = job.threads
    if threads == 1:
        for i in range(groups):
            do_group(job, k, i * k.group, room, parts, table)
        return DONE
    for share in prange(threads, schedule="static", num_threads=threads):
        for i in range(groups * share // threads, groups * (share + 1) // threads):
            do_group(job, k, i * k.group, room, parts + share * numbers, table + share * tables)
    return DONE


cdef int do_job(const Job* job, floating* typed) noexcept nogil:
    cdef Cut k = cut(job), g
    cdef Room room
    cdef int status = NO_MEMORY, shares = 1
    cdef Job own = job[0]
    cdef size_t parts_size, tables_size
    if k.group < job.channels:
        shares = job.threads
        own = channels_of(job, 0, k.group)
        g = cut_group(&own, &k, k.group)
        room = room_of(&own, &g, sizeof(floating))
    else:
        room = room_of(job, &k, sizeof(floating))
    parts_size = ((room.parts + room.numbers) * shares + LANES) * sizeof(double)
    tables_size = room.tables * shares + LANES * sizeof(floating)
    cdef double* parts = <double*> scratch_take(parts_size) if room.parts else NULL
    cdef floating* table = <floating*> scratch_take(tables_size) if room.tables else NULL
    if (parts != NULL or not room.parts) and (table != NULL or not room.tables):
        if k.group < job.channels:
            status = do_groups(job, &k, &room, aligned(parts), aligned(table))
        else:
            take_numbers(&own, &k, &room, aligned(parts))
            status = do_steps(&own, &k, aligned(parts), aligned(table), aligned(table) + 5 * (k.padded + whole(job.channels)))
    scratch_give(parts, parts_size)
    scratch_give(table, tables_size)
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
