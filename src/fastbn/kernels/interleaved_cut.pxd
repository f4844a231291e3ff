"""How the interleaved driver cuts: rows of whole lanes, and blocks of rows by the shape alone."""
from .job cimport Job
from .packs cimport LANES

cdef enum:
    BLOCK = 131072     # values of a block of rows: what a block costs beside its values is then less than a tenth
    MIN_ROWS = 128     # of a block, however wide
    SHARED = 32768     # values; of more, there are
    EVEN = 4           # tasks or a multiple, so that threads have as much to do as one another
    STEP = 32          # rows taken together at most
    FEW = 8            # rows; below, positions are not put together,
    MANY = 512         # or, of a staged piece at least, below that
    LARGE = 1 << 20    # values: what is larger is not in a second level cache
    CHUNK = 1024       # columns of a task at most: sums of a gradient, or coefficients for one operand, fit a first level cache;
    HALF = 512         # of other sums, and of other results
    PIECE = 64         # columns staged at a time; dense rows that are converted are staged up to CHUNK columns
    TOGETHER = 2048    # values of all operands: rows are taken together up to this many,
    LEAST = 4          # but so many while those of one are no more; in sums of one operand twice as many
    STAGED = 2 * TOGETHER  # values of rows that are taken together, in whole lanes
    AHEAD = 2048       # values of each that are fetched in advance,
    FETCHED = 2        # or rows in results, where chunks of them are apart
    SHARE = 256        # channels that one thread finishes at a time
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
    Py_ssize_t ahead      # rows that are fetched in advance
    bint large            # an operand is in no second level cache
    Grid sums
    Grid results


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
    # Sums of some columns are in registers for so many rows; so many are staged together.
    g.step = max(min(least, least // LEAST * TOGETHER // chunk), min(<Py_ssize_t> STEP, TOGETHER // (operands * chunk)))
    g.wave = max(<Py_ssize_t> 1, WAVE // (height * chunk))
    return g


cdef inline Cut cut(const Job* job) noexcept nogil:
    cdef Cut k
    cdef Py_ssize_t columns = job.channels * job.inner
    cdef Py_ssize_t height, blocks, chunk, scaled, operands = 2 if job.reads_pair else 1
    cdef Py_ssize_t least = LEAST if job.reads_pair else 2 * LEAST
    k.positions = positions_per_row(job.outer, columns)
    k.columns = k.positions * columns
    # Never a power of two: five tables at the same place of a page would drive one another, and data, out of a cache.
    k.padded = whole(k.columns) + 5 * LANES
    k.rows = job.outer // k.positions
    k.rest = job.outer % k.positions * columns
    k.large = job.outer * columns >= LARGE
    # Rows of many columns are far apart, often by a power of two: a few lines at the same place of each would drive one
    # another out of a first level cache. They are fetched where they would come from memory.
    k.ahead = max(AHEAD // k.columns, <Py_ssize_t> (LEAST if k.large else 0))
    height = max(<Py_ssize_t> MIN_ROWS, BLOCK // k.columns // STEP * STEP)
    chunk = evenly(k.columns, CHUNK if job.reads_pair else HALF)
    scaled = evenly(k.columns, HALF if job.writes_pair else CHUNK)
    if k.rows * k.columns < SHARED:
        k.sums = grid(&k, height, chunk, operands, least)
        k.results = grid(&k, height, scaled, operands, LEAST)
        return k
    blocks = (k.rows + height * EVEN - 1) // (height * EVEN) * EVEN
    height = max(<Py_ssize_t> MIN_ROWS, (k.rows + blocks - 1) // blocks)
    k.sums = grid(&k, height, chunk, operands, least)
    k.results = grid(&k, height, scaled, operands, LEAST)
    blocks = (k.rows + height - 1) // height
    if blocks < EVEN:
        # Sums are shared by columns, results by rows: of these every thread has a stretch of memory for itself.
        k.sums = grid(&k, height, max(<Py_ssize_t> PIECE, min(chunk, whole((k.columns * blocks + EVEN - 1) // EVEN))),
                      operands, least)
        k.results = grid(&k, (k.rows + EVEN - 1) // EVEN, scaled, operands, LEAST)
    return k


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
