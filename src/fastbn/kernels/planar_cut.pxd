"""How the planar driver cuts: parts by the shape alone, tasks and pieces of results also by the caches and the threads."""
from .caches cimport is_lean, is_middling, is_roomy, own_cache
from .job cimport Job, Operand, behind_gate, kind_beside, summed
from .kinds cimport DOUBLE
from .lines cimport GATHERED, LINE, in_line
from .packs cimport ABREAST, LANES
from .strips cimport is_weighted

cdef enum:
    TILE = 4096             # values of a part at most: two such runs of float32 fill a 32 KB first level cache
    GROUP = 64              # channels taken together at most: their lanes fill half of such a cache
    IMAGES = 4              # whose runs of a channel are summed together, its lanes in registers,
    SMALL_RUN = 512         # where they are of fewer values,
    SMALL_STAGED_RUN = 128  # or of so few where they are converted first
    LONG_RUN = 1 << 16      # values; shorter neighbouring runs are summed together until they reach this
    FETCHED_RUN = 2048      # values; shorter runs end before the processor's own prefetching has paid
    FUSED_RUN = 4096        # values of operands that channels taken together for the fused pass have side by side, if they can,
    NEAR_FUSED_RUN = 16384  # or of each of them where the cores' own caches hold all,
    FEW_SHARE = 4           # or, of few images, as many of these as this part of a core's own cache holds;
    CUT_FUSED_RUN = 960     # so many at least are fused where a core's own cache does not hold more;
    SHORT_FUSED_RUN = 1536  # on roomy cores so many of short runs, or they are not fused; where cores are lean twice as many
    BACK = 1 << 15          # values of neighbouring images that are applied in the order of memory, after later ones
    NEAR = 1 << 11          # bytes that sums fetch in advance, since what the processor fetches by itself ends with every page,
    AFTER = 1 << 13         # or to a second level cache, or of long runs,
    NEXT = 2                # or runs
    SHORT_RUN = 96          # values; what is around the loops takes long where channels of so few are taken a few at a time
    SMALL = 1 << 20         # bytes of an operand that are near enough whatever the way
    SMALL_PAIR = 1 << 22    # the same of two operands
    OWN = 1 << 23           # bytes of operands of which the cores' own caches keep much
    SHARED = 1 << 24        # bytes of an operand of shorter runs that are, with the result, in a cache that cores share
    SHARE = 1 << 22         # bytes that one thread has of it at most where cores are lean
    SHARED_PAIR = 1 << 26   # the same of two operands
    JOINED = 192            # values; of longer runs only the lines that two of them share are put together
    STRETCH = 1 << 18       # bytes of one task where channels are cut
    WAVE = 1 << 28          # bytes between two looks for signals


cdef struct Cut:
    Py_ssize_t images      # per tile
    Py_ssize_t length      # of a tile's runs
    Py_ssize_t segments    # tiles per image where runs are longer than a tile, else 1
    Py_ssize_t tiles       # per channel
    Py_ssize_t group       # channels whose lanes are kept side by side
    Py_ssize_t span        # channels per task
    Py_ssize_t spans
    Py_ssize_t stretch     # tiles per task
    Py_ssize_t stretches
    Py_ssize_t wave        # tasks between two looks for signals
    Py_ssize_t cuts        # pieces of a plane, in a pass that sums nothing
    Py_ssize_t cut         # values of a piece
    Py_ssize_t pieces      # of all planes
    Py_ssize_t portion     # pieces per task of a pass that sums nothing, which may depend on the threads
    Py_ssize_t portions
    bint joins             # results are stored past the caches, in runs that share lines
    bint fused             # one task does all of its channels,
    Py_ssize_t room        # with bytes for what comes through their gate: see `wants_room`
    bint abreast           # sums take several side by side: what comes from memory is better walked in one stretch
    Py_ssize_t ahead       # they fetch in advance the runs of so many channels later,
    Py_ssize_t near        # or so many bytes of the same run,
    bint second_level      # to a second level cache


cdef inline bint shares_lines(const Operand* operand, Py_ssize_t cut, Py_ssize_t length) noexcept nogil:
    """Whether runs of that length, of planes that are cut so, start or end within a line of a cache."""
    cdef Py_ssize_t places = in_line(operand.data) | operand.outer | operand.channel
    return (places | (cut | length) * operand.size) % LINE != 0


