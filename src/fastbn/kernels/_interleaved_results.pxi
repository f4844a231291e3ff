# Results of the interleaved driver: blocks of rows, in the order of memory.

cdef inline bint is_stretch(const Job* job, const Cut* k, const Operand* operand, int kind) noexcept nogil:
    """Whether an operand is of a kind, and its rows follow one another without a gap."""
    return operand.kind == kind and dense(job, k, operand) and k.positions * operand.outer == k.columns * operand.size


cdef inline bint lies_well(const Job* job, const Cut* k) noexcept nogil:
    """Whether every row of y starts at whole lanes, so that it can be stored past the caches."""
    return (<size_t> job.y.data % (LANES * job.y.size) == 0 and k.positions * job.y.outer % (LANES * job.y.size) == 0)


cdef inline bint waits(const Job* job, const Cut* k) noexcept nogil:
    """Whether it is a gradient to whose lines it is worth to shift packs, though nothing is stored past the caches.

    Loads wait for stores in two lines where rows are taken together, TALL ones; of fewer columns it is worth it where loads are
    shifted to lines as well. Of 16 bits it is no use.
    """
    return (job.writes_pair and job.y.size >= 4
            and (k.columns >= WIDE or in_line(job.u.data) == in_line(job.v.data) == in_line(job.y.data)))


cdef bint is_shifted(const Job* job, const Cut* k) noexcept nogil:
    """Whether all rows are one stretch of memory, not in place, and y is large, or waits, and lies otherwise: see
    `apply_stretch`."""
    cdef int kind = kind_of_results(job)
    return ((job.streams or waits(job, k) or k.rows * k.columns * job.y.size >= SHIFTED) and k.columns % LANES == 0
            and not lies_well(job, k) and not is_in_place(job) and not job.gated and not is_weighted(job.form.bend)
            and <size_t> job.y.data % job.y.size == 0
            and is_stretch(job, k, &job.u, kind_beside(&job.form, &job.u, kind)) and is_stretch(job, k, &job.y, kind)
            and (not job.writes_pair or is_stretch(job, k, &job.v, kind))
            and (not job.form.third or is_stretch(job, k, &job.w, kind)))


cdef void apply_part(const Form* form, const Strips* x, Py_ssize_t rows, Py_ssize_t columns, Py_ssize_t from_row,
                     Py_ssize_t from_column, int walk, Py_ssize_t ahead, const floating* table, Py_ssize_t stride,
                     bint stream) noexcept nogil:
    """*apply* to some rows and columns, whose coefficients begin with the table's."""
    cdef Strips part = moved(x, from_row, from_column * size_of(x.kind), x.kind_u, x.kind)
    part.count, part.length = rows, columns
    scale(form, &part, walk, ahead, table, stride, stream)


cdef void apply_stretch(const Form* form, const Strips* x, Py_ssize_t c0, Py_ssize_t c1, int walk, Py_ssize_t ahead,
                        const floating* table, Py_ssize_t stride, bint stream) noexcept nogil:
    """*apply* to columns c0..c1 of rows that are one stretch of memory, not in place, where no row of y starts at whole lanes.

    The first of these is some columns later, so all columns are taken from there to the same place of the next row. The first
    columns of a table stand behind its last once more.
    """
    cdef Py_ssize_t size = size_of(x.kind), columns = x.length, width = c1 - c0, last = x.count - 1
    cdef Py_ssize_t begin = c0 + LANES - <Py_ssize_t> (<size_t> x.y % (LANES * size)) // size
    if c0 == 0:
        apply_part(form, x, 1, LANES, 0, 0, walk, 0, table, stride, False)
    if c1 < columns:
        apply_part(form, x, x.count, width, 0, begin, walk, ahead, table + begin, stride, stream)
        return
    apply_part(form, x, last, width, 0, begin, walk, ahead, table + begin, stride, stream)
    # The end of the last row is not followed by another.
    apply_part(form, x, 1, width - LANES, last, begin, walk, 0, table + begin, stride, stream)
    apply_part(form, x, 1, LANES, last, columns - LANES, walk, 0, table + columns - LANES, stride, False)


