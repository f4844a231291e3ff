# Sums of values that do not all count alike, of the planar driver, which includes this file.

cdef inline double* total_of(const Job* job, const Cut* k, Py_ssize_t tile, Py_ssize_t c, double* parts) noexcept nogil:
    """Where the weight of a part is: behind the sums of all parts."""
    return parts + (2 * job.channels + c) * k.tiles + tile


cdef inline double* place_of_largest(const Job* job, const Cut* k, Py_ssize_t tile, Py_ssize_t c, double* parts) noexcept nogil:
    """Where the largest weight of a part is."""
    return parts + (3 * job.channels + c) * k.tiles + tile


cdef inline Py_ssize_t padded(floating* run, Py_ssize_t n, floating pad) noexcept nogil:
    """Make a run of n values at least LANES long; how long it is then."""
    cdef Py_ssize_t i
    for i in range(n, LANES):
        run[i] = pad
    return max(n, <Py_ssize_t> LANES)


cdef void keep_tile(const Job* job, const Cut* k, Py_ssize_t tile, Py_ssize_t c0, Py_ssize_t c1, const double* p,
                    bint shifted, double* parts, floating* buffer) noexcept nogil:
    """`sum_tile` of values that count or do not, in moments."""
    cdef double sums[(2 * GROUP + 1) * LANES]
    cdef double* first = aligned(<double*> sums)
    cdef double* second = first + GROUP * LANES
    cdef Py_ssize_t counts[GROUP]
    cdef mark room[TILE + LANES]
    cdef Span t = span_of(job, k, tile)
    cdef const mark* marks = NULL
    cdef const char* at_w
    cdef const char* x
    cdef const floating* u
    cdef bint counted = True
    cdef Py_ssize_t c, i, m, next_u, images, on, n = t.n0, most = 1
    # Padding is not marked, or missing.
    cdef floating pad = NAN if job.weights.data == NULL or job.weights.inner == 0 else 0
    memset(first, 0, (c1 - c0) * LANES * sizeof(double))
    memset(second, 0, (c1 - c0) * LANES * sizeof(double))
    memset(counts, 0, sizeof(counts))
    if (t.length < SMALL_RUN and ready(&job.u, t.length, native(buffer))
            and (job.weights.data == NULL or (job.weights.inner == 1 and job.weights.repeat >= job.outer))):
        most = IMAGES
    while n < t.n1:
        images = min(most, t.n1 - n)
        on = images_on(job, k, &t, n, images, c1)
        for c in range(c1 - c0):
            if job.weights.data != NULL and (c == 0 or job.weights.channel != 0):
                at_w = weights_at(&job.weights, n, c0 + c, t.s0)
                if job.weights.inner == 0:
                    counted = weight_at(&job.weights, at_w) != 0
                elif job.weights.inner == 1 and t.length >= LANES:
                    marks = <const mark*> at_w
                else:
                    take_weights(&job.weights, at_w, job.weights.inner, t.length, 1, room)
                    for i in range(t.length, LANES):
                        room[i] = 0
                    marks = room
            if not counted:
                continue
            x = at(&job.u, n, c0 + c, t.s0)
            m = max(t.length, <Py_ssize_t> LANES)
            if marks == NULL and not job.omits:
                u = stage(&job.u, x, t.length, <floating> p[c], buffer)
                counts[c] += t.length
                reduce_any(job, True, <const char*> u, <const char*> u, 1, 1, m, p + c, p + c, shifted,
                           False, to_later(&job.u, k, c, c1 - c0, on), 0, k.second_level, False, first + c * LANES,
                           second + c * LANES, buffer)
            else:
                u = stage(&job.u, x, t.length, pad, buffer)
                next_u = to_later(&job.u, k, c, c1 - c0, on) // <Py_ssize_t> sizeof(floating)
                counts[c] += keep_run(u, job.u.outer // <Py_ssize_t> sizeof(floating), marks, job.weights.minor, images, m, p[c],
                                      job.omits, shifted, next_u, first + c * LANES, second + c * LANES)
        n += images
    put_parts(k, tile, c0, c1, first, second, parts)
    for c in range(c1 - c0):
        total_of(job, k, tile, c0 + c, parts)[0] = counts[c]


cdef const char* run_of_weights(const Job* job, const char* at_w, Py_ssize_t n, bint copied,
                                       weight* room) noexcept nogil:
    """n weights side by side, where they are or copied; then, or where there are few, LANES at least, 0 behind them."""
    cdef Py_ssize_t i
    if weights_ready(job, n, sizeof(weight)) and not copied:
        return at_w
    take_weights(&job.weights, at_w, job.weights.inner, n, 1, room)
    for i in range(n, LANES):
        room[i] = 0
    return <const char*> room


