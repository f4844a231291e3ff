# Sums of the interleaved driver: of tiles to parts, of parts to columns, and of columns to channels.

cdef void add_rows(const View* u, const View* v, Py_ssize_t rows, Py_ssize_t ahead, Py_ssize_t width, const double* p,
                   const double* q, bint pair, bint shifted, bint omits, bint second_level, bint begins, double* first,
                   double* second, const floating* typed) noexcept nogil:
    """*reduce* of views. Float64 data are always relative to a shift, and so is a gradient of which some is missing."""
    cdef const floating* x = <const floating*> u.data
    cdef const floating* x2 = <const floating*> v.data
    if omits:
        reduce_rows(x, u.stride, x2, v.stride, rows, ahead, width, p, q, True, True, True, True, False, begins, first, second)
    elif shifted or floating is double:
        if pair:
            reduce_rows(x, u.stride, x2, v.stride, rows, ahead, width, p, q, True, True, False, True, False, begins, first, second)
        else:
            reduce_rows(x, u.stride, x, u.stride, rows, ahead, width, p, p, False, True, False, True, second_level, begins,
                        first, second)
    elif pair:
        reduce_rows(x, u.stride, x2, v.stride, rows, ahead, width, p, q, True, False, False, True, False, begins, first, second)
    else:
        reduce_rows(x, u.stride, x, u.stride, rows, ahead, width, p, p, False, False, False, True, second_level, begins,
                    first, second)


cdef void add_near_rows(const View* u, const View* v, Py_ssize_t rows, Py_ssize_t width, const double* p, const double* q,
                        bint pair, bint shifted, bint begins, double* first, double* second,
                        const floating* typed) noexcept nogil:
    """`add_rows` of rows that are in the caches; two float32 operands are not shifted."""
    cdef const floating* x = <const floating*> u.data
    cdef const floating* x2 = <const floating*> v.data
    cdef Py_ssize_t su = u.stride, sv = v.stride
    if floating is double and pair:
        reduce_near_rows(x, su, x2, sv, rows, width, p, q, True, True, begins, first, second)
    elif floating is double or shifted:
        reduce_near_rows(x, su, x, su, rows, width, p, p, False, True, begins, first, second)
    elif pair:
        reduce_near_rows(x, su, x2, sv, rows, width, p, q, True, False, begins, first, second)
    else:
        reduce_near_rows(x, su, x, su, rows, width, p, p, False, False, begins, first, second)


cdef inline void fetch_rows(const Job* job, const Cut* k, const Operand* operand, Py_ssize_t row, Py_ssize_t rows,
                            Py_ssize_t column, Py_ssize_t columns) noexcept nogil:
    """Fetch columns of rows that are staged next: what the processor fetches by itself ends with every row."""
    cdef Py_ssize_t stride = k.positions * operand.outer, r
    cdef const char* x = operand.data + row * stride + offset(job, operand, column)
    for r in range(rows):
        fetch_lines(x + r * stride, columns * operand.size)


