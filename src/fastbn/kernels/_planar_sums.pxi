# Sums of the planar driver, which includes this file: of tiles to parts, and of parts to channels.

cdef inline void put_parts(const Cut* k, Py_ssize_t tile, Py_ssize_t c0, Py_ssize_t c1, const double* first,
                           const double* second, double* parts) noexcept nogil:
    """The lanes of channels c0..c1 to their parts, lying as [channel][tile](first, second)."""
    cdef double* part
    cdef Py_ssize_t c
    for c in range(c1 - c0):
        part = parts + ((c0 + c) * k.tiles + tile) * 2
        part[0] = fold(first + c * LANES)
        part[1] = fold(second + c * LANES)


cdef inline Py_ssize_t images_on(const Job* job, const Cut* k, const Span* t, Py_ssize_t n, Py_ssize_t images,
                                 Py_ssize_t c1) noexcept nogil:
    """From image n, the first of so many that are summed together, to the one whose runs come next.

    After the last image of channels up to c1 that is the first one, of the channels that follow.
    """
    if n + images == t.n1 and c1 < job.channels and (not k.fused or t.n1 == job.outer):
        return (0 if k.fused else t.n0) - n
    return images


cdef inline Py_ssize_t to_later(const Operand* operand, const Cut* k, Py_ssize_t c, Py_ssize_t channels,
                                Py_ssize_t on) noexcept nogil:
    """Bytes from the run of one of so many channels to what is fetched meanwhile; what follows the last is so many images on."""
    cdef Py_ssize_t ahead = min(k.ahead, channels)
    if ahead and c + ahead >= channels:
        return on * operand.outer + (ahead - (channels if on > 0 else 0)) * operand.channel
    return k.near + ahead * operand.channel


cdef inline void fetch_later(const Operand* operand, const Cut* k, const char* x, Py_ssize_t c, Py_ssize_t runs,
                             Py_ssize_t channels, Py_ssize_t on, Py_ssize_t length) noexcept nogil:
    """Fetch what is converted after the runs at x, of so many channels from c on: `reduce_runs` only sees what has been."""
    cdef Py_ssize_t last = runs - 1
    if k.ahead:
        x += last * operand.channel + to_later(operand, k, c + last, channels, on)
    else:
        x += k.near
    fetch_lines(x, runs * length * operand.size)


cdef inline Operand staged_images(const Operand* operand, Py_ssize_t length, Py_ssize_t channels, int kind) noexcept nogil:
    """`staged`, with so many channels of each image side by side in the tile."""
    cdef Operand o = staged(operand, length, kind)
    if operand.kind != kind:
        o.outer = channels * o.channel
    return o


cdef inline const char* convert_images(const Operand* operand, const char* x, Py_ssize_t images, Py_ssize_t n, int kind,
                                       Py_ssize_t apart, floating* tile) noexcept nogil:
    """`convert` of n values of each of some images, which are so far apart in the tile."""
    cdef Py_ssize_t i
    for i in range(1, images):
        convert(operand, x + i * operand.outer, n, kind, tile + i * apart)
    return convert(operand, x, n, kind, tile)


cdef void keep_small(const Operand* kept, const floating* g, Py_ssize_t apart, char* place, Py_ssize_t runs,
                     Py_ssize_t length) noexcept nogil:
    """What came through the gate, of neighbouring channels that lie so far apart, in fewer bits."""
    cdef Py_ssize_t r
    if apart == length and kept.inner == kept.size and kept.channel == length * kept.size:
        runs, length = 1, runs * length
    for r in range(runs):
        give(kept, g + r * apart, 1, length, place + r * kept.channel, kept.inner)


