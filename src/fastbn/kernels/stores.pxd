"""Where results go: into the caches, or past them."""
from .job cimport NORMALIZE, TRAIN, Job
from .lanes cimport SMOOTH

cdef enum:
    # Bytes of a result from which it is stored past the caches: a plain store would read every line before it writes it.
    # The fewer arrays a pass reads, the larger the result for which caches are still worth more. Measured, not asked of
    # the system: a virtual machine reported 320 MB of last level cache.
    STREAM_INFERENCE = 9 << 22
    STREAM_TRAINING = 3 << 23
    STREAM_GRADIENT = 3 << 22


cdef inline void place_results(Job* job) noexcept nogil:
    """Decide whether they are stored past the caches; and let dy, behind its gate, be kept in dx if nobody has another place
    for it, so that the derivative is found once.

    In place the lines of y are in a cache already. dy is kept in a dx that stays in the caches, where a store costs less
    than the derivative, unless its type would round what is kept; and for every smooth activation. Not where x is, which is
    still to be read.
    """
    job.streams = (job.applies and job.y.data != job.u.data and job.y.data != job.v.data and job.y.data != job.w.data
                   and job.outer * job.channels * job.inner * job.y.size
                   >= (STREAM_INFERENCE if job.operation == NORMALIZE else STREAM_TRAINING if job.operation == TRAIN
                       else STREAM_GRADIENT))
    if (job.gated and job.kept.data == NULL and job.y.data != NULL and job.y.data != job.v.data
            and (job.gate.bend == SMOOTH or (not job.streams and job.y.size >= 4))):
        job.kept = job.y
        job.streams = False  # its lines are in a cache
