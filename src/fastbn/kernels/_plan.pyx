"""A plan: what a call of one shape, one type and one set of strides will do. Made once, kept, run often."""
cimport numpy as cnp

from .kinds cimport BFLOAT, DOUBLE, FLOAT, HALF, INT8, UINT8
from .job cimport FROZEN, GRADIENT, MOMENTS, NORMALIZE, POOLED, TRAIN, Job, Operand, Operation, Parameter, weigh_gradient
from .strips cimport BENT, CLIPPED, SMOOTH, STRAIGHT

cnp.import_array()

OPERATIONS = {"moments": <int> MOMENTS, "normalize": <int> NORMALIZE, "train": <int> TRAIN,
              "gradient": <int> GRADIENT, "frozen": <int> FROZEN,
              "pooled": <int> POOLED}
# What an activation is made of: see `Bend` in lanes.pxd.
BENDS = {"clipped": <int> CLIPPED, "bent": <int> BENT, "smooth": <int> SMOOTH}

# Types of data by the names that NumPy has for them.
KINDS = {"float32": <int> FLOAT, "float64": <int> DOUBLE, "float16": <int> HALF, "bfloat16": <int> BFLOAT,
         "uint8": <int> UINT8, "int8": <int> INT8}


cdef class Plan:
    """The canonical form of a call.

    Parameters
    ----------
    shape : tuple of 3 ints
        (outer, channels, inner), none of them 0.
    kind : int
        Type of x, of `KINDS`. The other operands are of the same, or float32 where x is of 8 bits.
    u, v, y : tuple of 3 ints or None
        Strides, in values, of the first operand (x, or dy in the gradient), the second (x in the gradient) and the
        result.
    w, kept : tuple of 3 ints or None
        Those of the residual or of y in a gradient, and of the gradient before the activation.
    """

    def __cinit__(self, shape, int kind, u, v=None, y=None, w=None, kept=None):
        self.outer, self.channels, self.inner = shape
        self.kind = kind
        self.wide = kind == DOUBLE
        self.pattern = pattern_of(self.outer, self.inner)
        for i in range(3):
            self.u_strides[i] = u[i]
            self.v_strides[i] = v[i] if v is not None else 0
            self.w_strides[i] = w[i] if w is not None else 0
            self.y_strides[i] = y[i] if y is not None else 0
            self.kept_strides[i] = kept[i] if kept is not None else 0

    def work(self, int operation):
        """How much there is to do, in values of an inference."""
        return work_of(self.outer, self.channels, self.inner, operation != NORMALIZE and operation != POOLED,
                       operation == GRADIENT or operation == FROZEN)

    cdef int bind(self, Job* job, Operation operation, u, v, y, gamma, beta, mean, variance, double epsilon,
                  first, second, int threads, w, bend, bint by_output, kept) except -1:
        """Fill in a job. The arrays were checked by the caller and must outlive it.

        bend is None or (a number of BENDS, three numbers), in a gradient that of the gate.
        """
        job.operation = operation
        job.reduces = operation != NORMALIZE and operation != POOLED
        job.applies = y is not None
        job.reads_pair = operation == GRADIENT or operation == FROZEN
        job.writes_pair = operation == GRADIENT or operation == POOLED
        job.gated = False
        job.by_output = by_output
        job.form.pair = job.writes_pair
        job.form.third = w is not None and not by_output
        job.form.bend = STRAIGHT
        if bend is not None:
            set_bend(&job.form, bend)
            if job.reads_pair:
                set_gate(job, job.form.third)
        job.outer, job.channels, job.inner = self.outer, self.channels, self.inner
        cdef int others = FLOAT if self.kind >= UINT8 else self.kind
        bind_operand(&job.u, u, self.kind if v is None else others, self.u_strides)
        bind_operand(&job.v, v, self.kind, self.v_strides)
        bind_operand(&job.w, w, others, self.w_strides)
        bind_operand(&job.y, y, others, self.y_strides)
        bind_operand(&job.kept, kept, others, self.kept_strides)
        bind_parameter(&job.gamma, gamma)
        bind_parameter(&job.beta, beta)
        bind_parameter(&job.mean, mean)
        bind_parameter(&job.variance, variance)
        job.epsilon = epsilon
        job.first = <double*> cnp.PyArray_DATA(<cnp.ndarray?> first) if first is not None else NULL
        job.second = <double*> cnp.PyArray_DATA(<cnp.ndarray?> second) if second is not None else NULL
        job.threads = threads
        job.interruptible = True
        job.weighs = job.omits = job.settles = job.fresh = job.trains = False
        job.dgamma.data = job.dbeta.data = NULL
        job.total = NULL
        job.weights.data = NULL
        job.weights.size = 0
        job.weights.marks = job.weights.unchecked = False
        return 0


cdef int bind_operand(Operand* operand, array, int kind, const Py_ssize_t* strides) except -1:
    cdef Py_ssize_t size = 8 if kind == DOUBLE else 4 if kind == FLOAT else 1 if kind >= UINT8 else 2
    operand.data = <char*> cnp.PyArray_DATA(<cnp.ndarray?> array) if array is not None else NULL
    operand.kind, operand.size = kind, size
    operand.outer, operand.channel, operand.inner = strides[0] * size, strides[1] * size, strides[2] * size
    return 0


cdef int bind_weights(Job* job, counting) except -1:
    """Let values count by weights, after `Plan.bind`; None leaves the job as it is.

    counting is (weights or None, (repeat, and the distances major, minor, channel, inner), whether NaN is missing,
    total, whether the weights are unchecked); the weights are float64, float32, uint8 or bool. See `Weights` in job.pxd.
    """
    cdef cnp.ndarray array
    if counting is None:
        return 0
    weights, form, omits, total, unchecked = counting
    job.weighs = True
    job.omits = omits
    job.total = <double*> cnp.PyArray_DATA(<cnp.ndarray?> total)
    if weights is not None:
        array = weights
        job.weights.data = <char*> cnp.PyArray_DATA(array)
        job.weights.size = cnp.PyArray_ITEMSIZE(array)
        job.weights.kind = DOUBLE if job.weights.size == 8 else FLOAT if job.weights.size == 4 else UINT8
        job.weights.marks = cnp.PyArray_TYPE(array) == cnp.NPY_BOOL
        job.weights.unchecked = unchecked
        job.weights.repeat, job.weights.major, job.weights.minor, job.weights.channel, job.weights.inner = form
    if job.reads_pair:
        weigh_gradient(job)
    return 0


cdef int bind_parameter(Parameter* parameter, array) except -1:
    """Take a one-dimensional float32 or float64 array of any stride, or None."""
    if array is None:
        parameter.data = NULL
        return 0
    parameter.data = <char*> cnp.PyArray_DATA(<cnp.ndarray?> array)
    parameter.stride = cnp.PyArray_STRIDES(<cnp.ndarray> array)[0]
    parameter.wide = cnp.PyArray_TYPE(<cnp.ndarray> array) == cnp.NPY_FLOAT64
    return 0
