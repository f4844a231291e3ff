# Where the rows of operands are, in place or staged: the interleaved driver, which includes this file.

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


cdef inline Py_ssize_t neighbours(const Job* job, const Cut* k, const Operand* operand) noexcept nogil:
    """Columns that lie side by side, in each of such stretches of a row: all, those of a position, or of a channel."""
    if dense(job, k, operand):
        return k.columns
    if job.inner > 1 and operand.inner != operand.size:
        return 1
    if job.channels > 1 and operand.channel != job.inner * operand.size:
        return job.inner
    return job.channels * job.inner


cdef inline bint in_stretches(const Job* job, const Cut* k, const Operand* operand) noexcept nogil:
    """Whether an operand is staged along its rows, if it is, not down its columns: then many of these at a time."""
    return neighbours(job, k, operand) >= min(APIECE, k.columns)


cdef inline void carry(const Operand* operand, char* x, Py_ssize_t sx, Py_ssize_t n, floating* tile, Py_ssize_t st,
                       bint back) noexcept nogil:
    """n values of an operand to a tile, or back."""
    if back:
        give(operand, tile, st, n, x, sx)
    else:
        take(operand, x, sx, n, tile, st)


cdef inline void carry_stretches(const Operand* operand, char* x, const Py_ssize_t* places, Py_ssize_t first, Py_ssize_t run,
                                 Py_ssize_t columns, floating* tile, bint back) noexcept nogil:
    """Columns of a row at x as stretches of memory, the first and the last of which may be cut short."""
    cdef Py_ssize_t i = 0, j = 0, end = min(first, columns)
    while j < columns:
        carry(operand, x + places[i], operand.size, end - j, tile + j, 1, back)
        j, end, i = end, min(end + run, columns), i + 1


cdef inline void carry_rows(const Job* job, const Cut* k, const Operand* operand, Py_ssize_t row, Py_ssize_t rows,
                            Py_ssize_t column, Py_ssize_t columns, floating* tile, bint back) noexcept nogil:
    """Some columns of some rows of an operand to the rows of a tile, which are whole lanes, or back."""
    cdef Py_ssize_t stride = k.positions * operand.outer, m = whole(columns), run = neighbours(job, k, operand)
    cdef char* x = operand.data + row * stride
    cdef Py_ssize_t[STRETCHES] places
    cdef Py_ssize_t r, j = 0, n = 0
    if run < min(APIECE, k.columns):
        for j in range(columns):
            carry(operand, x + offset(job, operand, column + j), stride, rows, tile + j, m, back)
    elif run == k.columns and columns == m and stride == m * operand.size:
        carry(operand, x + column * operand.size, operand.size, rows * m, tile, 1, back)
    else:
        while j < columns:
            places[n] = offset(job, operand, column + j)
            j += run - (column + j) % run
            n += 1
        for r in range(rows):
            carry_stretches(operand, x + r * stride, places, run - column % run, run, columns, tile + r * m, back)


cdef struct View:
    # Some rows of a piece of columns, in place or staged; the stride is in values.
    char* data
    Py_ssize_t stride
    int kind  # of the values, but of weights


cdef inline View view(const Job* job, const Cut* k, const Operand* operand, bint direct, Py_ssize_t row, Py_ssize_t rows,
                      Py_ssize_t column, Py_ssize_t columns, floating* buffer) noexcept nogil:
    """The operand itself where its columns are dense and whole lanes, else a copy in the type of arithmetic, padded with zeros."""
    cdef View w
    cdef Py_ssize_t stride = k.positions * operand.outer, m = whole(columns), r, j
    if direct:
        w.data = operand.data + row * stride + column * operand.size
        w.stride, w.kind = stride // operand.size, operand.kind
        return w
    w.data = <char*> buffer
    w.stride, w.kind = m, native(buffer)
    carry_rows(job, k, operand, row, rows, column, columns, buffer, False)
    for j in range(columns, m):
        for r in range(rows):
            buffer[r * m + j] = 0
    return w


cdef inline Strips strips(const View* u, const View* v, const View* w, const View* y, Py_ssize_t rows,
                          Py_ssize_t columns, int third) noexcept nogil:
    """Rows of views, of which v is of y's kind, and w too unless it is something else (`Third`)."""
    cdef Py_ssize_t size = size_of(y.kind)
    return Strips(u.data, v.data, w.data, y.data, u.stride * size_of(u.kind), v.stride * size,
                  w.stride * (1 if third == BYTES else size), y.stride * size, rows, columns, u.kind, y.kind, third)
