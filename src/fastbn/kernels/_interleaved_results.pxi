# Results of the interleaved driver: blocks of rows, in the order of memory.

cdef inline View from_column(const View* x, Py_ssize_t columns, Py_ssize_t size) noexcept nogil:
    """A view from some columns on; of rows that are one stretch of memory."""
    cdef View w = x[0]
    w.data += columns * size
    return w


cdef void apply_stretch(const Form* form, const View* u, const View* v, const View* w, const View* y, int kind, Py_ssize_t rows,
                        Py_ssize_t c0, Py_ssize_t c1, bint large, Py_ssize_t ahead, const floating* table,
                        Py_ssize_t stride, bint stream) noexcept nogil:
    """*apply* to columns c0..c1 of rows that are one stretch of memory, not in place, where no row of y starts at whole lanes.

    The first of these is some columns later, so all columns are taken from there to the same place of the next row. The first
    columns of a table stand behind its last once more. Views are of whole rows, as far apart as there are columns.
    """
    cdef Py_ssize_t size = size_of(kind), columns = y.stride, width = c1 - c0, end
    cdef Py_ssize_t before = LANES - <Py_ssize_t> (<size_t> y.data % (LANES * size)) // size
    cdef Py_ssize_t whole_rows = rows - 1 if c1 == columns else rows  # of the last one, the end is not followed by another
    cdef View us = from_column(u, c0 + before, size), vs = from_column(v, c0 + before, size)
    cdef View ws = from_column(w, c0 + before, size), ys = from_column(y, c0 + before, size)
    if c0 == 0:
        scale(form, u, v, w, y, kind, 1, LANES, False, 0, table, stride, False)
    scale(form, &us, &vs, &ws, &ys, kind, whole_rows, width, large, ahead, table + c0 + before, stride, stream)
    if whole_rows == rows:
        return
    end = whole_rows * columns
    us, vs = from_column(&us, end, size), from_column(&vs, end, size)
    ws, ys = from_column(&ws, end, size), from_column(&ys, end, size)
    scale(form, &us, &vs, &ws, &ys, kind, 1, width - LANES, False, 0, table + c0 + before, stride, stream)
    end += columns - LANES
    us, vs = from_column(u, end, size), from_column(v, end, size)
    ws, ys = from_column(w, end, size), from_column(y, end, size)
    scale(form, &us, &vs, &ws, &ys, kind, 1, LANES, False, 0, table + columns - LANES, stride, False)


cdef inline bint is_stretch(const Job* job, const Cut* k, const Operand* operand) noexcept nogil:
    """Whether an operand's rows follow one another without a gap."""
    return k.positions * operand.outer == k.columns * operand.size


