# Values that do not all count alike, and the sums of them, of the interleaved driver, which includes this file.

cdef inline bint dense_weights(const Job* job, const Cut* k) noexcept nogil:
    """Whether the weights of a row's columns lie side by side."""
    cdef Py_ssize_t size = job.weights.size
    return (job.weights.data != NULL and (job.inner == 1 or job.weights.inner == size)
            and (job.channels == 1 or job.weights.channel == job.inner * size)
            and (k.positions == 1 or (job.weights.repeat >= job.outer and job.weights.minor == job.channels * job.inner * size)))


cdef inline bint one_weight_per_position(const Job* job) noexcept nogil:
    return job.weights.data != NULL and job.weights.channel == 0 and (job.inner == 1 or job.weights.inner == 0)


cdef inline bint one_weight_per_row(const Job* job, const Cut* k) noexcept nogil:
    return k.positions == 1 and one_weight_per_position(job)


cdef View view_weights(const Job* job, const Cut* k, bint is_dense, bint direct, Py_ssize_t row, Py_ssize_t rows,
                       Py_ssize_t column, Py_ssize_t columns, weight* buffer) noexcept nogil:
    """The weights of some columns of some rows: in place, or in the type of the buffer, padded with zeros, and with LANES more
    behind them."""
    cdef View w
    cdef Py_ssize_t m = whole(columns), width = job.channels * job.inner
    cdef Py_ssize_t r, j, c, n
    cdef const char* x
    cdef weight* y
    cdef bint alike = one_weight_per_position(job)
    cdef bint spread = alike and not is_dense and (k.positions == 1 or columns == m == k.columns)
    cdef Walk walk
    if direct:
        w.data = <char*> weights_at(&job.weights, row * k.positions, 0, 0) + column * job.weights.size
        w.stride = k.positions * job.weights.minor // <Py_ssize_t> sizeof(weight)
        return w
    w.data = <char*> buffer
    w.stride = m
    if spread:
        take_repeated(&job.weights, row * k.positions, rows * k.positions, m // k.positions, buffer)
    for r in range(rows):
        y = buffer + r * m
        if is_dense:
            x = weights_at(&job.weights, (row + r) * k.positions, 0, 0) + column * job.weights.size
            take_weights(&job.weights, x, job.weights.size, columns, 1, y)
        elif not spread:  # one position after the other, and of a position one channel after the other
            walk = walk_from(&job.weights, (row + r) * k.positions + column // width)
            j = column % width
            while y < buffer + r * m + columns:
                n = min(width - j, <Py_ssize_t> (buffer + r * m + columns - y))
                if alike:
                    take_weights(&job.weights, walk.at, 0, n, 1, y)
                elif job.inner == 1:
                    take_weights(&job.weights, walk.at + j * job.weights.channel, job.weights.channel, n, 1, y)
                else:
                    for c in range(j, j + n):
                        x = walk.at + c // job.inner * job.weights.channel + c % job.inner * job.weights.inner
                        y[c - j] = <weight> weight_at(&job.weights, x)
                y += n
                j = 0
                walk_on(&job.weights, &walk)
        for j in range(columns, m):
            buffer[r * m + j] = 0
    return w


cdef inline int how_weighted(const Job* job, const Cut* k) noexcept nogil:
    """How results read weights: one for each row, bytes where they are, or as many as there are values, which may be staged."""
    if one_weight_per_row(job, k):
        return ONE
    return BYTES if job.weights.size == 1 and dense_weights(job, k) and job.weights.repeat >= job.outer else EACH


cdef View one_of_rows(const Job* job, Py_ssize_t row, Py_ssize_t rows, weight* buffer) noexcept nogil:
    """The weights of rows, where there is one for each."""
    take_repeated(&job.weights, row, rows, 1, buffer)
    return View(<char*> buffer, 1, 0)


cdef void check_rows(const View* w, Py_ssize_t rows, Py_ssize_t width, bint wide, double* most) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(rows):
        most[0] = larger(most[0], largest_of(w.data + i * w.stride * (8 if wide else 4), width, wide))


cdef inline Py_ssize_t choose_rows(const Job* job, Py_ssize_t row, Py_ssize_t rows, Py_ssize_t* chosen, double* ws,
                                   double* most) noexcept nogil:
    """The rows that have a weight, and it; how many there are. Also the largest weight, of unchecked ones."""
    cdef Py_ssize_t r, n = 0
    cdef Walk walk = walk_from(&job.weights, row)
    for r in range(rows):
        ws[n] = weight_at(&job.weights, walk.at)
        walk_on(&job.weights, &walk)
        if job.weights.unchecked:
            most[0] = larger(most[0], largest_of(<const char*> (ws + n), 1, True))
        chosen[n] = r
        n += ws[n] != 0
    return n


cdef void count_seen(mark* seen, Py_ssize_t n, double* total) noexcept nogil:
    """Add what was seen to count to totals, and begin anew."""
    cdef Py_ssize_t j
    for j in range(n):
        total[j] += seen[j]
        seen[j] = 0


cdef void keep_tile(const Job* job, const Cut* k, const Tile* t, const double* p, bint shifted, double* total, double* first,
                    double* second, const floating* typed) noexcept nogil:
    """`sum_rows` of values that count or do not, in moments."""
    cdef floating room[STAGED + LANES]
    cdef mark seen[CHUNK]
    cdef double ws[STEP]
    cdef Py_ssize_t chosen[STEP]
    cdef mark marks_room[STAGED + LANES]
    cdef floating* ub = aligned(room)
    cdef bint per_row = one_weight_per_row(job, k), marked = job.weights.data != NULL and not per_row
    cdef bint dense_u = dense(job, k, &job.u), direct_u = dense_u and is_native(&job.u)
    cdef bint dense_m = dense_weights(job, k), direct_m = dense_m and job.weights.repeat >= job.outer
    cdef Py_ssize_t width = t.columns // LANES * LANES if direct_u or direct_m else 0
    cdef Py_ssize_t most = CHUNK if in_stretches(job, k, &job.u) else PIECE
    cdef Py_ssize_t j, r, rows, n, m, step, picked
    cdef Py_ssize_t one = 0, since = 0  # rows, of those that count and of those seen since they were counted
    cdef bint inside
    cdef View u
    cdef View marks
    marks.data, marks.stride = NULL, 0
    memset(total, 0, whole(t.columns) * sizeof(double))
    memset(first, 0, whole(t.columns) * sizeof(double))
    memset(second, 0, whole(t.columns) * sizeof(double))
    memset(seen, 0, sizeof(seen))
    for r in range(STEP):
        chosen[r] = r
    for step in range((t.rows + k.sums.step - 1) // k.sums.step):
        r = step * k.sums.step
        picked = rows = min(k.sums.step, t.rows - r)
        if since + rows > 255:
            count_seen(seen, t.columns, total)
            since = 0
        since += rows
        if per_row:
            picked = choose_rows(job, t.row + r, rows, chosen, ws, NULL)
            one += picked
        j = 0
        while j < t.columns:
            inside = j < width
            n = min((width if inside else t.columns) - j, most)
            m = whole(n)
            u = view(job, k, &job.u, direct_u and inside, t.row + r, rows, t.column + j, n, ub)
            if marked:
                marks = view_weights(job, k, dense_m, direct_m and inside, t.row + r, rows, t.column + j, n, marks_room)
            if per_row and not job.omits:
                weigh_rows(<floating*> u.data, u.stride, <char*> ws, 0, chosen, picked, k.ahead, m, p + j, False, False,
                           shifted, total + j, first + j, second + j, NULL)
            else:
                keep_rows(<floating*> u.data, u.stride, <mark*> marks.data, marks.stride, chosen, picked, k.ahead, m, p + j,
                          job.omits, shifted, seen + j, first + j, second + j)
            j += n
    count_seen(seen, t.columns, total)
    if per_row and not job.omits:
        for j in range(t.columns):
            total[j] = one


cdef void weigh_tile(const Job* job, const Cut* k, const Tile* t, const double* p, bint shifted, bint selects, double* total,
                     double* first, double* second, double* largest_weight, const floating* typed) noexcept nogil:
    """`sum_rows` of values that have weights, in moments."""
    cdef floating room[2 * STAGED + LANES]
    cdef floating pad[CHUNK]
    cdef double weights_room[STAGED + 2 * LANES]
    cdef double ws[STEP]
    cdef Py_ssize_t chosen[STEP]
    cdef floating* ub = aligned(room)
    cdef floating* kept = ub + STAGED
    cdef double* wb = aligned(<double*> weights_room)
    cdef float* wb32 = <float*> wb
    cdef bint wide = job.weights.size == sizeof(double), stages = job.omits or selects
    cdef bint each = job.omits or not one_weight_per_row(job, k)
    cdef bint dense_u = dense(job, k, &job.u), direct_u = dense_u and is_native(&job.u)
    cdef bint dense_w = dense_weights(job, k)
    cdef bint direct_w = dense_w and job.weights.size >= 4 and job.weights.repeat >= job.outer and not stages
    cdef Py_ssize_t width = t.columns // LANES * LANES if direct_u or direct_w else 0
    cdef Py_ssize_t most = CHUNK if in_stretches(job, k, &job.u) else PIECE
    cdef Py_ssize_t j, r, i, rows, n, m, step, picked
    cdef bint inside, direct
    cdef View u, w
    cdef double one = 0
    cdef double bits[LANES]
    memset(bits, 0, sizeof(bits))
    memset(total, 0, whole(t.columns) * sizeof(double))
    memset(first, 0, whole(t.columns) * sizeof(double))
    memset(second, 0, whole(t.columns) * sizeof(double))
    for j in range(whole(t.columns)):
        pad[j] = <floating> p[j]
    w.data, w.stride = <char*> ws, 0
    for step in range((t.rows + k.sums.step - 1) // k.sums.step):
        r = step * k.sums.step
        picked = rows = min(k.sums.step, t.rows - r)
        if not each:
            picked = choose_rows(job, t.row + r, rows, chosen, ws, largest_weight)
            for i in range(picked):
                one += ws[i]
        j = 0
        while j < t.columns:
            inside = j < width
            n = min((width if inside else t.columns) - j, most)
            m = whole(n)
            u = view(job, k, &job.u, direct_u and inside, t.row + r, rows, t.column + j, n, ub)
            direct = direct_w and inside
            if each and wide:
                w = view_weights(job, k, dense_w, direct, t.row + r, rows, t.column + j, n, wb)
            elif each:
                w = view_weights(job, k, dense_w, direct, t.row + r, rows, t.column + j, n, wb32)
            if each and stages:
                if job.weights.unchecked:  # before they change
                    check_rows(&w, rows, m, wide, largest_weight)
                for i in range(rows):
                    if wide:
                        choose(<floating*> u.data + i * u.stride, wb + i * m, m, pad + j, 1, job.omits, kept + i * m)
                    else:
                        choose(<floating*> u.data + i * u.stride, wb32 + i * m, m, pad + j, 1, job.omits, kept + i * m)
                u.data, u.stride = <char*> kept, m
            weigh_rows(<floating*> u.data, u.stride, w.data, w.stride, chosen, picked, k.ahead, m, p + j, each, wide, shifted,
                       total + j, first + j, second + j, bits)
            j += n
    if each:
        largest_weight[0] = larger(largest_weight[0], largest_in(bits, wide))
    else:
        for j in range(t.columns):
            total[j] = one


cdef void hide_rows(const Job* job, const Cut* k, const Tile* t, const double* p, const double* q, double* first,
                    double* second, const floating* typed) noexcept nogil:
    """`sum_rows` of a gradient without what is missing."""
    cdef floating room[4 * STAGED + LANES]
    cdef double weights_room[STAGED + 2 * LANES]
    cdef floating* ub = aligned(room)
    cdef floating* vb = ub + STAGED
    cdef floating* hidden_u = vb + STAGED
    cdef floating* hidden_v = hidden_u + STAGED
    cdef double* wb = aligned(<double*> weights_room)
    cdef float* wb32 = <float*> wb
    cdef bint wide = job.weights.size == sizeof(double), weighted = job.weights.data != NULL
    cdef bint dense_u = dense(job, k, &job.u), dense_v = dense(job, k, &job.v)
    cdef bint direct_u = dense_u and is_native(&job.u), direct_v = dense_v and is_native(&job.v)
    cdef bint dense_w = dense_weights(job, k)
    cdef Py_ssize_t width = t.columns // LANES * LANES if direct_u or direct_v else 0
    cdef Py_ssize_t most = CHUNK if in_stretches(job, k, &job.u) and in_stretches(job, k, &job.v) else PIECE
    cdef Py_ssize_t j, r, i, rows, n, m, step
    cdef bint inside
    cdef View u, v, w, x, y
    w.data, w.stride = NULL, 0
    for step in range((t.rows + k.sums.step - 1) // k.sums.step):
        r = step * k.sums.step
        rows = min(k.sums.step, t.rows - r)
        j = 0
        while j < t.columns:
            inside = j < width
            n = min((width if inside else t.columns) - j, most)
            m = whole(n)
            u = view(job, k, &job.u, direct_u and inside, t.row + r, rows, t.column + j, n, ub)
            v = view(job, k, &job.v, direct_v and inside, t.row + r, rows, t.column + j, n, vb)
            if weighted and wide:
                w = view_weights(job, k, dense_w, False, t.row + r, rows, t.column + j, n, wb)
            elif weighted:
                w = view_weights(job, k, dense_w, False, t.row + r, rows, t.column + j, n, wb32)
            for i in range(rows):
                if wide:
                    hide(<floating*> u.data + i * u.stride, <floating*> v.data + i * v.stride,
                         wb + i * m if weighted else NULL, m, job.omits, hidden_u + i * m, hidden_v + i * m)
                else:
                    hide(<floating*> u.data + i * u.stride, <floating*> v.data + i * v.stride,
                         wb32 + i * m if weighted else NULL, m, job.omits, hidden_u + i * m, hidden_v + i * m)
            x.data, x.stride = <char*> hidden_u, m
            y.data, y.stride = <char*> hidden_v, m
            add_rows(&x, &y, rows, 0, m, p + j, q + j, True, True, False, False, step == 0, first + j, second + j, typed)
            j += n


cdef inline double* place_of_largest(const Cut* k, Py_ssize_t task, double* parts) noexcept nogil:
    """Where the largest weight of a task is."""
    return parts + 3 * k.sums.blocks * k.columns + task


cdef void count_tile(const Job* job, const Cut* k, const Tile* t, const double* p, bint shifted, bint selects, double* total,
                     double* first, double* second, double* largest_weight, const floating* typed) noexcept nogil:
    """`sum_rows` of moments of values that do not all count alike."""
    if job.weights.data == NULL or job.weights.marks:
        keep_tile(job, k, t, p, shifted or floating is double, total, first, second, typed)
    else:
        weigh_tile(job, k, t, p, shifted, selects, total, first, second, largest_weight, typed)


cdef void count_block(const Job* job, const Cut* k, Py_ssize_t task, double* parts, const floating* typed) noexcept nogil:
    """`reduce_block` of moments of values that do not all count alike; the weights of parts lie behind their sums."""
    cdef Tile t = tile_of(k, &k.sums, task)
    cdef double room[4 * CHUNK + LANES]
    cdef double* p = aligned(<double*> room)
    cdef double* total = p + CHUNK
    cdef double* first = total + CHUNK
    cdef double* second = first + CHUNK
    cdef bint far[CHUNK]
    cdef bint again = False, selects = False
    cdef double* part = parts + task // k.sums.chunks * 2 * k.columns + t.column
    cdef double* squares = part + k.columns
    cdef double* totals = parts + (2 * k.sums.blocks + task // k.sums.chunks) * k.columns + t.column
    cdef double most = 0
    cdef Py_ssize_t j
    memset(p, 0, whole(t.columns) * sizeof(double))
    count_tile(job, k, &t, p, False, False, total, first, second, &most, typed)
    if job.weights.unchecked:
        place_of_largest(k, task, parts)[0] = most
    if job.weights.data != NULL and not job.weights.marks:
        for j in range(t.columns):
            selects |= not are_finite(first[j], second[j])
        if selects:  # where all is finite that changes nothing
            count_tile(job, k, &t, p, False, True, total, first, second, &most, typed)
    for j in range(t.columns):
        totals[j] = total[j]
        part[j] = first[j]
        squares[j] = second[j]
        far[j] = from_weighted_sums(0, total[j], part + j, squares + j)
        again |= far[j]
        p[j] = <floating> part[j]
    if again:
        count_tile(job, k, &t, p, True, selects, total, first, second, &most, typed)
        for j in range(t.columns):
            if far[j]:
                part[j] = first[j]
                squares[j] = second[j]
                from_weighted_sums(p[j], total[j], part + j, squares + j)


cdef bint are_fit(const Cut* k, double* parts) noexcept nogil:
    """Whether all weights are such that their sums mean something."""
    cdef double most = 0
    cdef Py_ssize_t task
    for task in range(k.sums.blocks * k.sums.chunks):
        most = larger(most, place_of_largest(k, task, parts)[0])
    return fits(most)


cdef void hide_block(const Job* job, const Cut* k, const Tile* t, const double* p, const double* q, double* part,
                     double* squares, const floating* typed) noexcept nogil:
    """Sum the columns again whose plain sums are not finite, now without what is missing; where NaN is, all of them."""
    cdef double room[2 * CHUNK + LANES]
    cdef double* first = aligned(<double*> room)
    cdef double* second = first + CHUNK
    cdef bint again = job.omits
    cdef Py_ssize_t j
    for j in range(t.columns):
        again |= not are_finite(part[j], squares[j])
    if again:
        hide_rows(job, k, t, p, q, first, second, typed)
        for j in range(t.columns):
            if job.omits or not are_finite(part[j], squares[j]):
                part[j] = first[j]
                squares[j] = second[j]
