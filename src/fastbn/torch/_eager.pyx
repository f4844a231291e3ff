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
from ..kernels._plan cimport set_bend, set_gate
from ..kernels.channels cimport load_all
from ..kernels.kinds cimport DOUBLE, FLOAT
from ..kernels.job cimport FROZEN, GRADIENT, NORMALIZE, TRAIN, Job, Operand, Parameter
from ..kernels.lanes cimport STRAIGHT
from ..kernels.plain cimport learns_apart

cnp.import_array()

include "_tensors.pxi"

cdef object is_grad_enabled, transforms, modes, function_modes, is_pre_dispatch, trace, forward_ad, apply_function
cdef object get_num_threads, get_torch_threads, resolve, gradient_any, types
cdef Py_ssize_t serial, values_per_thread


def connect(**given):
    """Take what of PyTorch and of fastbn calls need; without `api` every call is left to the full way."""
    global api, Tensor, TensorParameter, is_grad_enabled, transforms, modes, function_modes, is_pre_dispatch
    global trace, forward_ad, apply_function
    global get_num_threads, get_torch_threads, resolve, gradient_any, types, serial, values_per_thread
    Tensor, TensorParameter = given["tensor"], given["parameter"]
    is_grad_enabled, transforms, modes = given["is_grad_enabled"], given["transforms"], given["modes"]
    function_modes, is_pre_dispatch = given["function_modes"], given["is_pre_dispatch"]
    trace, forward_ad, apply_function = given["trace"], given["forward_ad"], given["apply"]
    get_num_threads, get_torch_threads = given["get_num_threads"], given["get_torch_threads"]
    resolve, gradient_any, types = given["resolved"], given["gradient"], given["types"]
    serial, values_per_thread = given["serial"], given["values_per_thread"]
    if given["api"] is not None:
        api = <const ExchangeAPI*> PyCapsule_GetPointer(given["api"], "dlpack_exchange_api")
        if api.major != 1:
            api = NULL


def team(Py_ssize_t work):
    """Return how many threads a call uses for so much work: no more than PyTorch does."""
    return min(<Py_ssize_t> get_num_threads(), <Py_ssize_t> get_torch_threads(), work // values_per_thread)


cdef class Call:
    """One forward call: checked, ready to be carried out, and afterwards what its gradient needs to know."""

    cdef Job job
    cdef bint training, wide, keep
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
    return (transforms() is None and modes() == 0 and (function_modes() == 0 or not is_pre_dispatch()) and trace() is None
            and forward_ad._current_level < 0)


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
    cdef bint graded
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
        if job.mean.stride <= 0 or job.variance.stride <= 0 or not learns_apart(job, bytes):
            return None
    graded = is_grad_enabled()
    if graded and running_mean is not None and (running_mean.requires_grad or running_var.requires_grad):
        return None
    job.form.bend = STRAIGHT
    if activation is not None:
        call.activation = activation
        call.bent = resolve(activation)
        set_bend(&job.form, call.bent[0])
    if training and counter is not None:
        if not view(counter, &other) or other.ndim != 0 or other.code != INTEGER or other.bits != 64:
            return None
        (<int64_t*> other.data)[0] += 1
    job.operation = TRAIN if training else NORMALIZE
    job.settles = job.trains = training
    job.ddof = 1
    call.has_bias = bias is not None
    if graded and (
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
    if (api == NULL or "weight" not in parameters or "bias" not in parameters or "running_mean" not in buffers
            or "num_batches_tracked" not in buffers or "training" not in own or "track_running_stats" not in own):
        return None  # somebody has put something else in their place
    mean, variance, counter = buffers["running_mean"], buffers.get("running_var"), None
    training = own["training"]
    if not training:
        training = mean is None and variance is None
    elif not own["track_running_stats"]:
        mean = variance = None
    else:
        counter = buffers["num_batches_tracked"]
    return normalize(x, parameters["weight"], parameters["bias"], residual, mean, variance, counter, training,
                     own.get("momentum"), own.get("eps"), own.get("activation"), module.ranks)


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
    if is_grad_enabled() or not quiet() or not view(x, &seen) or not view(dy, &given) or not is_like(&seen, &given):
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
    job.trains = True
    job.epsilon = call.eps
    job.form.bend = STRAIGHT
    gates = call.bent is not None
    if gates:
        source = residual if y is None else y
        if source is not None:
            if not view(source, &other) or not is_like(&seen, &other):
                return gradient_any(ctx, dy, x, weight, bias, residual, y)
            set_operand(&job, &job.w, &other)
        job.by_output = y is not None
        set_bend(&job.form, call.bent[0])
        set_gate(&job, residual is not None)
    dx = make(&seen, &made)
    set_operand(&job, &job.y, &made)
    dresidual = dy if call.has_residual else None
    if gates and call.has_residual:
        dresidual = make(&seen, &made)
        set_operand(&job, &job.kept, &made)
    gweight = gbias = None
    if weight is not None:
        gweight = make_vector(job.channels, seen.bits, &job.dgamma)
    if call.has_bias:
        gbias = make_vector(job.channels, seen.bits, &job.dbeta)
    carry_out(&job, wide, team, serial)
    return dx, gweight, gbias, dresidual, None