cdef void apply_block(const Job* job, const Cut* k, Py_ssize_t task, const floating* table,
                      const floating* gates) noexcept nogil:
    cdef Tile t = tile_of(k, &k.results, task)
    cdef floating room[4 * STAGED + LANES]
    cdef floating* ub = aligned(room)
    cdef floating* vb = ub + STAGED
    cdef floating* wb = vb + STAGED
    cdef floating* gb = wb + STAGED
    cdef bint dense_u = dense(job, k, &job.u), dense_y = dense(job, k, &job.y)
    cdef bint reads_v = job.writes_pair or job.gated
    cdef bint dense_v = reads_v and dense(job, k, &job.v)
    cdef bint weighted = is_weighted(job.form.bend)
    cdef bint dense_w = job.form.third and (dense_weights(job, k) if weighted else dense(job, k, &job.w))
    # Values of 16 bits are read and written where they are if all are, else staged.
    cdef int kind = kind_of_results(job)
    if kind > DOUBLE and not (dense_u and dense_y and (dense_v or not reads_v) and (dense_w or not job.form.third)):
        kind = native(table)
    cdef bint direct_u = dense_u and job.u.kind == kind, direct_v = dense_v and job.v.kind == kind
    cdef bint direct_y = dense_y and job.y.kind == kind
    cdef bint direct_w = dense_w and (job.weights.size == sizeof(floating) and job.weights.repeat >= job.outer
                                      if weighted else job.w.kind == kind)
    cdef Py_ssize_t width = t.columns // LANES * LANES if direct_u or direct_v or direct_y or direct_w else 0
    cdef Py_ssize_t most = CHUNK if (in_stretches(job, k, &job.u) and in_stretches(job, k, &job.y)
                                     and (not reads_v or in_stretches(job, k, &job.v))) else PIECE
    if job.form.third and not weighted and not in_stretches(job, k, &job.w):
        most = PIECE
    cdef Py_ssize_t j, r, rows, n, step, high = k.results.step, start = 0, stop = t.columns
    # Rows of y that start at whole lanes can be stored past the caches.
    cdef bint lies_well = (<size_t> job.y.data % (LANES * job.y.size) == 0
                           and k.positions * job.y.outer % (LANES * job.y.size) == 0)
    cdef bint streams = job.streams and lies_well
    # Others are taken as one stretch of memory, if they are that; where something is staged, they are put together in a tile.
    cdef bint stretch = (not lies_well and not is_in_place(job) and direct_y and k.columns % LANES == 0
                         and is_stretch(job, k, &job.y))
    cdef bint gathers = stretch and job.streams and most == CHUNK and k.columns <= GATHERED // 4 and t.columns == k.columns
    cdef bint unstaged = (direct_u and direct_y and not job.gated and (direct_v or not reads_v)
                          and (direct_w or not job.form.third))
    cdef bint inside, direct, large = k.large and job.y.kind == kind
    cdef bint overlaps = False  # the last lanes, those before
    cdef Py_ssize_t stride = k.positions * job.u.outer // job.u.size  # columns to the next row
    cdef View u, v, w, y
    cdef line left
    left.n = 0
    if (stretch and unstaged and not weighted and t.columns > LANES and t.rows > 1
            and (job.streams or k.rows * k.columns * job.y.size >= SHIFTED)
            and <size_t> job.y.data % job.y.size == 0 and is_stretch(job, k, &job.u)
            and (is_stretch(job, k, &job.v) or not reads_v) and (is_stretch(job, k, &job.w) or not job.form.third)):
        u = v = w = view(job, k, &job.u, True, t.row, t.rows, 0, k.columns, ub)
        y = view(job, k, &job.y, True, t.row, t.rows, 0, k.columns, ub)
        if reads_v:
            v = view(job, k, &job.v, True, t.row, t.rows, 0, k.columns, ub)
        if job.form.third:
            w = view(job, k, &job.w, True, t.row, t.rows, 0, k.columns, ub)
        apply_stretch(&job.form, &u, &v, &w, &y, kind, t.rows, t.column, t.column + t.columns, large,
                      FETCHED if t.columns < k.columns else 0, table, k.padded, job.streams)
        if job.streams:
            fence()
        return
    if gathers:
        direct_y = False
        high = min(high, GATHERED // k.columns)
    if unstaged and not gathers:
        high = t.rows  # nothing is staged but columns that are left over, after all others
        stop = width
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
                    y.data, y.stride = <char*> ub, whole(n)  # over a staged u
                    if gathers and direct_u:
                        y.data += away(y.data, u.data, job.y.data + (t.row + r) * n * job.y.size)
                v = w = u
                if reads_v:
                    v = view(job, k, &job.v, direct_v and inside, t.row + r, rows, t.column + j, n, vb)
                if job.gated:
                    u = gated(job, k, inside, &u, &v, t.row + r, rows, t.column + j, n, gates, gb)
                if job.form.third and weighted:
                    w = view_weights(job, k, dense_w, direct_w and inside, t.row + r, rows, t.column + j, n, wb)
                elif job.form.third:
                    w = view(job, k, &job.w, direct_w and inside, t.row + r, rows, t.column + j, n, wb)
                scale(&job.form, &u, &v, &w, &y, kind if inside else native(table), rows, whole(n), large,
                      FETCHED if n < stride else 0, table + t.column + j, k.padded, streams and direct and not overlaps)
                if gathers:
                    stream_lines(&left, job.y.data + (t.row + r) * n * job.y.size, y.data, rows * n * job.y.size)
                elif not direct:
                    carry_rows(job, k, &job.y, t.row + r, rows, t.column + j, n, ub, True)
                j += n
        start, stop = stop, t.columns
        if start < stop:  # columns are left over
            high = STEP
            if (width > 0 and job.y.data != job.u.data and (not reads_v or job.y.data != job.v.data)
                    and job.y.data != job.w.data):
                overlaps = True
                start, high = stop - LANES, t.rows
    end_line(&left)
    if streams or gathers:
        fence()