cdef void sum_tile(const Job* job, const Cut* k, Py_ssize_t tile, Py_ssize_t c0, Py_ssize_t c1, const double* p,
                   const double* q, bint shifted, double* parts, const floating* gates, floating* buffer) noexcept nogil:
    """Both sums of one tile of channels c0..c1 to their parts."""
    cdef double sums[(2 * GROUP + 1) * LANES]
    cdef double* first = aligned(<double*> sums)
    cdef double* second = first + GROUP * LANES
    cdef Span t = span_of(job, k, tile)
    cdef Job near = job[0]
    cdef Job gate
    cdef Operand walked
    cdef const Operand* small = NULL
    cdef Py_ssize_t together = c1 - c0
    cdef int kind = native(buffer), kind_u = kind_beside(&job.gate, &job.u, kind) if job.gated else kind
    cdef bint converts = not is_native(&job.u) or (job.reads_pair and not is_native(&job.v))
    cdef bint direct, gate_direct = False, exact = False
    cdef const char* u
    cdef const char* v
    cdef const char* w
    cdef char* g
    cdef floating* scratch = buffer + 3 * TILE if job.gated else buffer
    cdef Py_ssize_t c, n, i, m, several, at_once = 1, next_u, next_v, images, on, left, most = 1
    if converts:
        together = side_by_side(&job.u, t.length, kind_u)
        if job.reads_pair:
            together = min(together, side_by_side(&job.v, t.length, kind))
        converts = together > 0
        together = max(together, <Py_ssize_t> 1)
    if converts:
        if not job.gated and t.length < SMALL_STAGED_RUN:
            most, together = IMAGES, max(<Py_ssize_t> 1, together // IMAGES)
        near.u = staged_images(&job.u, t.length, together, kind_u)
        near.v = staged_images(&job.v, t.length, together, kind)
    walked = near.u
    if job.gated:
        gate = gate_of(&near)
        exact = job.exact.data != NULL and is_native(&job.exact)
        if job.exact.data != NULL and not exact:
            small = &job.exact
        elif job.kept.data != NULL and job.kept.data != job.exact.data:
            small = &job.kept
        if not exact:
            gate.y = in_tile(t.length, kind)
        gate_direct = all_ready(&gate, t.length, kind)
        near.u = gate.y
    direct = ready(&near.u, t.length, kind) and (not job.reads_pair or ready(&near.v, t.length, kind))
    if direct and not converts and not job.gated and t.length < SMALL_RUN:
        most = IMAGES
    if direct and (not job.gated or gate_direct):
        at_once = c1 - c0 if not job.gated or exact else max(<Py_ssize_t> 1, TILE // t.length)
    n = t.n0
    while n < t.n1:
        images = min(most, t.n1 - n)
        on = images_on(job, k, &t, n, images, c1)
        c = 0
        while c < c1 - c0:
            m = min(c1 - c0 - c, together)
            u = at(&job.u, n, c0 + c, t.s0)
            v = at(&job.v, n, c0 + c, t.s0)
            if converts:
                for i in range(images if k.fused and not is_roomy() else 0):  # there the second level fetches by itself
                    fetch_later(&job.u, k, u + i * job.u.outer, c, m, c1 - c0, on, t.length)
                    if job.reads_pair:
                        fetch_later(&job.v, k, v + i * job.v.outer, c, m, c1 - c0, on, t.length)
                u = convert_images(&job.u, u, images, m * t.length, kind_u, together * t.length, buffer)
                if job.reads_pair:
                    v = convert_images(&job.v, v, images, m * t.length, kind, together * t.length, buffer + TILE)
            i = c
            while i < c + m:
                several = min(c + m - i, at_once)
                left = c1 - c0 - k.ahead - i
                if left > 0:  # then come those that are followed by other images
                    several = min(several, left)
                # Of what was converted, that is fetched already.
                next_u = to_later(&walked, k, i, c1 - c0, 0 if converts else on)
                next_v = to_later(&near.v, k, i, c1 - c0, 0 if converts else on)
                g = <char*> u
                if job.gated:
                    w = at(&job.w, n, c0 + i, t.s0)
                    g = <char*> (buffer + 2 * TILE)
                    if exact:
                        g = at(&job.exact, n, c0 + i, t.s0)
                    gate_runs(&gate, gate_direct, u, w if job.by_output else v, w, g, several, t.length, gates + c0 + i,
                              scratch)
                    if small != NULL:
                        keep_small(small, <const floating*> g, gate.y.channel // <Py_ssize_t> sizeof(floating),
                                   at(small, n, c0 + i, t.s0), several, t.length)
                reduce_any(&near, direct, g, v, several, images, t.length, p + i, q + i, shifted, k.abreast, next_u + (u - g),
                           next_v, k.second_level, n == t.n0, first + i * LANES, second + i * LANES, scratch)
                u += several * walked.channel
                v += several * near.v.channel
                i += several
            c += m
        n += images
    put_parts(k, tile, c0, c1, first, second, parts)


cdef void reduce_tile(const Job* job, const Cut* k, Py_ssize_t tile, Py_ssize_t c0, Py_ssize_t c1, double* parts,
                      const floating* gates, floating* buffer) noexcept nogil:
    """One tile of channels c0..c1 to its parts."""
    cdef double p[GROUP]
    cdef double q[GROUP]
    cdef double* part
    cdef double squares
    cdef Job behind
    cdef const Job* rest = job
    cdef Span t = span_of(job, k, tile)
    cdef double count = (t.n1 - t.n0) * t.length, share = exact_reciprocal(count)
    cdef Py_ssize_t c, remote = 0
    cdef bint shifted
    if job.weighs and not job.reads_pair:
        count_parts(job, k, tile, c0, c1, parts, buffer)
        return
    for c in range(c1 - c0):
        p[c] = 0
        q[c] = load(&job.mean, c0 + c, 0) if job.reads_pair else 0
        remote += job.reads_pair and is_far(q[c], load(&job.variance, c0 + c, 1))
        if floating is double and not job.reads_pair:
            p[c] = (<floating*> at(&job.u, t.n0, c0 + c, t.s0))[0]
    if job.omits:  # there is NaN: without looking for it all sums would be found again
        if job.weights.data != NULL:
            hide_tile(job, k, tile, c0, c1, q, parts, buffer)
        else:
            sum_tile(job, k, tile, c0, c1, p, q, True, parts, gates, buffer)
        return
    shifted = floating is double or remote == c1 - c0
    sum_tile(job, k, tile, c0, c1, p, q, shifted, parts, gates, buffer)
    if job.gated:
        behind = behind_gate(job)
        rest = &behind
    for c in range(c1 - c0):
        part = parts + ((c0 + c) * k.tiles + tile) * 2
        if not job.reads_pair:
            squares = part[1]
            from_sums(p[c], count, share, part, part + 1)
            if floating is float and part[1] * CANCELLED < squares:
                p[c] = <float> part[0]
                sum_tile(rest, k, tile, c0 + c, c0 + c + 1, p + c, p + c, True, parts, gates, buffer)
                from_sums(p[c], count, share, part, part + 1)
        elif not shifted and is_far(q[c], load(&job.variance, c0 + c, 1)):
            sum_tile(rest, k, tile, c0 + c, c0 + c + 1, p + c, q + c, True, parts, gates, buffer)
        elif not shifted:
            part[1] -= q[c] * part[0]
        if job.weighs and not are_finite(part[0], part[1]):
            hide_tile(job, k, tile, c0 + c, c0 + c + 1, q + c, parts, buffer)


cdef inline void merge_channel(const Job* job, const Cut* k, Py_ssize_t c, double* parts) noexcept nogil:
    cdef const double* part = parts + c * k.tiles * 2
    cdef Py_ssize_t tile, images, length
    cdef double count, done
    if job.weighs and not job.reads_pair:
        merge_weighted_channel(job, k, c, parts)
        return
    job.first[c] = part[0]
    job.second[c] = part[1]
    done = min(k.images, job.outer) * k.length
    for tile in range(1, k.tiles):
        part += 2
        if job.reads_pair:
            add(job.first + c, job.second + c, part, part + 1, 1)
        else:
            images = min(k.images, job.outer - tile // k.segments * k.images)
            length = min(k.length, job.inner - tile % k.segments * k.length)
            count = images * length
            merge(done, job.first + c, job.second + c, count, part, part + 1, 1)
            done += count


cdef void merge_channels(const Job* job, const Cut* k, Py_ssize_t c0, Py_ssize_t c1, double* parts) noexcept nogil:
    """The parts of channels c0..c1, in order, to job.first and job.second."""
    cdef Py_ssize_t c
    for c in range(c0, c1):
        merge_channel(job, k, c, parts)


cdef void reduce_segments(const Job* job, const Cut* k, Py_ssize_t tile, Py_ssize_t count, Py_ssize_t c, double* parts,
                          floating* buffer) noexcept nogil:
    """Tiles of one long run, as channels of a job of their own: their sums can be side by side."""
    cdef Job own = channels_of(job, c, c + 1)
    cdef Cut one = k[0]
    cdef Py_ssize_t n = tile // k.segments, s = tile % k.segments * k.length
    own.outer, own.channels, own.inner = 1, count, k.length
    own.u.data = at(&own.u, n, 0, s)
    own.u.channel = k.length * own.u.inner
    if own.reads_pair:
        own.v.data = at(&own.v, n, 0, s)
        own.v.channel = k.length * own.v.inner
    own.mean.stride = own.variance.stride = 0
    one.segments = one.tiles = 1
    reduce_tile(&own, &one, 0, 0, count, parts + (c * k.tiles + tile) * 2, <const floating*> NULL, buffer)


cdef void reduce_tiles(const Job* job, const Cut* k, Py_ssize_t t0, Py_ssize_t t1, Py_ssize_t c0, Py_ssize_t c1,
                       double* parts, const floating* table, floating* buffer) noexcept nogil:
    """Tiles t0..t1 of channels c0..c1 in the order of memory: image after image, group after group, run after run."""
    cdef Py_ssize_t t = t0, end, i, c, first
    cdef bint abreast = k.abreast and k.segments > 1 and not job.gated and not job.weighs
    while t < t1:
        first = t // k.segments * k.segments
        end = min(first + k.segments, t1)
        c = c0
        while c < c1:
            i = t
            while abreast and i + ABREAST <= min(end, first + job.inner // k.length):
                reduce_segments(job, k, i, ABREAST, c, parts, buffer)
                i += ABREAST
            while i < end:
                reduce_tile(job, k, i, c, min(c + k.group, c1), parts, table + 5 * job.channels, buffer)
                i += 1
            c += k.group
        t = end