cdef inline bint ready(const Operand* operand, Py_ssize_t n, int kind) noexcept nogil:
    """Whether a run of a kind needs no staging."""
    return operand.kind == kind and operand.inner == operand.size and n >= LANES


cdef inline bint all_ready(const Job* job, Py_ssize_t n, int kind) noexcept nogil:
    """Whether no run that *apply* is about needs staging."""
    return (ready(&job.u, n, kind_beside(&job.form, &job.u, kind)) and ready(&job.y, n, kind)
            and (not job.writes_pair or ready(&job.v, n, kind)) and (not job.form.third or ready(&job.w, n, kind)))


cdef inline bint weights_ready(const Job* job, Py_ssize_t n, Py_ssize_t size) noexcept nogil:
    """Whether those of a run of n values are of that size and need no staging."""
    return job.weights.size == size and job.weights.inner == size and n >= LANES


cdef inline bint joins(const Job* job, const Cut* k) noexcept nogil:
    """Whether results can be stored past the caches from registers, but for lines that two runs share."""
    cdef Job rest
    if not (job.streams and k.length > JOINED and shares_lines(&job.y, k.cut, k.length)):
        return False
    if job.gated and job.exact.data == NULL:
        return False
    rest = behind_gate(job)
    if is_weighted(job.form.bend):  # weights are staged where they have to be
        rest.form.third = False
    return rest.y.kind <= DOUBLE and <size_t> rest.y.data % rest.y.size == 0 and all_ready(&rest, k.length, rest.y.kind)


cdef inline bint weighs_each(const Job* job) noexcept nogil:
    """Whether a gradient's results read weights as large as x."""
    return is_weighted(job.form.bend) and job.form.third and not job.weights.marks and job.weights.channel != 0


cdef inline bint sums_weights(const Job* job) noexcept nogil:
    """Whether sums read weights as large as x beside it."""
    return summed(job) > 1 and not job.reads_pair