cdef void weigh_tile(const Job* job, const Cut* k, Py_ssize_t tile, Py_ssize_t c0, Py_ssize_t c1, const double* p,
                     bint shifted, bint selects, double* parts, floating* buffer) noexcept nogil:
    """`sum_tile` of values that have weights, in moments."""
    cdef double sums_room[(3 * GROUP + 1) * LANES]
    cdef double room[TILE + LANES]
    cdef double* sums = aligned(<double*> sums_room)
    cdef double* weights = aligned(<double*> room)
    cdef double* first = sums + GROUP * LANES
    cdef double* second = first + GROUP * LANES
    cdef Span t = span_of(job, k, tile)
    cdef bint wide = job.weights.size == sizeof(double)
    cdef bint stages = job.omits or selects
    cdef bint own = job.weights.channel != 0 or job.omits  # channels have sums of weights of their own
    cdef bint each = job.weights.inner != 0 or t.length < LANES or job.omits
    cdef bint checks = job.weights.unchecked
    cdef const char* w = NULL
    cdef const char* at_w
    cdef const char* x
    cdef const floating* u
    cdef bint direct = (not stages and ready(&job.u, t.length, native(buffer))
                        and (not each or weights_ready(job, t.length, sizeof(double) if wide else sizeof(float))))
    cdef bint alike = each or job.weights.channel == 0  # channels whose sums are side by side may share the weight of a run
    cdef Py_ssize_t at_once = ABREAST if k.abreast and direct and alike else 1
    cdef double one = 1
    cdef double most = 0
    cdef double bits[LANES]
    cdef floating pad
    cdef Py_ssize_t size = sizeof(floating), c, m, images, on, several, next_u, n = t.n0, most_images = 1
    cdef Py_ssize_t next_w = 1024  # bytes, in the order of memory
    if t.length < SMALL_RUN and direct and each and job.weights.repeat >= job.outer:
        most_images = IMAGES
    memset(bits, 0, sizeof(bits))
    memset(sums, 0, (c1 - c0) * LANES * sizeof(double))
    memset(first, 0, (c1 - c0) * LANES * sizeof(double))
    memset(second, 0, (c1 - c0) * LANES * sizeof(double))
    while n < t.n1:
        images = min(most_images, t.n1 - n)
        on = images_on(job, k, &t, n, images, c1)
        c = 0
        while c < c1 - c0:
            several = min(at_once, c1 - c0 - c) if own or c > 0 else 1
            if c == 0 or job.weights.channel != 0 or stages:
                at_w = weights_at(&job.weights, n, c0 + c, t.s0)
                if not each:
                    one = weight_at(&job.weights, at_w)
                    if checks:
                        most = larger(most, largest_of(<const char*> &one, 1, True))
                elif wide:
                    w = run_of_weights(job, at_w, t.length, stages, weights)
                else:
                    w = run_of_weights(job, at_w, t.length, stages, <float*> weights)
            if each or one != 0:
                x = at(&job.u, n, c0 + c, t.s0)
                u = stage(&job.u, x, t.length, <floating> p[c], buffer)
                m = max(t.length, <Py_ssize_t> LANES)
                if each and stages:
                    if checks:  # before they change
                        most = larger(most, largest_of(w, t.length, wide))
                    pad = <floating> p[c]
                    if wide:
                        choose(u, weights, t.length, &pad, 0, job.omits, buffer + TILE)
                    else:
                        choose(u, <float*> weights, t.length, &pad, 0, job.omits, buffer + TILE)
                    m = padded(buffer + TILE, t.length, <floating> p[c])
                    u = buffer + TILE
                next_u = to_later(&job.u, k, c, c1 - c0, on) // size
                weigh_runs(u, job.u.channel // size, job.u.outer // size, w, job.weights.channel, job.weights.minor, one, several,
                           images, m, p + c, each, wide, shifted, c == 0 or own, several > 1, next_u, next_w, sums + c * LANES,
                           first + c * LANES, second + c * LANES, bits)
            c += several
        n += images
    most = larger(most, largest_in(bits, wide))
    put_parts(k, tile, c0, c1, first, second, parts)
    for c in range(c1 - c0):
        total_of(job, k, tile, c0 + c, parts)[0] = fold(sums + (c * LANES if own else 0))
        if job.weights.unchecked:
            place_of_largest(job, k, tile, c0 + c, parts)[0] = most


