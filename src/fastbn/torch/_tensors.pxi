# Tensors, by what DLPack fixes (version 1): looked at, taken as operands and parameters, and made.

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
cdef object Tensor, TensorParameter


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


cdef bint lie_alike(int ndim, const int64_t* shape, const int64_t* a, const int64_t* b) noexcept:
    """Whether strides of one shape lead to the same places."""
    cdef int i
    for i in range(ndim):
        if a[i] != b[i] and shape[i] != 1:
            return False
    return True


cdef void set_strides(int ndim, const int64_t* shape, int first, int64_t* strides) noexcept:
    """Those of a dense tensor whose values are neighbours along an axis, the last or the channels', then along the others."""
    cdef int i
    cdef int64_t dense = shape[first]
    strides[first] = 1
    for i in range(ndim - 1, -1, -1):
        if i != first:
            strides[i] = dense
            dense *= shape[i]


cdef object make(const DLTensor* like, DLTensor* out):
    """A new tensor, uninitialized, of another's shape, type and order in memory; that must be dense.

    Its strides are PyTorch's for that order: where an extent is 1 the other may have any.
    """
    global next_place
    cdef Made* made = <Made*> malloc(sizeof(Made))
    cdef void* tensor = NULL
    cdef size_t size = like.bits // 8, shift = LINE
    cdef int i
    if made == NULL:
        raise MemoryError
    memset(made, 0, sizeof(Made))
    for i in range(like.ndim):
        made.shape[i] = like.shape[i]
        size *= like.shape[i]
    set_strides(like.ndim, made.shape, like.ndim - 1, made.strides)
    if not lie_alike(like.ndim, like.shape, like.strides, made.strides):
        set_strides(like.ndim, made.shape, 1, made.strides)
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


cdef bint is_like(const DLTensor* a, const DLTensor* b) noexcept:
    """Whether both have one shape, one type and one order in memory, a being dense."""
    cdef int i
    if a.ndim != b.ndim or a.code != b.code or a.bits != b.bits:
        return False
    for i in range(a.ndim):
        if a.shape[i] != b.shape[i]:
            return False
    return lie_alike(a.ndim, a.shape, a.strides, b.strides)


cdef bint set_shape(Job* job, const DLTensor* x) noexcept:
    """The canonical form of dense data, contiguous or channels_last, or False."""
    cdef int i
    cdef int64_t[MOST_AXES] strides
    cdef bint last
    if x.code != REAL or (x.bits != 32 and x.bits != 64) or x.ndim < 2 or <size_t> x.data % (x.bits // 8):
        return False
    set_strides(x.ndim, x.shape, x.ndim - 1, strides)
    last = not lie_alike(x.ndim, x.shape, x.strides, strides)
    if last:
        # As PyTorch has it: channels are neighbours, then from the last axis to the first.
        set_strides(x.ndim, x.shape, 1, strides)
        if (x.ndim != 4 and x.ndim != 5) or not lie_alike(x.ndim, x.shape, x.strides, strides):
            return False
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
