"""How the interleaved driver cuts: rows of whole lanes, and blocks of rows by the shape alone."""
from .caches cimport is_lean, is_middling, is_roomy
from .job cimport Job, summed
from .lanes cimport IN_BANDS, IN_ORDER, ROW_BY_ROW
from .lines cimport LINE, in_line
from .packs cimport LANES

cdef enum:
    BLOCK = 131072     # values of a block of rows: what a block costs beside its values is then less than a tenth
    MIN_ROWS = 128     # of a block, however wide, if there are so many for each task
    SHARED = 32768     # values; of more, there are
    EVEN = 4           # tasks or a multiple, so that threads have as much to do as one another
    STEP = 32          # rows taken together at most
    FEW = 8            # rows; below, positions are not put together,
    MANY = 512         # or, of a staged piece at least, below that
    LARGE = 13 << 21   # bytes of operands and result: more are in no cache
    CHUNK = 1024       # columns of a task at most: sums of a gradient, or coefficients for one operand, fit a first level cache;
    HALF = 512         # of other sums that are in the caches, and of other results: see `results_chunk`
    PIECE = 64         # columns staged at a time, each down its rows; along rows it is up to CHUNK
    APIECE = 4         # columns side by side at least that are staged along a row,
    STRETCHES = CHUNK // APIECE + 2  # and stretches of as many in CHUNK columns, the first and the last cut short
    TOGETHER = 2048    # values of all operands: rows are taken together up to this many,
    LEAST = 4          # but so many while those of one are no more; in sums twice as many, unless both of two operands come from memory
    STAGED = 2 * TOGETHER  # values of rows that are taken together, in whole lanes
    AHEAD = 4096       # values of all operands that are fetched in advance of sums,
    FETCHED = 2        # or rows in results, where chunks of them are apart
    SHIFTED = 1 << 20  # bytes of results, other than gradients that wait, whose packs begin with lines, though rows do not
    RETURN = 32768     # values of a block of gradients that stay in the caches
    SHARE = 256        # channels that one thread finishes at a time
    NARROW = 512       # values of operands in a row; it is no use to walk down fewer
    KEPT = 1 << 18     # bytes of operands that stay in a second level cache beside what is written
    WAVE = 1 << 26     # values between two looks for signals


cdef inline Py_ssize_t whole(Py_ssize_t n) noexcept nogil:
    """n rounded up to whole lanes."""
    return (n + LANES - 1) // LANES * LANES


cdef struct Grid:
    # How a pass is cut into tasks.
    Py_ssize_t height  # rows of a block
    Py_ssize_t blocks  # the partial row is one more
    Py_ssize_t chunk   # columns of a task
    Py_ssize_t chunks
    Py_ssize_t step    # rows taken together
    Py_ssize_t wave    # tasks between two looks for signals


cdef struct Cut:
    Py_ssize_t positions  # per row: k
    Py_ssize_t columns    # of a row
    Py_ssize_t padded     # from one table of coefficients to the next
    Py_ssize_t rows       # full rows
    Py_ssize_t rest       # columns of the last, partial row
    Py_ssize_t ahead      # rows that are fetched in advance,
    bint second_level     # to a second level cache
    bint far              # operands come from memory
    Grid sums
    Grid results
    Py_ssize_t group      # channels of a task that takes all steps, if that is not all of them


cdef inline Py_ssize_t positions_per_row(Py_ssize_t outer, Py_ssize_t columns) noexcept nogil:
    """How many positions make whole lanes, and rows of at least a staged piece; 1 where there are few positions.

    Every column has statistics of its own: rows that are wide enough alone are not put together for lanes that a few columns
    leave empty, unless there are many.
    """
    cdef Py_ssize_t k = 1
    while k * columns % LANES:  # at most LANES steps
        k += 1
    if k * columns < PIECE:
        k *= (PIECE + k * columns - 1) // (k * columns)
    return k if outer >= (FEW if columns < PIECE else MANY) * k else 1