cdef void hide_tile(const Job* job, const Cut* k, Py_ssize_t tile, Py_ssize_t c0, Py_ssize_t c1, const double* q,
                    double* parts, floating* buffer) noexcept nogil:
    """`sum_tile` of a gradient without what is missing."""
    cdef double sums[(2 * GROUP + 1) * LANES]
    cdef double* first = aligned(<double*> sums)
    cdef double* second = first + GROUP * LANES
    cdef double room[TILE + LANES]
    cdef double* weights = aligned(<double*> room)
    cdef Span t = span_of(job, k, tile)
    cdef double zero = 0
    cdef bint wide = job.weights.size == sizeof(double)
    cdef const char* w = NULL
    cdef const char* at_w
    cdef const floating* u
    cdef const floating* v
    cdef floating* hidden_u = buffer + 2 * TILE
    cdef floating* hidden_v = hidden_u + TILE
    cdef Py_ssize_t c, n, m
    for n in range(t.n0, t.n1):
        for c in range(c1 - c0):
            if job.weights.data != NULL and (c == 0 or job.weights.channel != 0):
                at_w = weights_at(&job.weights, n, c0 + c, t.s0)
                if wide:
                    w = run_of_weights(job, at_w, t.length, False, weights)
                else:
                    w = run_of_weights(job, at_w, t.length, False, <float*> weights)
            u = stage(&job.u, at(&job.u, n, c0 + c, t.s0), t.length, 0, buffer)
            v = stage(&job.v, at(&job.v, n, c0 + c, t.s0), t.length, 0, buffer + TILE)
            if wide:
                hide(u, v, <const double*> w, t.length, job.omits, hidden_u, hidden_v)
            else:
                hide(u, v, <const float*> w, t.length, job.omits, hidden_u, hidden_v)
            padded(hidden_u, t.length, 0)
            m = padded(hidden_v, t.length, 0)
            reduce_any(job, True, <const char*> hidden_u, <const char*> hidden_v, 1, 1, m, &zero, q + c, True,
                       False, 0, 0, False, n == t.n0, first + c * LANES, second + c * LANES, buffer)
    put_parts(k, tile, c0, c1, first, second, parts)


cdef void count_tile(const Job* job, const Cut* k, Py_ssize_t tile, Py_ssize_t c0, Py_ssize_t c1, const double* p,
                     bint shifted, bint selects, double* parts, floating* buffer) noexcept nogil:
    """`sum_tile` of moments of values that do not all count alike."""
    if job.weights.data == NULL or job.weights.marks:
        keep_tile(job, k, tile, c0, c1, p, shifted or floating is double, parts, buffer)
    else:
        weigh_tile(job, k, tile, c0, c1, p, shifted, selects, parts, buffer)


cdef void count_parts(const Job* job, const Cut* k, Py_ssize_t tile, Py_ssize_t c0, Py_ssize_t c1, double* parts,
                      floating* buffer) noexcept nogil:
    """`reduce_tile` of moments of values that do not all count alike."""
    cdef double p[GROUP]
    cdef double* part
    cdef double* total
    cdef bint selects
    cdef Py_ssize_t c
    memset(p, 0, sizeof(p))
    count_tile(job, k, tile, c0, c1, p, False, False, parts, buffer)
    for c in range(c1 - c0):
        part = parts + ((c0 + c) * k.tiles + tile) * 2
        total = total_of(job, k, tile, c0 + c, parts)
        selects = job.weights.data != NULL and not job.weights.marks and not are_finite(part[0], part[1])
        if selects:
            count_tile(job, k, tile, c0 + c, c0 + c + 1, p + c, False, True, parts, buffer)
        if from_weighted_sums(0, total[0], part, part + 1):
            p[c] = <floating> part[0]
            count_tile(job, k, tile, c0 + c, c0 + c + 1, p + c, True, selects, parts, buffer)
            from_weighted_sums(p[c], total[0], part, part + 1)


cdef bint are_fit(const Job* job, const Cut* k, double* parts) noexcept nogil:
    """Whether all weights are such that their sums mean something."""
    cdef double most = 0
    cdef Py_ssize_t c, tile
    for c in range(job.channels):
        for tile in range(k.tiles):
            most = larger(most, place_of_largest(job, k, tile, c, parts)[0])
    return fits(most)


cdef void merge_weighted_channel(const Job* job, const Cut* k, Py_ssize_t c, double* parts) noexcept nogil:
    """`merge_channel` of weighted moments."""
    cdef double* part = parts + c * k.tiles * 2
    cdef double* total = total_of(job, k, 0, c, parts)
    cdef Py_ssize_t tile
    job.first[c], job.second[c], job.total[c] = part[0], part[1], total[0]
    for tile in range(1, k.tiles):
        merge_weighted(job.total + c, job.first + c, job.second + c, total + tile, part + 2 * tile, part + 2 * tile + 1, 1)
