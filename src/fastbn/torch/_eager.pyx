"""Batch norm of tensors that plainly fit, in eager mode: from the tensors' memory straight to a driver.

A training step of a network empties the caches between two batch norms, so that every line of Python around a kernel
costs several times what it does in a loop. Here a call is one function, which looks at tensors through the C functions
that PyTorch offers for that (DLPack's exchange API, PyTorch 2.10 and newer) and either carries it out or returns None, having
touched nothing. Then `functional.dispatch` decides, the full way. What certainly fits: plain tensors of float32 or float64 in
main memory, dense, contiguous or channels_last, with parameters and running statistics of their type.
"""
from cpython.float cimport PyFloat_AS_DOUBLE, PyFloat_CheckExact
from cpython.pycapsule cimport PyCapsule_GetPointer
from cpython.ref cimport Py_DECREF
from libc.float cimport DBL_MAX
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

cimport numpy as cnp

from ..kernels._calls cimport carry_out
from ..kernels.channels cimport load_all
from ..kernels.convert cimport DOUBLE, FLOAT
from ..kernels.job cimport FROZEN, GRADIENT, NORMALIZE, TRAIN, Job, Operand, Parameter
from ..kernels.lanes cimport STRAIGHT

cnp.import_array()

# What DLPack fixes, version 1.
ctypedef struct DLTensor:
    char* data
    int32_t device
    int32_t device_id
    int32_t ndim
    uint8_t code
    uint8_t bits
    uint16_t lanes
    int64_t* shape
    int64_t* strides
    uint64_t byte_offset

ctypedef struct Managed:
    uint32_t major
    uint32_t minor
    void* owner
    void (*deleter)(Managed* self) noexcept nogil
    uint64_t flags
    DLTensor tensor

ctypedef struct ExchangeAPI:
    uint32_t major
    uint32_t minor
    void* previous
    void* allocate
    void* to_managed
    int (*adopt)(Managed* tensor, void** out) except? -1
    int (*view)(void* tensor, DLTensor* out) except? -1
    void* stream

cdef extern from *:
    """
    #define FASTBN_KEPT 64  /* results of a training step live until its end */
    """

cdef extern from "blocks.h" nogil:
    const bint HAS_BLOCKS "FASTBN_HAS_BLOCKS"
    void* block_take "fastbn_block_take"(size_t size)
    void block_give "fastbn_block_give"(void* data)

cdef enum:
    CPU = 1
    INTEGER = 0
    REAL = 2
    MOST_AXES = 5
    LINE = 64       # bytes
    # Bytes from which results live in blocks that are kept: malloc gives memory of this size back to the system at the
    # end of a training step, and every page of it is faulted in again.
    LARGE = 1 << 22
    # Blocks start at a huge page. Data start at one of so many places behind it, so that operands of one call do
    # not all compete for the same sets of the caches.
    PLACES = 16
    PLACE = 65 * LINE

cdef const ExchangeAPI* api = NULL
cdef object Tensor, TensorParameter, is_grad_enabled, transforms, modes, trace, forward_ad, apply_function
cdef object get_num_threads, get_torch_threads, resolve, gradient_any, types
cdef Py_ssize_t serial, values_per_thread


def connect(**given):
    """Take what of PyTorch and of fastbn calls need; without `api` every call is left to the full way."""
    global api, Tensor, TensorParameter, is_grad_enabled, transforms, modes, trace, forward_ad, apply_function
    global get_num_threads, get_torch_threads, resolve, gradient_any, types, serial, values_per_thread
    Tensor, TensorParameter = given["tensor"], given["parameter"]
    is_grad_enabled, transforms, modes = given["is_grad_enabled"], given["transforms"], given["modes"]
    trace, forward_ad, apply_function = given["trace"], given["forward_ad"], given["apply"]
    get_num_threads, get_torch_threads = given["get_num_threads"], given["get_torch_threads"]
    resolve, gradient_any, types = given["resolved"], given["gradient"], given["types"]
    serial, values_per_thread = given["serial"], given["values_per_thread"]
    if given["api"] is not None:
        api = <const ExchangeAPI*> PyCapsule_GetPointer(given["api"], "dlpack_exchange_api")
        if api.major != 1:
            api = NULL


