# The kernels for other Cython modules: `from fastbn.cython_api cimport normalize_float`. Stable: see docs/cython.md.
#
# Every function may be called with or without the GIL, from any thread, and from several at once; none of them raises,
# takes the GIL or looks for signals. They return a Status. Nothing was read or written where it is INVALID.
#
# outer, channels, inner   extents of the data: (N, C, H * W) for NCHW, (N * H * W, C, 1) for NHWC and for tables
# x_strides and the like   NULL for C order, else three distances in bytes from one (outer, channel, inner) index to the
#                          next, as NumPy and memoryviews have them; of either sign, multiples of the size of a value
# gamma, beta              a value per channel, or NULL for 1 and 0
# mean, variance, m2       float64 per channel, side by side; m2 is the sum of squared deviations, variance is
#                          m2 / (outer * inner)
# threads                  the largest number of threads to use, at least 1. Small arrays are done by the calling thread, and
#                          so is everything inside a parallel region and in a forked child. The bits are the same for any.
#
# y may be x, and dx may be x or dy, if their strides are the same; any other overlap of what is written is the caller's
# mistake.

cdef enum Status:
    DONE = 0
    NO_MEMORY = 1  # for sums and coefficients per channel; data may have been written
    INVALID = 2    # an extent is negative or the product too large, a pointer is missing or misaligned, threads < 1

# mean and m2 of every channel; 0 of an empty batch.
cdef int moments_float(Py_ssize_t outer, Py_ssize_t channels, Py_ssize_t inner,
                       const float* x, const Py_ssize_t* x_strides,
                       double* mean, double* m2, int threads) noexcept nogil
cdef int moments_double(Py_ssize_t outer, Py_ssize_t channels, Py_ssize_t inner,
                        const double* x, const Py_ssize_t* x_strides,
                        double* mean, double* m2, int threads) noexcept nogil

# y = (x - mean) / sqrt(variance + epsilon) * gamma + beta
cdef int normalize_float(Py_ssize_t outer, Py_ssize_t channels, Py_ssize_t inner,
                         const float* x, const Py_ssize_t* x_strides, float* y, const Py_ssize_t* y_strides,
                         const float* gamma, const float* beta, const double* mean, const double* variance,
                         double epsilon, int threads) noexcept nogil
cdef int normalize_double(Py_ssize_t outer, Py_ssize_t channels, Py_ssize_t inner,
                          const double* x, const Py_ssize_t* x_strides, double* y, const Py_ssize_t* y_strides,
                          const double* gamma, const double* beta, const double* mean, const double* variance,
                          double epsilon, int threads) noexcept nogil

# The same with the batch's own statistics, which are written to mean and variance (divided by the count).
cdef int train_float(Py_ssize_t outer, Py_ssize_t channels, Py_ssize_t inner,
                     const float* x, const Py_ssize_t* x_strides, float* y, const Py_ssize_t* y_strides,
                     const float* gamma, const float* beta, double* mean, double* variance,
                     double epsilon, int threads) noexcept nogil
cdef int train_double(Py_ssize_t outer, Py_ssize_t channels, Py_ssize_t inner,
                      const double* x, const Py_ssize_t* x_strides, double* y, const Py_ssize_t* y_strides,
                      const double* gamma, const double* beta, double* mean, double* variance,
                      double epsilon, int threads) noexcept nogil

# The gradients of x, gamma and beta, from mean and variance as train wrote them. With frozen not 0, mean and variance
# were constants (inference): dx is dy scaled. dgamma and dbeta may be NULL.
cdef int gradient_float(Py_ssize_t outer, Py_ssize_t channels, Py_ssize_t inner,
                        const float* dy, const Py_ssize_t* dy_strides, const float* x, const Py_ssize_t* x_strides,
                        float* dx, const Py_ssize_t* dx_strides,
                        const float* gamma, const double* mean, const double* variance, double epsilon, int frozen,
                        float* dgamma, float* dbeta, int threads) noexcept nogil
cdef int gradient_double(Py_ssize_t outer, Py_ssize_t channels, Py_ssize_t inner,
                         const double* dy, const Py_ssize_t* dy_strides, const double* x, const Py_ssize_t* x_strides,
                         double* dx, const Py_ssize_t* dx_strides,
                         const double* gamma, const double* mean, const double* variance, double epsilon, int frozen,
                         double* dgamma, double* dbeta, int threads) noexcept nogil

# moving = momentum * moving + (1 - momentum) * batch, in place; the variance of a batch of count values per channel
# goes in divided by count - ddof instead of count. A count of 0 changes nothing.
cdef int update_moving(Py_ssize_t channels, double* moving_mean, double* moving_variance,
                       const double* mean, const double* variance, double count, int ddof,
                       double momentum) noexcept nogil

# The moments of both parts, in place of those of the first, by Chan's formula.
cdef int merge_moments(Py_ssize_t channels, double count, double* mean, double* m2,
                       double other_count, const double* other_mean, const double* other_m2) noexcept nogil
