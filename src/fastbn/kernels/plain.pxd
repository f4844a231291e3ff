"""What plainly fits: arguments of a call that need no conversion, told in C; of all others the face decides."""
from cpython.float cimport PyFloat_AS_DOUBLE, PyFloat_CheckExact
from cpython.long cimport PyLong_AsLongAndOverflow, PyLong_CheckExact
from libc.math cimport isfinite
from libc.string cimport strcmp, strrchr

cimport numpy as cnp

from .kinds cimport BFLOAT, DOUBLE, FLOAT, HALF, INT8, UINT8
from .job cimport Job, Operand, Parameter
from .weights cimport fits, largest_of


cdef inline bint is_plain(object array) noexcept:
    return cnp.PyArray_CheckExact(array) and cnp.PyArray_ISCARRAY_RO(<cnp.ndarray> array)


cdef inline bint is_real(cnp.ndarray array) noexcept:
    return cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT32 or cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT64


cdef inline bint is_bfloat(cnp.ndarray array) noexcept:
    """Whether values are of the type that another package calls bfloat16."""
    cdef cnp.dtype described = <cnp.dtype> cnp.PyArray_DTYPE(array)
    cdef const char* name = described.typeobj.tp_name
    cdef const char* last = strrchr(name, c".")
    return (cnp.PyArray_ISUSERDEF(array) and cnp.PyArray_ITEMSIZE(array) == 2
            and strcmp(name if last == NULL else last + 1, b"bfloat16") == 0)


cdef inline int kind_of(cnp.ndarray array) noexcept:
    """The kind of values of an array (convert.pxd), or -1."""
    cdef int number = cnp.PyArray_TYPE(array)
    if number == cnp.NPY_FLOAT32:
        return FLOAT
    if number == cnp.NPY_FLOAT64:
        return DOUBLE
    if number == cnp.NPY_FLOAT16:
        return HALF
    if number == cnp.NPY_UINT8:
        return UINT8
    if number == cnp.NPY_INT8:
        return INT8
    return BFLOAT if is_bfloat(array) else -1


cdef inline int type_of_result(cnp.ndarray x) noexcept:
    """NumPy's number of the type that y has."""
    return cnp.NPY_FLOAT32 if kind_of(x) >= UINT8 else cnp.PyArray_TYPE(x)


cdef inline bint bind(Parameter* parameter, object array, Py_ssize_t channels) noexcept:
    """Whether it is None or a vector of a value per channel."""
    if array is None:
        parameter.data = NULL
        return True
    if not (is_plain(array) and is_real(<cnp.ndarray> array) and cnp.PyArray_NDIM(<cnp.ndarray> array) == 1
            and cnp.PyArray_DIMS(<cnp.ndarray> array)[0] == channels):
        return False
    parameter.data = <char*> cnp.PyArray_DATA(<cnp.ndarray> array)
    parameter.stride = cnp.PyArray_ITEMSIZE(<cnp.ndarray> array)
    parameter.wide = parameter.stride == 8
    return True


cdef inline bint apart(const char* a, Py_ssize_t a_bytes, const char* b, Py_ssize_t b_bytes) noexcept:
    return a + a_bytes <= b or b + b_bytes <= a


cdef inline Py_ssize_t extent(const Parameter* p, Py_ssize_t channels) noexcept nogil:
    """Bytes from the first to the last number of a parameter whose stride is not negative."""
    return (channels - 1) * p.stride + (8 if p.wide else 4)


cdef inline bint apart_from(const char* y, Py_ssize_t bytes, const Parameter* p, Py_ssize_t channels) noexcept:
    return p.data == NULL or apart(y, bytes, p.data, extent(p, channels))


cdef inline bint apart_from_read(const Parameter* moving, const Job* job, Py_ssize_t bytes) noexcept:
    """Whether it shares no memory with operands of so many bytes, gamma and beta."""
    cdef Py_ssize_t own = extent(moving, job.channels)
    return (apart(moving.data, own, job.u.data, bytes)
            and (job.w.data == NULL or apart(moving.data, own, job.w.data, bytes))
            and apart_from(moving.data, own, &job.gamma, job.channels)
            and apart_from(moving.data, own, &job.beta, job.channels))


cdef inline bint learns_apart(const Job* job, Py_ssize_t bytes) noexcept:
    """Whether moving statistics, which there are, may learn while other channels are still to be told from what is read."""
    return (apart_from(job.mean.data, extent(&job.mean, job.channels), &job.variance, job.channels)
            and apart_from_read(&job.mean, job, bytes) and apart_from_read(&job.variance, job, bytes))


cdef inline bint in_range(object value, double low, double high, double* number) noexcept:
    if not PyFloat_CheckExact(value):
        return False
    number[0] = PyFloat_AS_DOUBLE(value)
    return low <= number[0] <= high and isfinite(number[0])


cdef inline bint set_shape(Job* job, cnp.ndarray x, object axis) noexcept:
    """The canonical form of an array in C order, or False if it is empty or the axis is not one of it."""
    cdef Py_ssize_t i, at, ndim = cnp.PyArray_NDIM(x)
    cdef int overflow = 0
    cdef long given
    if not PyLong_CheckExact(axis):
        return False
    given = PyLong_AsLongAndOverflow(axis, &overflow)
    if overflow or not -ndim <= given < ndim:
        return False
    at = given + ndim if given < 0 else given
    job.outer = job.inner = 1
    for i in range(ndim):
        if i < at:
            job.outer *= cnp.PyArray_DIMS(x)[i]
        elif i > at:
            job.inner *= cnp.PyArray_DIMS(x)[i]
    job.channels = cnp.PyArray_DIMS(x)[at]
    return job.outer * job.channels * job.inner > 0