cdef inline bint goes_in_order(const Job* job, Py_ssize_t bytes) noexcept nogil:
    """Whether it is better to walk memory in its order twice than to take some channels of it at a time."""
    cdef bint pair = summed(job) > 1
    # Of 16 bits on lean cores gradients (64 x 64 x 32 x 32 0.87 and 0.80, in a loop and cold), and channels that are many runs of
    # middling length (64 x 64 x 64 x 64, training 0.84 and 0.86, of uint8 0.98 and 0.94): conversions leave memory time.
    if is_lean() and job.u.size < 4 and (job.reads_pair and bytes > SMALL_PAIR
                                         or FETCHED_RUN <= job.inner <= TILE and job.outer > 8):
        return True
    # On lean cores, where channels are too few to have long runs side by side: training, gradients and those behind relu of
    # 32 x 4 x 56 x 56 0.79, 0.83 and 0.82, of 32 x 16 x 56 x 56 0.98, 0.84 and 0.90, cold 0.99 and 1.02.
    if (is_lean() and bytes > SMALL and job.u.size >= 4 and FETCHED_RUN <= job.inner <= TILE
            and job.channels // (2 * job.threads) * job.inner < NEAR_FUSED_RUN):
        return True
    if is_roomy() or is_lean():
        # 1024 x 16 x 8 x 8, four channels at a time: training 220 and 470 us, 512 x 32 x 10 x 10, eight: 360 and 470. On lean
        # cores 256 x 32 x 16 x 16, eight: 470 and 680.
        return (job.inner < SMALL_RUN and bytes > SMALL
                and job.channels // (2 * job.threads) * job.inner < SHORT_FUSED_RUN * (2 if is_lean() else 1))
    # A channel is many runs of middling length, and what is summed is not all that comes from memory (64 x 256 x 56 x 56,
    # training 0.85 and 16 x 64 x 56 x 56, gradient 0.80 the other way; 12 x 64 x 56 x 56 1.10 and 1.21, and with a residual
    # 32 x 64 x 56 x 56 1.11);
    if FETCHED_RUN <= job.inner <= TILE and job.outer > 8:
        return not job.streams or job.form.third or job.u.size < 4 or sums_weights(job)
    # or all is in the last level cache still when it is read again, and there the order of memory is worth more than the
    # second level to short runs (32 x 1024 x 7 x 7, gradient 1.13 and 1.02, in a loop and cold, the other way), and to all
    # (16 x 256 x 28 x 28, training 1.24 and 0.87) but gradients whose operands are dy and x alone (0.76 and 0.91): weights as
    # large are read by results only (32 x 512 x 14 x 14, 1.33), or by sums only.
    return ((job.inner < SHORT_RUN and bytes > (SMALL_PAIR if pair else SMALL)
             or job.inner < FETCHED_RUN and bytes > (2 * OWN if pair else OWN) and (not job.reads_pair or weighs_each(job)))
            and bytes <= (SHARED_PAIR if pair else SHARED))


cdef inline Py_ssize_t fused_run(Py_ssize_t operands, bint far) noexcept nogil:
    """Values of an operand that channels taken together for the fused pass have side by side, if they can."""
    if is_roomy():
        return FUSED_RUN // 2 if far else NEAR_FUSED_RUN
    return (NEAR_FUSED_RUN if is_lean() and not far else FUSED_RUN) // operands


cdef inline Py_ssize_t near_cache(const Job* job) noexcept nogil:
    """Bytes of what a task sums that are still near to its core when it applies them.

    A lean core's share of the last level is near. In a loop and cold, times those of two walks in the order of memory:
    gradients 0.91 and 0.73, training 0.97 and 0.90; 64 x 256 x 56 x 56 0.70 and 0.79.
    """
    return max(own_cache, min(<Py_ssize_t> SHARE, SHARED // <Py_ssize_t> job.threads)) if is_lean() else own_cache


cdef inline Py_ssize_t fused_span(const Job* job, Py_ssize_t operands, Py_ssize_t channel_bytes, bint far) noexcept nogil:
    """Channels that are taken together for the fused pass; 0 where threads would not have some each."""
    cdef Py_ssize_t most = job.channels // (2 * job.threads), fit
    cdef Py_ssize_t span = min(most, max(<Py_ssize_t> 1, fused_run(operands, far) // job.inner))
    if not is_middling():
        return span
    if job.streams:
        fit = own_cache // channel_bytes
        return fit if fit < span and fit * job.inner * operands >= CUT_FUSED_RUN else span
    if job.inner > TILE or channel_bytes == 0:
        return span
    # Of few images more, to sum them side by side: 4 x 64 x 56 x 56, training 0.86, gradient 0.94. Of 16 images of 28 x 28 that
    # took 1.06.
    fit = min(NEAR_FUSED_RUN // operands // job.inner, own_cache // FEW_SHARE // channel_bytes)
    return max(span, min(most, fit))


cdef inline void set_fetching(const Job* job, Cut* k, Py_ssize_t bytes) noexcept nogil:
    """What sums fetch in advance, where more than that of the channel that follows."""
    cdef Py_ssize_t run = k.length * job.u.size, near
    k.second_level = is_roomy() and summed(job) == 1 and bytes > OWN
    if is_roomy():
        near = AFTER if k.second_level else NEAR
        if run < near:
            k.ahead = (near + run - 1) // run
        elif run <= 4 * near:
            k.ahead = ABREAST if k.abreast else 1
        elif not k.ahead:
            k.near = near
    elif is_middling():
        if job.inner < FETCHED_RUN or (k.segments == 1 and job.streams):
            # Of what is staged next all runs are fetched at once.
            k.ahead = 1 if job.u.size < 4 or sums_weights(job) else NEXT
        elif k.segments > 1 and bytes > SHARED and job.u.size >= 4:
            k.near = AFTER
    elif is_lean() and summed(job) == 1 and job.inner >= FETCHED_RUN and job.u.size >= 4:
        if k.segments > 1:
            k.near = NEAR
        else:
            k.ahead = 1


cdef inline Cut cut(const Job* job) noexcept nogil:
    cdef Cut k
    cdef Py_ssize_t itemsize = job.u.size
    cdef Py_ssize_t operands = summed(job)
    cdef Py_ssize_t channel_bytes = job.outer * job.inner * itemsize * operands
    cdef Py_ssize_t bytes = job.channels * channel_bytes
    # What is not in the cores' own caches, or in the one they share.
    cdef bint far = is_roomy() and bytes > job.threads * own_cache or is_lean() and bytes > SHARED
    cdef Py_ssize_t tile_bytes, row_bytes
    # The first four decide about parts, so they depend on the shape alone.
    k.segments = (job.inner + TILE - 1) // TILE
    k.length = (job.inner + k.segments - 1) // k.segments
    k.images = max(<Py_ssize_t> 1, TILE // k.length) if k.segments == 1 else 1
    k.tiles = (job.outer + k.images - 1) // k.images * k.segments
    k.room = 0
    k.group = 1
    if k.segments == 1:
        k.group = min(min(<Py_ssize_t> GROUP, job.channels), (LONG_RUN + job.inner - 1) // job.inner)
    k.span = fused_span(job, operands, channel_bytes, far)
    if k.span > 1:  # threads have as many tasks as one another
        k.spans = (job.channels + k.span * job.threads - 1) // (k.span * job.threads) * job.threads
        k.span = (job.channels + k.spans - 1) // k.spans
    k.fused = job.reduces and job.applies and k.span > 0 and channel_bytes * k.span <= near_cache(job)
    if job.weights.unchecked and not job.fresh:  # nothing is written before all of them have been seen
        k.fused = False
    k.abreast = ABREAST > 1 and bytes <= SHARED
    k.ahead, k.near = (1 if k.fused and job.inner < FETCHED_RUN and not k.abreast else 0), 0
    if goes_in_order(job, bytes):
        k.fused = False
    if k.fused and is_roomy():
        k.abreast = ABREAST > 1 and not far
        k.ahead = 1 if job.inner < TILE and not k.abreast else 0
    set_fetching(job, &k, bytes)
    tile_bytes = k.images * k.length * itemsize
    row_bytes = tile_bytes * k.segments
    if k.fused:
        k.stretch = k.tiles
    elif row_bytes * k.group <= STRETCH:  # in the order of memory
        k.span = min(job.channels, STRETCH // row_bytes // k.group * k.group)
        k.stretch = k.segments * max(<Py_ssize_t> 1, STRETCH // (row_bytes * k.span))
    else:
        k.span = k.group
        k.stretch = max(<Py_ssize_t> 1, STRETCH // (tile_bytes * k.span))
    k.stretches = (k.tiles + k.stretch - 1) // k.stretch
    if not k.fused and job.threads > 1 and k.stretches < 2 * job.threads:  # channels make up for the tasks that are missing
        k.spans = (2 * job.threads + k.stretches - 1) // k.stretches
        k.span = min(k.span, (job.channels + k.spans - 1) // k.spans)
    k.spans = (job.channels + k.span - 1) // k.span
    k.wave = max(<Py_ssize_t> 1, WAVE // (tile_bytes * k.span * k.stretch))
    k.cuts, k.cut = k.segments, k.length
    k.joins = joins(job, &k)
    if job.streams and k.length > GATHERED and not k.joins and shares_lines(&job.y, k.cut, k.length):
        # Loads and stores alternate with each tile: one as large as a first level cache would leave memory to wait.
        k.cuts = (job.inner + GATHERED - 1) // GATHERED
        k.cut = (job.inner + k.cuts - 1) // k.cuts
    k.pieces = job.outer * job.channels * k.cuts
    k.portions = job.threads * max(<Py_ssize_t> 1, k.pieces * k.cut * itemsize // (job.threads * STRETCH))
    k.portion = (k.pieces + k.portions - 1) // k.portions
    k.portions = (k.pieces + k.portion - 1) // k.portion
    return k


cdef struct Span:
    # The values of a channel that are one part: a stretch of each of some images.
    Py_ssize_t n0, n1, s0, length


cdef inline Span span_of(const Job* job, const Cut* k, Py_ssize_t tile) noexcept nogil:
    cdef Span t
    t.n0 = tile // k.segments * k.images
    t.n1 = min(t.n0 + k.images, job.outer)
    t.s0 = tile % k.segments * k.length
    t.length = min(k.length, job.inner - t.s0)
    return t