cdef inline bint is_tensor(object value) noexcept:
    cdef object kind = type(value)
    return kind is Tensor or kind is TensorParameter


cdef bint view(object tensor, DLTensor* out) noexcept:
    """Look at a plain tensor in main memory."""
    if not is_tensor(tensor) or tensor.is_neg():
        return False
    try:
        api.view(<void*> tensor, out)
    except Exception:  # of another device or layout, or of no memory
        return False
    if out.device != CPU or out.lanes != 1 or out.data == NULL or out.ndim > MOST_AXES:
        return False
    out.data += out.byte_offset
    return True


cdef bint bind(Parameter* parameter, object tensor, Py_ssize_t channels, uint8_t bits) noexcept:
    """Whether it is None or a vector of a value per channel, of the type of the data."""
    cdef DLTensor seen
    parameter.data = NULL
    if tensor is None:
        return True
    if not view(tensor, &seen) or seen.ndim != 1 or seen.code != REAL or seen.bits != bits or seen.shape[0] != channels:
        return False
    parameter.data = seen.data
    parameter.stride = seen.strides[0] * (bits // 8)
    parameter.wide = bits == 64
    return True


ctypedef struct Made:
    # A tensor of ours: what PyTorch is told, and its memory.
    Managed managed
    int64_t[MOST_AXES] shape
    int64_t[MOST_AXES] strides
    void* memory
    bint in_block


cdef void unmake(Managed* managed) noexcept nogil:
    cdef Made* made = <Made*> managed.owner
    if made.in_block:
        block_give(made.memory)
    else:
        free(made.memory)
    free(made)


cdef size_t next_place = 0


cdef object make(const DLTensor* like, DLTensor* out):
    """A new tensor, uninitialized, of another's shape, type and strides; that must be dense."""
    global next_place
    cdef Made* made = <Made*> malloc(sizeof(Made))
    cdef void* tensor = NULL
    cdef size_t size = like.bits // 8, shift = LINE
    cdef int i
    if made == NULL:
        raise MemoryError
    memset(made, 0, sizeof(Made))
    for i in range(like.ndim):
        made.shape[i], made.strides[i] = like.shape[i], like.strides[i]
        size *= like.shape[i]
    if HAS_BLOCKS and size >= LARGE:
        next_place = (next_place + 1) % PLACES
        shift = next_place * PLACE
        made.in_block = True
        made.memory = block_take(size + PLACES * PLACE)
        made.managed.tensor.data = <char*> made.memory + shift
    else:
        made.memory = malloc(size + LINE)
        made.managed.tensor.data = <char*> ((<size_t> made.memory + LINE - 1) // LINE * LINE)
    if made.memory == NULL:
        free(made)
        raise MemoryError
    made.managed.major = api.major
    made.managed.owner = made
    made.managed.deleter = unmake
    made.managed.tensor.device = CPU
    made.managed.tensor.ndim = like.ndim
    made.managed.tensor.code, made.managed.tensor.bits, made.managed.tensor.lanes = like.code, like.bits, 1
    made.managed.tensor.shape, made.managed.tensor.strides = made.shape, made.strides
    out[0] = made.managed.tensor
    api.adopt(&made.managed, &tensor)
    result = <object> tensor
    Py_DECREF(result)  # the reference that the call made
    return result


cdef object make_vector(Py_ssize_t channels, uint8_t bits, Parameter* parameter):
    """A new tensor of a value per channel."""
    cdef DLTensor like, made
    cdef int64_t length = channels, stride = 1
    like.ndim, like.code, like.bits, like.shape, like.strides = 1, REAL, bits, &length, &stride
    tensor = make(&like, &made)
    parameter.data, parameter.stride, parameter.wide = made.data, bits // 8, bits == 64
    return tensor


def team(Py_ssize_t size):
    """Return how many threads a call on so many values uses: no more than PyTorch does."""
    return min(<Py_ssize_t> get_num_threads(), <Py_ssize_t> get_torch_threads(), size // values_per_thread)


cdef inline bint overlap(const char* a, Py_ssize_t a_bytes, const char* b, Py_ssize_t b_bytes) noexcept:
    return a < b + b_bytes and b < a + a_bytes


cdef inline Py_ssize_t extent(const Parameter* p, Py_ssize_t channels) noexcept:
    return (channels - 1) * p.stride + (8 if p.wide else 4)


cdef inline bint overlap_vectors(const Parameter* a, const Parameter* b, Py_ssize_t channels) noexcept:
    return b.data != NULL and overlap(a.data, extent(a, channels), b.data, extent(b, channels))


cdef inline bint is_read(const Job* job, const Parameter* moving, Py_ssize_t bytes) noexcept:
    """Whether running statistics share memory with what other channels are still to be told from."""
    cdef Py_ssize_t own = extent(moving, job.channels)
    return (overlap(job.u.data, bytes, moving.data, own)
            or (job.w.data != NULL and overlap(job.w.data, bytes, moving.data, own))
            or overlap_vectors(moving, &job.gamma, job.channels) or overlap_vectors(moving, &job.beta, job.channels))


cdef bint is_like(const DLTensor* a, const DLTensor* b) noexcept:
    """Whether both have one shape, one type and one order in memory, a being dense."""
    cdef int i
    if a.ndim != b.ndim or a.code != b.code or a.bits != b.bits:
        return False
    for i in range(a.ndim):
        if a.shape[i] != b.shape[i] or (a.strides[i] != b.strides[i] and a.shape[i] != 1):
            return False
    return True


cdef bint set_shape(Job* job, const DLTensor* x) noexcept:
    """The canonical form of dense data, contiguous or channels_last, or False."""
    cdef int i
    cdef int64_t dense = 1
    cdef bint last = False
    if x.code != REAL or (x.bits != 32 and x.bits != 64) or x.ndim < 2 or <size_t> x.data % (x.bits // 8):
        return False
    for i in range(x.ndim - 1, -1, -1):
        if x.shape[i] != 1 and x.strides[i] != dense:
            last = True
            break
        dense *= x.shape[i]
    if last:
        # As PyTorch has it: channels are neighbours, then from the last axis to the first.
        if (x.ndim != 4 and x.ndim != 5) or x.strides[1] != 1:
            return False
        dense = x.shape[1]
        for i in range(x.ndim - 1, -1, -1):
            if i != 1:
                if x.strides[i] != dense:
                    return False
                dense *= x.shape[i]
    job.channels = x.shape[1]
    job.outer, job.inner = x.shape[0], 1
    for i in range(2, x.ndim):
        job.inner *= x.shape[i]
    if last:
        job.outer *= job.inner
        job.inner = 1
    return job.outer * job.channels * job.inner > 0


cdef inline void set_operand(const Job* job, Operand* operand, const DLTensor* tensor) noexcept:
    operand.data = tensor.data
    operand.size = tensor.bits // 8
    operand.kind = DOUBLE if tensor.bits == 64 else FLOAT
    operand.inner = operand.size
    operand.channel = job.inner * operand.inner
    operand.outer = job.channels * operand.channel


cdef class Call:
    """One forward call: checked, ready to be carried out, and afterwards what its gradient needs to know."""

    cdef Job job
    cdef bint training, wide, keep
    cdef object counter
    cdef readonly double eps
    cdef readonly object activation, statistics
    cdef readonly bint frozen, has_residual
    cdef bint has_bias
    cdef object bent

    @property
    def bias_type(self):
        """The type of the bias, if there is one."""
        return types[self.wide] if self.has_bias else None


cdef bint quiet() except -1:
    """Whether nobody transforms, records or traces calls."""
    return (transforms() is None and modes() == 0 and trace() is None and forward_ad._current_level < 0)


def normalize(x, weight, bias, residual, running_mean, running_var, counter, bint training, momentum, eps, activation,
              ranks=~0):
    """Carry out a batch norm, or return None where the full way has to decide.

    Parameters
    ----------
    x, weight, bias, residual, running_mean, running_var : Tensor or None
        As in `fastbn.torch.batch_norm`.
    counter : Tensor or None
        The number of batches, which training adds 1 to.
    training, momentum, eps, activation
        As in `fastbn.torch.batch_norm`.

    Returns
    -------
    Tensor or None
        y, with its gradient where one is asked for.
    """
    cdef Call call
    cdef DLTensor seen, other
    cdef Job* job
    cdef Py_ssize_t bytes
    if api == NULL or not (PyFloat_CheckExact(momentum) and PyFloat_CheckExact(eps)) or not view(x, &seen):
        return None
    if not quiet():
        return None
    call = Call.__new__(Call)
    job = &call.job
    memset(job, 0, sizeof(Job))
    if not set_shape(job, &seen) or not (<long> ranks) >> seen.ndim & 1:
        return None
    call.wide = seen.bits == 64
    call.training = training
    call.frozen = not training
    job.keeps = 1 - PyFloat_AS_DOUBLE(momentum)
    call.eps = job.epsilon = PyFloat_AS_DOUBLE(eps)
    if not (0 <= job.keeps <= 1 and 0 <= call.eps <= DBL_MAX):
        return None
    if training and (call.eps == 0 or job.outer * job.inner == 1):
        return None
    if (running_mean is None) != (running_var is None) or (not training and running_mean is None):
        return None
    if not (bind(&job.gamma, weight, job.channels, seen.bits) and bind(&job.beta, bias, job.channels, seen.bits)
            and bind(&job.mean, running_mean, job.channels, seen.bits)
            and bind(&job.variance, running_var, job.channels, seen.bits)):
        return None
    bytes = job.outer * job.channels * job.inner * (seen.bits // 8)
    set_operand(job, &job.u, &seen)
    if residual is not None:
        if not view(residual, &other) or not is_like(&seen, &other):
            return None
        set_operand(job, &job.w, &other)
        job.form.third = True
        call.has_residual = True
    if training and running_mean is not None:
        if (job.mean.stride <= 0 or job.variance.stride <= 0
                or overlap_vectors(&job.mean, &job.variance, job.channels)
                or is_read(job, &job.mean, bytes) or is_read(job, &job.variance, bytes)):
            return None
    job.form.bend = STRAIGHT
    if activation is not None:
        call.activation = activation
        call.bent = resolve(activation)
        set_bend(job, call.bent)
    if training and counter is not None:
        if not view(counter, &other) or other.ndim != 0 or other.code != INTEGER or other.bits != 64:
            return None
        (<int64_t*> other.data)[0] += 1
    job.operation = TRAIN if training else NORMALIZE
    job.settles = training
    job.ddof = 1
    call.has_bias = bias is not None
    if is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        call.keep = True
        return apply_function(x, weight, bias, residual, call)
    return carried_out(call, &seen)


def call(module, x, residual):
    """Carry out a call of a `fastbn.torch` module, or return None where the full way has to decide."""
    cdef dict own = module.__dict__
    cdef dict parameters = own["_parameters"], buffers = own["_buffers"]
    cdef bint training
    if api == NULL or "weight" not in parameters or "bias" not in parameters or "running_mean" not in buffers:
        return None  # somebody has put something else in their place
    mean, variance, counter = buffers["running_mean"], buffers.get("running_var"), None
    training = own["training"]
    if not training:
        training = mean is None and variance is None
    elif not own["track_running_stats"]:
        mean = variance = None
    else:
        counter = buffers.get("num_batches_tracked")
    return normalize(x, parameters["weight"], parameters["bias"], residual, mean, variance, counter, training,
                     own["momentum"], own["eps"], own.get("activation"), module.ranks)


cdef inline int set_bend(Job* job, object bent) except -1:
    kind, numbers = bent[0]
    job.form.bend = kind
    job.form.numbers[0], job.form.numbers[1], job.form.numbers[2] = numbers
    return 0


cdef object carried_out(Call call, const DLTensor* x):
    cdef Job* job = &call.job
    cdef DLTensor made
    cdef cnp.npy_intp[2] extents
    cdef double* statistics
    y = make(x, &made)
    set_operand(job, &job.y, &made)
    extents[0], extents[1] = 2, job.channels
    if call.keep:
        call.statistics = cnp.PyArray_EMPTY(2, extents, cnp.NPY_FLOAT64, 0)
        statistics = <double*> cnp.PyArray_DATA(<cnp.ndarray> call.statistics)
        job.first, job.second = statistics, statistics + job.channels
    if call.keep and not call.training:
        load_all(&job.mean, job.channels, job.first)
        load_all(&job.variance, job.channels, job.second)
    carry_out(job, call.wide, team, serial)
    return y


def forward(ctx, x, weight, bias, residual, Call call):
    """Carry out a call, and keep what its gradient needs: the forward function of an autograd.Function."""
    cdef DLTensor seen
    view(x, &seen)
    y = carried_out(call, &seen)
    if call.bent is None:
        ctx.save_for_backward(x, weight, None, None, None)
    elif call.bent[1] and residual is not None:  # the derivative is found from y
        ctx.save_for_backward(x, weight, None, None, y)
    else:
        ctx.save_for_backward(x, weight, bias, residual, None)
    ctx.call = call
    return y


def backward(ctx, dy):
    """Return the gradients of x, weight, bias and residual: the backward function of an autograd.Function."""
    cdef Call call = ctx.call
    cdef Job job
    cdef DLTensor seen, given, made, other
    cdef bint wide
    x, weight, bias, residual, y = ctx.saved_tensors
    if not view(x, &seen) or is_grad_enabled() or modes() or not view(dy, &given) or not is_like(&seen, &given):
        return gradient_any(ctx, dy, x, weight, bias, residual, y)
    memset(&job, 0, sizeof(job))
    if not (set_shape(&job, &seen) and job.channels == call.job.channels and <size_t> given.data % (given.bits // 8) == 0
            and bind(&job.gamma, weight, job.channels, seen.bits) and bind(&job.beta, bias, job.channels, seen.bits)):
        return gradient_any(ctx, dy, x, weight, bias, residual, y)
    wide = seen.bits == 64
    set_operand(&job, &job.u, &given)
    set_operand(&job, &job.v, &seen)
    job.mean.data = <char*> cnp.PyArray_DATA(<cnp.ndarray> call.statistics)
    job.variance.data = job.mean.data + job.channels * sizeof(double)
    job.mean.stride = job.variance.stride = sizeof(double)
    job.mean.wide = job.variance.wide = True
    job.operation = FROZEN if call.frozen else GRADIENT
    job.epsilon = call.eps
    job.form.bend = STRAIGHT
    gates = call.bent is not None
    if gates:
        source = residual if y is None else y
        if source is not None:
            if not view(source, &other) or not is_like(&seen, &other):
                return gradient_any(ctx, dy, x, weight, bias, residual, y)
            set_operand(&job, &job.w, &other)
        set_bend(&job, call.bent)
        job.gated = True
        job.by_output = y is not None
        job.form.pair = True
        job.form.third = residual is not None
        job.gate = job.form
        job.form.third = False
        job.form.bend = STRAIGHT
    dx = make(&seen, &made)
    set_operand(&job, &job.y, &made)
    dresidual = dy if call.has_residual else None
    if gates and call.has_residual:
        dresidual = make(&seen, &made)
        set_operand(&job, &job.kept, &made)
    elif gates and call.bent[2]:  # costs more than a store
        job.kept = job.y
    gweight = gbias = None
    if weight is not None:
        gweight = make_vector(job.channels, seen.bits, &job.dgamma)
    if call.has_bias:
        gbias = make_vector(job.channels, seen.bits, &job.dbeta)
    carry_out(&job, wide, team, serial)
    return dx, gweight, gbias, dresidual, None