cdef inline void in_order(Job* job, Operand* operand, cnp.ndarray array) noexcept:
    operand.data = <char*> cnp.PyArray_DATA(array)
    operand.size = cnp.PyArray_ITEMSIZE(array)
    operand.kind = kind_of(array)
    operand.inner = operand.size
    operand.channel = job.inner * operand.inner
    operand.outer = job.channels * operand.channel


cdef inline bint is_of_shape(cnp.ndarray array, cnp.ndarray x) noexcept:
    cdef Py_ssize_t i
    if cnp.PyArray_NDIM(array) != cnp.PyArray_NDIM(x):
        return False
    for i in range(cnp.PyArray_NDIM(x)):
        if cnp.PyArray_DIMS(array)[i] != cnp.PyArray_DIMS(x)[i]:
            return False
    return True


cdef inline bint is_result(object array, cnp.ndarray x) noexcept:
    """Whether it is a plain array of x's shape and of the type that results have."""
    return (is_plain(array) and cnp.PyArray_TYPE(<cnp.ndarray> array) == type_of_result(x)
            and is_of_shape(<cnp.ndarray> array, x))


cdef inline bint same_or_apart(const char* a, Py_ssize_t a_bytes, const char* b, Py_ssize_t b_bytes) noexcept:
    return (a == b and a_bytes == b_bytes) or apart(a, a_bytes, b, b_bytes)


cdef inline bint apart_from_array(const char* y, Py_ssize_t bytes, cnp.ndarray array) noexcept:
    """The same of the memory that an array of any strides reaches."""
    cdef const char* low = <const char*> cnp.PyArray_DATA(array)
    cdef Py_ssize_t reach = cnp.PyArray_ITEMSIZE(array), i, step
    for i in range(cnp.PyArray_NDIM(array)):
        step = (cnp.PyArray_DIMS(array)[i] - 1) * cnp.PyArray_STRIDES(array)[i]
        reach += abs(step)
        low += min(step, <Py_ssize_t> 0)
    return apart(y, bytes, low, reach)


cdef inline bint fits_without(cnp.ndarray array, cnp.ndarray x, Py_ssize_t axis, Py_ssize_t kept) noexcept:
    """Whether the shape is that of x, but its axis 1 long (kept is 1) or left out (kept is 0)."""
    cdef Py_ssize_t i
    cdef const cnp.npy_intp* shape = cnp.PyArray_DIMS(array)
    if cnp.PyArray_NDIM(array) != cnp.PyArray_NDIM(x) - 1 + kept or (kept and shape[axis] != 1):
        return False
    for i in range(cnp.PyArray_NDIM(x)):
        if i != axis and shape[i if i < axis else i - 1 + kept] != cnp.PyArray_DIMS(x)[i]:
            return False
    return True


cdef inline bint set_weights(Job* job, cnp.ndarray x, object axis, object mask, object sample_weight,
                             object nan_policy) noexcept:
    """Let values of x count by the arguments of a call, in moments, after `set_shape`; False where they do not plainly fit."""
    cdef cnp.ndarray array
    cdef bint per_value
    cdef Py_ssize_t size, samples, at
    if type(nan_policy) is not str:
        return False
    if nan_policy == "omit":
        job.omits = job.weighs = kind_of(x) < UINT8  # no integer is NaN
    elif nan_policy != "propagate":
        return False
    given = mask if sample_weight is None else sample_weight
    if given is None:
        return True
    if not is_plain(given) or (mask is not None and sample_weight is not None):
        return False
    array = <cnp.ndarray> given
    if not (cnp.PyArray_TYPE(array) == cnp.NPY_BOOL if sample_weight is None else is_real(array)):
        return False
    size = cnp.PyArray_ITEMSIZE(array)
    at = axis
    if at < 0:
        at += cnp.PyArray_NDIM(x)
    job.weighs = True
    job.weights.data = <char*> cnp.PyArray_DATA(array)
    job.weights.size = size
    job.weights.kind = DOUBLE if size == 8 else FLOAT if size == 4 else UINT8
    job.weights.marks = sample_weight is None
    job.weights.repeat = job.outer
    job.weights.major = job.weights.channel = 0
    per_value = is_of_shape(array, x)
    if per_value or fits_without(array, x, at, 1) or fits_without(array, x, at, 0):
        job.weights.inner = size
        job.weights.channel = job.inner * size if per_value else 0
        job.weights.minor = (job.channels if per_value else 1) * job.inner * size
    elif at > 0 and cnp.PyArray_NDIM(array) == 1 and cnp.PyArray_DIMS(array)[0] == cnp.PyArray_DIMS(x)[0]:
        samples = cnp.PyArray_DIMS(x)[0]
        job.weights.inner = 0
        job.weights.minor = size
        if samples < job.outer:  # of every sample there are several positions
            job.weights.repeat, job.weights.major, job.weights.minor = job.outer // samples, size, 0
    else:
        return False
    job.weights.unchecked = per_value and sample_weight is not None  # the sums look at them then
    return (job.weights.marks or per_value
            or fits(largest_of(job.weights.data, cnp.PyArray_SIZE(array), job.weights.size == sizeof(double))))