cdef inline Py_ssize_t evenly(Py_ssize_t columns, Py_ssize_t most) noexcept nogil:
    """Columns of a chunk, whole lanes, if all are to have as many."""
    cdef Py_ssize_t n = (columns + most - 1) // most
    return min(columns, whole((columns + n - 1) // n))


cdef inline Grid grid(const Cut* k, Py_ssize_t height, Py_ssize_t chunk, Py_ssize_t operands, Py_ssize_t least) noexcept nogil:
    cdef Grid g
    g.height = height
    g.blocks = (k.rows + height - 1) // height + (1 if k.rest else 0)
    g.chunk = chunk
    g.chunks = (k.columns + chunk - 1) // chunk
    # Sums of some columns are in registers for so many rows; so many are staged together, in whole lanes.
    g.step = max(<Py_ssize_t> 1, max(min(least, least // LEAST * TOGETHER // whole(chunk)),
                                     min(<Py_ssize_t> STEP, TOGETHER // (operands * whole(chunk)))))
    g.wave = max(<Py_ssize_t> 1, WAVE // (height * chunk))
    return g


cdef inline int walk_of(bint far) noexcept nogil:
    """How to walk rows, from memory or not: on lean cores a few rows of a band may drive one another out."""
    return ROW_BY_ROW if is_lean() else IN_ORDER if far else IN_BANDS


cdef inline Py_ssize_t results_chunk(const Job* job, const Cut* k) noexcept nogil:
    """Columns of a task of results at most."""
    if not job.writes_pair or job.u.size < 4:
        return CHUNK
    if not is_lean():
        return HALF
    return k.columns if k.far else 2 * CHUNK  # in the order of memory: 2000 x 3000 0.85


cdef inline void set_grids(const Job* job, Cut* k, Py_ssize_t height, Py_ssize_t most, Py_ssize_t results_height) noexcept nogil:
    """Both grids: sums of so many rows and columns at most, and results of so many rows."""
    cdef Py_ssize_t operands = 2 if job.reads_pair else 1
    # Rows of one operand, too, are better walked whole, or where they come from memory in longer pieces, fewer together.
    cdef bint long_pieces = job.reads_pair or (is_middling() and (k.far or k.columns <= CHUNK))
    cdef Py_ssize_t chunk = min(most, evenly(k.columns, CHUNK if long_pieces else HALF))
    k.sums = grid(k, height, chunk, operands, LEAST if summed(job) > 1 and k.far else 2 * LEAST)
    k.results = grid(k, results_height, evenly(k.columns, results_chunk(job, k)), operands, LEAST)


cdef inline void set_columns(Cut* k, Py_ssize_t columns) noexcept nogil:
    k.columns = columns
    # Never a power of two: five tables at the same place of a page would drive one another, and data, out of a cache.
    k.padded = whole(columns) + 5 * LANES


cdef inline Py_ssize_t table_length(const Cut* k, Py_ssize_t channels) noexcept nogil:
    """Numbers of a table of coefficients: five per column, and behind them five per channel; it may begin within lanes."""
    return 5 * (k.padded + whole(channels)) + LANES


cdef inline Py_ssize_t group_of(const Job* job, const Cut* k) noexcept nogil:
    """Channels that a thread takes from their sums to their results, in its caches; all, where that is no use."""
    cdef Py_ssize_t most, groups, even, operands = 2 if job.reads_pair else 1
    # Twice as many of lean cores: half of 128 x 4096 columns at a time shared few sets of their caches (gradient 370 and 250 us).
    # Of roomy ones half took 1.05 times; four times as many 1.13 and 1.23 times in two of 14 rows.
    cdef Py_ssize_t times = 2 if (is_lean() or is_roomy()) and job.reduces else 1
    if (k.positions > 1 or not job.applies or job.weights.unchecked
            or k.rows * k.columns > WAVE):  # results wait for all weights, and signals are looked for
        return job.channels
    most = times * (KEPT if job.reduces else KEPT // 2) // (k.rows * job.u.size * operands)
    if most * operands < times * NARROW:
        return job.channels
    most = min(most, <Py_ssize_t> CHUNK)
    groups = (k.columns + most - 1) // most
    if job.threads > 1:
        even = max(<Py_ssize_t> EVEN, <Py_ssize_t> job.threads)
        groups = (groups + even - 1) // even * even
    return min(job.channels, whole((job.channels + groups - 1) // groups))


cdef inline Cut cut(const Job* job) noexcept nogil:
    cdef Cut k
    cdef Py_ssize_t columns = job.channels * job.inner
    cdef bint returns
    cdef Py_ssize_t height, blocks, most = CHUNK, bytes = job.outer * columns * job.u.size * (3 if job.reads_pair else 2)
    k.positions = positions_per_row(job.outer, columns)
    set_columns(&k, k.positions * columns)
    k.rows = job.outer // k.positions
    k.rest = job.outer % k.positions * columns
    k.far = bytes >= LARGE and (job.streams or not is_roomy())
    # Rows of many columns are far apart, often by a power of two: a few lines at the same place of each would drive one
    # another out of a first level cache. They are fetched where they would come from memory.
    k.ahead = max(AHEAD * (2 if is_roomy() and summed(job) * k.columns >= CHUNK else 1) // (summed(job) * k.columns),
                  <Py_ssize_t> (LEAST if k.far else 0))
    k.second_level = k.far and is_roomy() and not job.reads_pair
    height = max(<Py_ssize_t> MIN_ROWS, BLOCK // k.columns // STEP * STEP)
    k.group = group_of(job, &k)
    if k.rows * k.columns < SHARED:
        set_grids(job, &k, height, most, height)
        return k
    blocks = (k.rows + height * EVEN - 1) // (height * EVEN) * EVEN
    blocks = min(blocks, max(<Py_ssize_t> EVEN, k.rows // MIN_ROWS // EVEN * EVEN))
    height = (k.rows + blocks - 1) // blocks if k.rows > MIN_ROWS * (EVEN - 1) else <Py_ssize_t> MIN_ROWS
    blocks = (k.rows + height - 1) // height
    if blocks >= EVEN:
        # Of the gradient's two operands half at most is in a second level cache still: results, which begin at the end, are
        # cut so that they find it. In a lean one there is next to nothing to find: 1.03.
        returns = job.reads_pair and not k.far and not is_lean()
        set_grids(job, &k, height, most, max(<Py_ssize_t> LEAST, RETURN // k.columns) if returns else height)
        return k
    # Sums are shared by columns, results by rows: of these every thread has a stretch of memory for itself.
    most = max(<Py_ssize_t> PIECE, whole((k.columns * blocks + EVEN - 1) // EVEN))
    set_grids(job, &k, height, most, (k.rows + EVEN - 1) // EVEN)
    return k


cdef inline Py_ssize_t past_line(const Job* job) noexcept nogil:
    """How many channels of y lie in a line that began before it, in every row; 0 where rows lie differently.

    And of 16 bits, whose channels that are left over are staged in sums: 49 x 512 took 1.2 times.
    """
    cdef Py_ssize_t past = in_line(job.y.data)
    if job.y.size < 4 or job.inner > 1 or job.y.channel != job.y.size or job.y.outer % LINE or past % job.y.size:
        return 0
    return past // job.y.size


cdef inline Py_ssize_t begin_of(const Job* job, const Cut* k, Py_ssize_t group) noexcept nogil:
    """The first channel of a group, or behind the last group. All but the first begin with lines of y: where two threads write
    to a line of every row, they take it from one another."""
    cdef Py_ssize_t c = group * k.group
    return 0 if c == 0 else job.channels if c >= job.channels else c - past_line(job)


cdef inline Py_ssize_t largest_group(const Job* job, const Cut* k) noexcept nogil:
    return min(job.channels, k.group + past_line(job))


cdef inline Cut cut_group(const Job* job, const Cut* k, Py_ssize_t channels) noexcept nogil:
    """The cut of some channels alone: blocks, which decide about bits, are those of the whole."""
    cdef Cut g = k[0]
    g.group = channels
    set_columns(&g, channels * job.inner)
    set_grids(job, &g, k.sums.height, CHUNK, k.rows)
    return g


cdef struct Tile:
    # A block of rows by a chunk of columns.
    Py_ssize_t row, rows, column, columns


cdef inline Tile tile_of(const Cut* k, const Grid* g, Py_ssize_t task) noexcept nogil:
    cdef Tile t
    t.row = task // g.chunks * g.height
    t.rows = min(g.height, k.rows - t.row)
    t.column = task % g.chunks * g.chunk
    t.columns = min(k.columns - t.column, g.chunk)
    if k.rest and task // g.chunks == g.blocks - 1:
        t.row = k.rows
        t.rows = 1
        t.columns = max(<Py_ssize_t> 0, min(t.columns, k.rest - t.column))
    return t
