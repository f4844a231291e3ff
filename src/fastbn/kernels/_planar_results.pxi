# Results of the planar driver: planes, or pieces of them, in the order of memory.

cdef struct Runs:
    # How runs of one length are scaled; worked out once for many of them.
    Py_ssize_t length
    int kind               # in which operands are read and results written; others are staged,
    int kind_u             # and in which u is read
    Py_ssize_t together    # neighbouring channels at most that are staged at once,
    Py_ssize_t at_once     # and that are worked on by one call
    bint converts          # operands to that kind, or gathers
    bint gathers           # results in a tile, to store lines whole
    bint reads_v
    bint direct
    bint gate_direct
    Py_ssize_t step_u      # from the operand of a channel to that of the next
    Job near               # the job as *apply* sees it, with staged operands in tiles
    Job gate


cdef void prepare(const Job* job, const Cut* k, Py_ssize_t length, Runs* r, const floating* typed) noexcept nogil:
    cdef bint whole = job.y.inner == job.y.size and length >= LANES
    cdef int kind = kind_of_results(job)
    if kind > DOUBLE and (not all_ready(job, length, kind) or (job.form.bend == SMOOTH and length < SMALL_RUN)):
        kind = native(typed)  # and short runs are bent together
    cdef int kind_u = kind_beside(&job.gate if job.gated else &job.form, &job.u, kind)
    r.length, r.kind, r.kind_u = length, kind, kind_u
    r.near = job[0]
    r.reads_v = job.writes_pair or job.gated
    r.gathers = job.streams and whole and shares_lines(&job.y, k.cut, length)
    r.converts = r.gathers or not (job.u.kind == kind_u and job.y.kind == kind and (job.v.kind == kind or not r.reads_v)
                                   and (job.w.kind == kind or not job.form.third))
    r.together = job.channels
    if r.converts:
        r.together = min(side_by_side(&job.u, length, kind_u), side_by_side(&job.y, length, kind))
        if r.reads_v:
            r.together = min(r.together, side_by_side(&job.v, length, kind))
        if job.form.third:
            r.together = min(r.together, side_by_side(&job.w, length, kind))
        r.converts = r.together > 0
        r.gathers = r.gathers and r.converts
        r.together = max(r.together, <Py_ssize_t> 1)
        if r.gathers:
            r.together = min(r.together, max(<Py_ssize_t> 1, GATHERED // length) if job.y.channel == length * job.y.size else 1)
    if r.converts:
        r.near.u = staged(&job.u, length, kind_u)
        r.near.v = staged(&job.v, length, kind)
        if job.form.third:  # what a gate reads there it stages itself
            r.near.w = staged(&job.w, length, kind)
        r.near.y = in_tile(length, kind) if r.gathers else staged(&job.y, length, kind)
        r.near.streams = job.streams and job.y.kind == kind and not r.gathers
    elif job.streams and shares_lines(&job.y, k.cut, length):
        r.near.streams = False
    r.step_u = r.near.u.channel
    r.gate_direct = False
    if job.gated:
        r.gate = gate_of(&r.near)
        r.gate.y = r.near.u = in_tile(length, kind)
        r.gate_direct = all_ready(&r.gate, length, kind)
    r.direct = all_ready(&r.near, length, kind)
    r.at_once = 1
    if r.direct and (not job.gated or r.gate_direct):
        r.at_once = max(<Py_ssize_t> 1, TILE // length) if job.gated else job.channels


cdef struct WeightRuns:
    # Weights of the runs of neighbouring channels of an image, as wide as arithmetic and side by side.
    Py_ssize_t at_once  # channels whose weights are found together,
    Py_ssize_t taken    # the channel up to which they were,
    const char* w       # and where those of the last one asked for are


cdef inline WeightRuns prepare_weights(const Job* job, Py_ssize_t length) noexcept nogil:
    cdef WeightRuns r
    cdef Py_ssize_t size = job.weights.size
    # Runs of channels that lie side by side are taken together, for what is left over of a short one takes longest.
    r.at_once = 1
    if job.weights.inner == size and job.weights.channel == job.inner * size and length == job.inner:
        r.at_once = max(<Py_ssize_t> 1, TILE // length)
    r.taken, r.w = 0, NULL
    return r


cdef inline const char* weights_of(const Job* job, WeightRuns* r, Py_ssize_t length, Py_ssize_t n, Py_ssize_t c, Py_ssize_t c1,
                                   Py_ssize_t s0, floating* room) noexcept nogil:
    """Weights of the run of a channel; of an image's channels up to c1 they are asked for one after the other."""
    if c < r.taken:
        r.w += length * sizeof(floating)
    elif r.w == NULL or job.weights.channel != 0:
        r.taken = min(c1, c + r.at_once)
        r.w = run_of_weights(job, weights_at(&job.weights, n, c, s0), (r.taken - c) * length, False, room)
    return r.w


cdef void join_runs(const Job* job, Py_ssize_t n, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t s0, Py_ssize_t length,
                    const floating* table, floating* tile, line* rest) noexcept nogil:
    """`apply_image` to runs that share lines: values of a line that is not one run's alone go through a tile."""
    cdef bint weighted = is_weighted(job.form.bend) and job.form.third
    cdef WeightRuns weights = prepare_weights(job, length)
    cdef Py_ssize_t size = job.y.size, whole_line = LINE // size, c, head, end
    cdef int kind = native(tile)
    cdef const char* w
    cdef Strips x, part
    for c in range(c0, c1):
        w = at(&job.w, n, c, s0)
        if weighted:
            w = weights_of(job, &weights, length, n, c, c1, s0, tile + TILE)
        x = Strips(at(&job.u, n, c, s0), at(&job.v, n, c, s0), w, at(&job.y, n, c, s0), 0, 0, 0, 0, 1, LANES,
                   kind, kind, EACH)
        head = <Py_ssize_t> (-<size_t> x.y % LINE) // size
        end = head + (length - head) // whole_line * whole_line
        if head:
            part = x
            part.y = <char*> tile
            apply_runs(&part, table + c, job.channels, &job.form, False)
            stream_lines(rest, x.y, <char*> tile, head * size)
        part = moved(&x, 0, head * size, kind, kind)
        part.length = end - head
        apply_runs(&part, table + c, job.channels, &job.form, True)
        if end < length:
            part = moved(&x, 0, (length - LANES) * size, kind, kind)
            part.y = <char*> tile
            apply_runs(&part, table + c, job.channels, &job.form, False)
            stream_lines(rest, x.y + end * size, <char*> (tile + LANES + end - length), (length - end) * size)


cdef void apply_image(const Job* job, const Runs* r, Py_ssize_t n, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t s0,
                      const floating* table, floating* buffer, line* rest) noexcept nogil:
    """One run of each of the channels c0..c1 of an image."""
    cdef const floating* gates = table + 5 * job.channels
    cdef Py_ssize_t length = r.length, c = c0, i, m, several
    cdef int kind = r.kind
    cdef const char* u
    cdef const char* v
    cdef const char* w
    cdef const char* g
    cdef char* y
    cdef char* z
    cdef char* tile = NULL
    while c < c1:
        m = min(c1 - c, r.together)
        u = at(&job.u, n, c, s0)
        v = at(&job.v, n, c, s0)
        w = at(&job.w, n, c, s0)
        y = z = at(&job.y, n, c, s0)
        if r.converts:
            u = convert(&job.u, u, m * length, r.kind_u, buffer)
            if r.reads_v:
                v = convert(&job.v, v, m * length, kind, buffer + TILE)
            if job.form.third:
                w = convert(&job.w, w, m * length, kind, buffer + 2 * TILE)
            if r.gathers or job.y.kind != kind:
                y = <char*> buffer  # over u, which is of the same type
                if job.u.kind == r.kind_u and job.y.kind == kind:
                    y += away(y, u, z)
                tile = y
        i = c
        while i < c + m:
            several = min(c + m - i, r.at_once)
            g = u
            if job.gated:
                g = <const char*> (buffer + 3 * TILE)
                gate_runs(&r.gate, r.gate_direct, u, w if job.by_output else v, w, <char*> g, several, length, gates + i,
                          buffer + 4 * TILE)
            apply_any(&r.near, r.direct, kind, g, v, w, y, several, length, table + i, job.channels, buffer)
            u += several * r.step_u
            v += several * r.near.v.channel
            w += several * r.near.w.channel
            y += several * r.near.y.channel
            i += several
        if r.gathers and job.y.kind == kind:
            stream_lines(rest, z, tile, m * length * job.y.size)
        elif r.gathers:
            give(&job.y, buffer, 1, m * length, <char*> (buffer + TILE), job.y.size)
            stream_lines(rest, z, <char*> (buffer + TILE), m * length * job.y.size)
        elif r.converts and job.y.kind != kind:
            give(&job.y, buffer, 1, m * length, z, job.y.size)
        c += m


cdef void apply_weighted_image(const Job* job, const Cut* k, Py_ssize_t length, Py_ssize_t n, Py_ssize_t c0, Py_ssize_t c1,
                               Py_ssize_t s0, const floating* table, floating* buffer) noexcept nogil:
    """`apply_image` of a gradient whose third operand are weights."""
    cdef Job near = job[0]
    cdef WeightRuns weights = prepare_weights(job, length)
    cdef bint direct = (ready(&job.u, length, native(table)) and ready(&job.v, length, native(table))
                        and ready(&job.y, length, native(table)))
    cdef const char* w = NULL
    cdef Py_ssize_t c
    near.w.kind, near.w.size, near.w.inner = job.y.kind, sizeof(floating), sizeof(floating)
    if not is_native(&job.y):
        near.w.kind = FLOAT
    near.streams = job.streams and not shares_lines(&job.y, k.cut, length)
    for c in range(c0, c1):
        if job.form.third:
            w = weights_of(job, &weights, length, n, c, c1, s0, buffer + 2 * TILE)
        apply_any(&near, direct, native(table), at(&job.u, n, c, s0), at(&job.v, n, c, s0), w, at(&job.y, n, c, s0), 1, length,
                  table + c, job.channels, buffer)


cdef void apply_planes(const Job* job, const Cut* k, Py_ssize_t first, Py_ssize_t last, Py_ssize_t c0, Py_ssize_t c1,
                       const floating* table, floating* buffer) noexcept nogil:
    """Pieces first..last of the memory of channels c0..c1, in its order; a piece is a cut of a plane."""
    cdef Runs runs
    cdef bint weighted = is_weighted(job.form.bend)
    cdef Py_ssize_t piece = first, s0, plane, n, c, m, length
    cdef line rest
    runs.length = 0
    rest.n = 0
    while piece < last:
        s0 = piece % k.cuts * k.cut
        plane = piece // k.cuts
        n, c = plane // (c1 - c0), c0 + plane % (c1 - c0)
        m = min(c1 - c, last - piece) if k.cuts == 1 else 1
        length = min(k.cut, job.inner - s0)
        if k.joins and length > JOINED:
            join_runs(job, n, c, c + m, s0, length, table, buffer, &rest)
        elif weighted:
            apply_weighted_image(job, k, length, n, c, c + m, s0, table, buffer)
        else:
            if runs.length != length:
                prepare(job, k, length, &runs, table)
            apply_image(job, &runs, n, c, c + m, s0, table, buffer, &rest)
        piece += m
    end_line(&rest)


cdef void apply_rest(const Job* job, const Cut* k, Py_ssize_t first, Py_ssize_t last, Py_ssize_t c0, Py_ssize_t c1,
                     const floating* table, floating* buffer) noexcept nogil:
    """`apply_planes` to what is left to do: a gradient that was kept has come through its gate already."""
    cdef Job rest
    if job.gated:
        rest = behind_gate(job)
        apply_planes(&rest, k, first, last, c0, c1, table, buffer)
    else:
        apply_planes(job, k, first, last, c0, c1, table, buffer)
    if job.streams:
        fence()