cdef void sum_rows(const Job* job, const Cut* k, const Tile* t, const double* p, const double* q, bint shifted,
                   double* first, double* second, const floating* gates) noexcept nogil:
    """Both sums of every column of a tile."""
    cdef floating room[4 * STAGED + LANES]
    cdef floating* ub = aligned(room)
    cdef floating* vb = ub + STAGED
    cdef floating* gb = vb + STAGED
    cdef bint dense_u = dense(job, k, &job.u), dense_v = job.reads_pair and dense(job, k, &job.v)
    cdef int kind_u = kind_beside(&job.gate, &job.u, native(gates)) if job.gated else native(gates)
    cdef bint direct_u = dense_u and job.u.kind == kind_u, direct_v = dense_v and is_native(&job.v)
    # What is direct is taken in whole lanes; the columns that are left over are staged.
    cdef Py_ssize_t width = t.columns // LANES * LANES if direct_u or direct_v else 0
    cdef Py_ssize_t most = CHUNK if (in_stretches(job, k, &job.u)
                                     and (not job.reads_pair or in_stretches(job, k, &job.v))) else PIECE
    if job.gated and not ((job.kept.data == NULL or in_stretches(job, k, &job.kept))
                          and (job.exact.data == NULL or in_stretches(job, k, &job.exact))
                          and (not (job.by_output or job.gate.third) or in_stretches(job, k, &job.w))):
        most = PIECE
    cdef double edge[4 * LANES]
    cdef bint unstaged = direct_u and (direct_v or not job.reads_pair) and not job.gated
    cdef bint omits = job.reads_pair and job.omits
    # Behind a tile there is nothing to fetch. A gate reads what lies ahead of the gradient itself. Shifts of two float32
    # operands are too many for the registers: 1.1 times.
    cdef bint near = (is_lean() and (not k.far if unstaged else not direct_u and not direct_v)
                      and not (shifted and job.reads_pair and (floating is float or omits)))
    cdef Py_ssize_t j, r, rows, n, m, step, high = k.sums.step, stop = t.columns
    cdef bint inside
    cdef View u, v
    if unstaged and t.columns % LANES and t.columns >= LANES:
        # The last lanes overlap those before: what is left over needs no staging, and is all that is taken from their sums.
        stop = width
        j = t.columns - LANES
        memcpy(edge, p + j, LANES * sizeof(double))
        memcpy(edge + LANES, q + j, LANES * sizeof(double))
        u = v = view(job, k, &job.u, True, t.row, t.rows, t.column + j, LANES, ub)
        if job.reads_pair:
            v = view(job, k, &job.v, True, t.row, t.rows, t.column + j, LANES, vb)
        add_rows(&u, &v, t.rows, k.ahead, LANES, edge, edge + LANES, job.reads_pair, shifted, omits, False, True,
                 edge + 2 * LANES, edge + 3 * LANES, gates)
        for j in range(width, t.columns):
            first[j] = edge[3 * LANES + j - t.columns]
            second[j] = edge[4 * LANES + j - t.columns]
    if near and unstaged and stop == width:
        high = t.rows
    for step in range((t.rows + high - 1) // high):
        r = step * high
        rows = min(high, t.rows - r)
        j = 0
        while j < stop:
            inside = j < width
            n = min((width if inside else t.columns) - j, most)
            m = whole(n)
            # Two operands gain nothing by it, and roomy cores lose: 16384 x 1024 of float16 1.3 times.
            if n < k.columns and not direct_u and not job.reads_pair and not is_roomy():
                fetch_rows(job, k, &job.u, t.row + r + rows, rows, t.column + j, n)
            u = view(job, k, &job.u, direct_u and inside, t.row + r, rows, t.column + j, n, ub)
            v = u
            if job.reads_pair:
                v = view(job, k, &job.v, direct_v and inside, t.row + r, rows, t.column + j, n, vb)
            if job.gated:
                u = gated(job, k, inside, &u, &v, t.row + r, rows, t.column + j, n, gates, gb)
            if near:
                add_near_rows(&u, &v, rows, m, p + j, q + j, job.reads_pair, shifted, step == 0, first + j, second + j, gates)
            else:
                add_rows(&u, &v, rows, k.ahead, m, p + j, q + j, job.reads_pair, shifted, omits, k.second_level, step == 0,
                         first + j, second + j, gates)
            j += n


cdef enum:
    APART = CHUNK + 5 * LANES  # numbers of columns: not a power of two, or all would share some sets of a first level cache


cdef Py_ssize_t spread_means(const Job* job, const Tile* t, double* means, double* room, bint* far) noexcept nogil:
    """The means that columns of a gradient have, and which are far from 0; how many are."""
    cdef const double* mean
    cdef const double* variance
    cdef Py_ssize_t c = t.column // job.inner % job.channels, s = t.column % job.inner, j = 0, i, n, remote = 0
    cdef double value
    cdef bint distant
    while j < t.columns and job.inner == 1:
        n = min(t.columns - j, job.channels - c)
        mean = loaded(&job.mean, c, n, 0, means + j)
        variance = loaded(&job.variance, c, n, 1, room)
        for i in range(n):
            means[j + i] = mean[i]
            far[j + i] = is_far(mean[i], variance[i])
            remote += far[j + i]
        j += n
        c = 0
    while j < t.columns:
        n = min(t.columns - j, job.inner - s)
        value = load(&job.mean, c, 0)
        distant = is_far(value, load(&job.variance, c, 1))
        for i in range(j, j + n):
            means[i] = value
            far[i] = distant
        remote += n * distant
        j += n
        s = 0
        c = c + 1 if c + 1 < job.channels else 0
    return remote


cdef void reduce_block(const Job* job, const Cut* k, Py_ssize_t task, double* parts, const floating* gates) noexcept nogil:
    """A task's columns to its parts, lying as [block][first, second][column]."""
    cdef Tile t = tile_of(k, &k.sums, task)
    cdef double room[6 * APART + LANES]
    cdef double* p = aligned(<double*> room)
    cdef double* q = p + APART
    cdef double* other = q + APART
    cdef double* other_squares = other + APART
    cdef double* first = other_squares + APART
    cdef double* second = first + APART
    cdef bint far[CHUNK]
    cdef bint shifted = floating is double or job.omits, again = False
    # Of few rows most time goes into what is done for a column: their sums are made where they stay.
    cdef bint in_parts = t.rows <= k.sums.step and t.columns % LANES == 0 and k.columns % LANES == 0
    cdef Job rest
    cdef double* part = parts + task // k.sums.chunks * 2 * k.columns + t.column
    cdef double* squares = part + k.columns
    cdef const char* u0 = job.u.data + t.row * k.positions * job.u.outer
    cdef double share = exact_reciprocal(t.rows), raw
    cdef Py_ssize_t j, remote
    if job.weighs and not job.reads_pair:
        count_block(job, k, task, parts, gates)
        return
    if in_parts:
        first, second = part, squares
    if job.reads_pair:
        memset(q + t.columns // LANES * LANES, 0, LANES * sizeof(double))
        remote = spread_means(job, &t, q, other, far)
        again = remote > 0 and not shifted
        if remote == t.columns:
            shifted, again = True, False
        if shifted or again or job.weighs:
            memset(p, 0, whole(t.columns) * sizeof(double))
    elif floating is double:
        for j in range(t.columns):
            p[j] = (<const floating*> (u0 + offset(job, &job.u, t.column + j)))[0]
    if job.omits and job.weights.data != NULL:  # there is NaN: without looking for it all sums would be found again
        hide_block(job, k, &t, p, q, part, squares, gates)
        return
    sum_rows(job, k, &t, p, q, shifted, first, second, gates)
    if not job.reads_pair:
        for j in range(t.columns):
            raw = second[j]
            from_sums(p[j] if floating is double else 0, t.rows, share, first + j, second + j)
            if floating is float and t.rows > 1:  # what one value leaves is exact
                far[j] = second[j] * CANCELLED < raw
                again |= far[j]
                p[j] = <float> first[j]
    elif not shifted:
        for j in range(t.columns):
            second[j] -= q[j] * first[j]
    if again:
        rest = behind_gate(job)
        sum_rows(&rest, k, &t, p, q, True, other, other_squares, gates)
        for j in range(t.columns):
            if not job.reads_pair:
                from_sums(p[j], t.rows, share, other + j, other_squares + j)
            first[j] = other[j] if far[j] else first[j]
            second[j] = other_squares[j] if far[j] else second[j]
    if not in_parts:
        memcpy(part, first, t.columns * sizeof(double))
        memcpy(squares, second, t.columns * sizeof(double))
    if job.weighs and not job.omits:
        hide_block(job, k, &t, p, q, part, squares, gates)


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