cdef bint is_late(const Job* job, const Cut* k) noexcept nogil:
    """Whether packs of a gradient that stays in the caches and waits, not in place, begin where a line of y does in every row.

    Two packs more in a row, before and behind them, cost less than that.
    """
    return (not job.streams and not k.far and waits(job, k) and not is_in_place(job) and k.positions * job.y.outer % LINE == 0
            and <size_t> job.y.data % job.y.size == 0)


cdef inline Py_ssize_t to_line(const Job* job, const Cut* k, const Tile* t) noexcept nogil:
    """Columns of a tile before the first of such packs, or 0. The first pack and the last overlap others."""
    if t.columns < 2 * LANES or not is_late(job, k):
        return 0
    return (LINE - (in_line(job.y.data) + t.column * job.y.size) % LINE) // job.y.size % LANES


cdef void apply_block(const Job* job, const Cut* k, Py_ssize_t task, const floating* table,
                      const floating* gates) noexcept nogil:
    cdef Tile t = tile_of(k, &k.results, task)
    cdef floating room[5 * STAGED + LANES]
    cdef floating* ub = aligned(room)
    cdef floating* vb = ub + STAGED
    cdef floating* wb = vb + STAGED
    cdef floating* gb = wb + STAGED  # and behind it what the gate reads
    cdef bint dense_u = dense(job, k, &job.u), dense_y = dense(job, k, &job.y)
    cdef bint reads_v = job.writes_pair or job.gated
    cdef bint dense_v = reads_v and dense(job, k, &job.v)
    cdef bint weighted = is_weighted(job.form.bend)
    cdef bint dense_w = job.form.third and (dense_weights(job, k) if weighted else dense(job, k, &job.w))
    # Values of 16 bits are read and written where they are if all are, else staged.
    cdef int kind = kind_of_results(job)
    if kind > DOUBLE and not (dense_u and dense_y and (dense_v or not reads_v) and (dense_w or not job.form.third)):
        kind = native(table)
    cdef int kind_u = kind_beside(&job.gate if job.gated else &job.form, &job.u, kind)
    cdef bint direct_u = dense_u and job.u.kind == kind_u, direct_v = dense_v and job.v.kind == kind
    cdef bint direct_y = dense_y and job.y.kind == kind
    cdef bint direct_w = dense_w and (job.weights.size == sizeof(floating) and job.weights.repeat >= job.outer
                                      if weighted else job.w.kind == kind)
    cdef int third = how_weighted(job, k) if weighted and job.form.third else EACH
    cdef Py_ssize_t tall = min(t.rows, <Py_ssize_t> STAGED) if third == ONE else t.rows  # rows together, if nothing is staged
    cdef Py_ssize_t width = t.columns // LANES * LANES if direct_u or direct_v or direct_y or direct_w else 0
    cdef Py_ssize_t most = CHUNK if (in_stretches(job, k, &job.u) and in_stretches(job, k, &job.y)
                                     and (not reads_v or in_stretches(job, k, &job.v))) else PIECE
    if job.form.third and not weighted and not in_stretches(job, k, &job.w):
        most = PIECE
    cdef Py_ssize_t j, r, rows, n, step, high = k.results.step, start = 0, stop = t.columns
    cdef Py_ssize_t shift = 0
    cdef bint streams = job.streams and lies_well(job, k)
    # Rows that lie otherwise, where something is staged, are put together in a tile, if they are one stretch of memory. Longer
    # ones only with weights: others, which are shifted to lines if they can be, gain nothing.
    cdef bint gathers = (job.streams and not streams and most == CHUNK and t.columns == k.columns
                         and k.columns <= (GATHERED if weighted else GATHERED // 4) and k.columns % LANES == 0
                         and not is_in_place(job) and is_stretch(job, k, &job.y, kind))
    cdef bint unstaged = (direct_u and direct_y and not job.gated and (direct_v or not reads_v)
                          and (direct_w or third != EACH or not job.form.third))
    cdef bint inside, direct
    cdef int walk = walk_of(k.far and job.y.kind == kind)
    cdef bint overlaps = False  # the last lanes those before, or the first those that follow
    cdef Py_ssize_t stride = k.positions * job.u.outer // job.u.size  # columns to the next row
    cdef View u, v, w, y
    cdef Strips x
    cdef line left
    left.n = 0
    if t.columns > LANES and t.rows > 1 and is_shifted(job, k):
        u = v = w = view(job, k, &job.u, True, t.row, t.rows, 0, k.columns, ub)
        y = view(job, k, &job.y, True, t.row, t.rows, 0, k.columns, ub)
        if reads_v:
            v = view(job, k, &job.v, True, t.row, t.rows, 0, k.columns, ub)
        if job.form.third:
            w = view(job, k, &job.w, True, t.row, t.rows, 0, k.columns, ub)
        x = strips(&u, &v, &w, &y, t.rows, k.columns, EACH)
        apply_stretch(&job.form, &x, t.column, t.column + t.columns, walk, FETCHED if t.columns < k.columns else 0, table,
                      k.padded, job.streams)
        if job.streams:
            fence()
        return
    if gathers:
        direct_y = False
        high = min(high, GATHERED // k.columns)
    if unstaged and not gathers:
        high = tall  # nothing is staged but columns that are left over, after all others
        stop, most = width, max(most, width)
    # With weights three parts of a row take longer there than its loads wait for stores: 1.05 to 1.6 times.
    if unstaged and not (weighted and is_lean()):
        shift = to_line(job, k, &t)
    if shift:  # the first lanes, then all from there
        overlaps = True
        stop = LANES
    while start < t.columns:
        for step in range((t.rows + high - 1) // high):
            r = step * high
            rows = min(high, t.rows - r)
            j = start
            while j < stop:
                inside = j < width
                n = min((width if inside and not overlaps else stop) - j, most)
                u = view(job, k, &job.u, direct_u and inside, t.row + r, rows, t.column + j, n, ub)
                direct = direct_y and inside
                if direct:
                    y = view(job, k, &job.y, True, t.row + r, rows, t.column + j, n, ub)
                else:
                    y = View(<char*> ub, whole(n), kind if inside else native(table))  # over a staged u
                    if gathers and direct_u:
                        y.data += away(y.data, u.data, job.y.data + (t.row + r) * n * job.y.size)
                v = w = u
                if reads_v:
                    v = view(job, k, &job.v, direct_v and inside, t.row + r, rows, t.column + j, n, vb)
                if job.gated:
                    u = gated(job, k, inside, &u, &v, t.row + r, rows, t.column + j, n, gates, gb)
                if third == ONE:
                    w = one_of_rows(job, t.row + r, rows, wb)
                elif third == BYTES and inside:
                    w = view_weights(job, k, True, True, t.row + r, rows, t.column + j, n, <mark*> NULL)
                elif job.form.third and weighted:
                    w = view_weights(job, k, dense_w, direct_w and inside, t.row + r, rows, t.column + j, n, wb)
                elif job.form.third:
                    w = view(job, k, &job.w, direct_w and inside, t.row + r, rows, t.column + j, n, wb)
                x = strips(&u, &v, &w, &y, rows, whole(n), third if third == ONE or inside else EACH)
                scale(&job.form, &x, walk, FETCHED if n < stride else 0,
                      table + t.column + j, k.padded, streams and direct and not overlaps)
                if gathers:
                    stream_lines(&left, job.y.data + (t.row + r) * n * job.y.size, y.data, rows * n * job.y.size)
                elif not direct:
                    carry_rows(job, k, &job.y, t.row + r, rows, t.column + j, n, ub, True)
                j += n
        if shift:
            overlaps = False
            start, stop, shift = shift, shift + (t.columns - shift) // LANES * LANES, 0
            width = stop
            continue
        start, stop = stop, t.columns
        if start < stop:  # columns are left over
            high = STEP
            if walk == ROW_BY_ROW:  # too few of each: 1.02 to 1.05
                walk = IN_BANDS
            if width > 0 and not is_in_place(job):
                overlaps = True
                start, high = stop - LANES, tall if unstaged else STEP
    end_line(&left)
    if streams or gathers:
        fence()
