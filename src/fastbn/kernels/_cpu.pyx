"""Which instruction set levels this processor, and the operating system's handling of its registers, allow; its caches.

x86-64-v3 and -v4 are the levels of the x86-64 psABI. The compiler's builtin includes the operating system's part
(XSAVE of the wide registers). Its own names for the levels are not known to every compiler that builds this, so the
features are asked for one by one, as far as the kernels' code can hold instructions of them.
"""

from .caches cimport find_own_cache

cdef extern from *:
    """
    #if (defined(__x86_64__) || defined(__i386__)) && (defined(__GNUC__) || defined(__clang__))
    static int fastbn_has_v3(void) {
        __builtin_cpu_init();
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi")
            && __builtin_cpu_supports("bmi2");
    }
    static int fastbn_has_v4(void) {
        return fastbn_has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
            && __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq")
            && __builtin_cpu_supports("avx512vl");
    }
    #else
    static int fastbn_has_v3(void) { return 0; }
    static int fastbn_has_v4(void) { return 0; }
    #endif
    """
    bint fastbn_has_v3() noexcept nogil
    bint fastbn_has_v4() noexcept nogil


def supported():
    """Return the names of the levels that may run here, the lowest first."""
    levels = ["base"]
    if fastbn_has_v3():
        levels.append("v3")
    if fastbn_has_v4():
        levels.append("v4")
    return tuple(levels)


def own_cache():
    """Return the bytes of a core's own cache by which drivers walk memory."""
    return find_own_cache()
