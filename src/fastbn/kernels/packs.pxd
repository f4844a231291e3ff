"""Packs: vectors of the width of a level, whose arithmetic is element by element (lanes.h).

Lanes are handled in packs. Plain loops over an array of lanes were tried first: GCC 12 vectorized the sums, but walked across
rows with gathers in *apply_rows* and left the sums over two operands scalar (4 to 8 times slower).
"""
from cython cimport floating
from libc.stdint cimport int64_t, uint8_t


cdef extern from "lanes.h" nogil:
    ctypedef double vd "fastbn_vd"  # for Cython a number: its arithmetic is written as C arithmetic
    ctypedef float vf "fastbn_vf"
    enum:
        LANES "FASTBN_LANES"
        VD "FASTBN_VD"  # doubles in a pack
        VF "FASTBN_VF"
        ND "FASTBN_ND"  # packs of doubles in all lanes
        NF "FASTBN_NF"
        ABREAST "FASTBN_ABREAST"  # channels, or LANES columns, whose sums are side by side in registers
    vd splat_d "fastbn_splat_d"(double x)
    vf splat_f "fastbn_splat_f"(float x)
    vd widen_f "fastbn_widen_f"(const float* x)
    vd widen_d "fastbn_widen_d"(const double* x)
    vd add_exact_product "fastbn_add_exact_product"(vd t, vd x, vd y)
    vd add_by_product "fastbn_add_by_product"(vd t, vd x)
    void stream_d "fastbn_stream_d"(double* y, vd z)
    void stream_f "fastbn_stream_f"(float* y, vf z)
    void prefetch "fastbn_prefetch"(const void* x)
    void prefetch_second "fastbn_prefetch_second"(const void* x)
    void prefetch_once "fastbn_prefetch_once"(const void* x)
    void prefetch_to "fastbn_prefetch_to"(const void* x, bint second)
    vd select_d "fastbn_select_d"(vd x, vd y, vd yes, vd no)
    vf select_f "fastbn_select_f"(vf x, vf y, vf yes, vf no)
    vd smaller_d "fastbn_smaller_d"(vd x, vd y)
    vf smaller_f "fastbn_smaller_f"(vf x, vf y)
    vd larger_d "fastbn_larger_d"(vd x, vd y)
    vf larger_f "fastbn_larger_f"(vf x, vf y)
    vd times_power_d "fastbn_times_power_d"(vd s, vd n)
    vf times_power_f "fastbn_times_power_f"(vf s, vf n)
    vd minus_size_d "fastbn_minus_size_d"(vd x)
    vf minus_size_f "fastbn_minus_size_f"(vf x)
    const double[17] series "fastbn_series"
    vd masked "fastbn_masked"(vd x, const int64_t* mask)
    vd present "fastbn_present"(vd x, vd v)  # x, but 0 where v is NaN
    const int64_t[32] last_masks "fastbn_last"
    const uint8_t[32] last_marks "fastbn_last_marks"
    ctypedef struct vk "fastbn_vk":  # which values of all lanes count
        pass
    ctypedef struct vc "fastbn_vc":  # how often those of each lane did, up to 255 times
        pass
    vk marked "fastbn_marked"(const uint8_t* m)
    vk numbers_f "fastbn_numbers_f"(const float* x)
    vk numbers_d "fastbn_numbers_d"(const double* x)
    vk both "fastbn_both"(vk a, vk b)
    int how_many "fastbn_how_many"(vk k)
    vd kept "fastbn_kept"(vd x, vk k, int j)  # pack j
    double largest_f "fastbn_largest_f"(const float* x, Py_ssize_t n)
    double largest_d "fastbn_largest_d"(const double* x, Py_ssize_t n)
    vd larger_bits_f "fastbn_larger_bits_f"(vd most, const float* x)
    vd larger_bits_d "fastbn_larger_bits_d"(vd most, const double* x)
    vc load_counts "fastbn_load_counts"(const uint8_t* at)
    vc count "fastbn_count"(vc c, vk k)
    void store_counts "fastbn_store_counts"(uint8_t* at, vc c)

cdef extern from "small_packs.h" nogil:
    const bint HAS_SMALL_PACKS "FASTBN_HAS_SMALL_PACKS"  # values of 16 bits go to and from packs
    vf load_half_pack "fastbn_load_half_pack"(const void* x)
    vf load_bfloat_pack "fastbn_load_bfloat_pack"(const void* x)
    vd load_bytes_d "fastbn_load_bytes_d"(const void* x)
    vf load_bytes_f "fastbn_load_bytes_f"(const void* x)
    void store_half_pack "fastbn_store_half_pack"(void* y, vf z, bint stream)
    void store_bfloat_pack "fastbn_store_bfloat_pack"(void* y, vf z, bint stream)


ctypedef fused pack:
    vf
    vd


cdef inline vd widen(const floating* x) noexcept nogil:
    """A pack of doubles from values of either type."""
    if floating is float:
        return widen_f(x)
    else:
        return widen_d(x)


cdef inline pack splat(double x, pack like) noexcept nogil:
    if pack is vf:
        return splat_f(<float> x)
    else:
        return splat_d(x)


cdef inline pack load_bytes(const void* x, pack like) noexcept nogil:
    """A pack of what is given as bytes."""
    if pack is vf:
        return load_bytes_f(x)
    else:
        return load_bytes_d(x)


cdef inline pack select(pack x, pack y, pack yes, pack no) noexcept nogil:
    """x <= y ? yes : no"""
    if pack is vf:
        return select_f(x, y, yes, no)
    else:
        return select_d(x, y, yes, no)


cdef inline pack smaller(pack x, pack y) noexcept nogil:
    """x < y ? x : y"""
    if pack is vf:
        return smaller_f(x, y)
    else:
        return smaller_d(x, y)


cdef inline pack larger(pack x, pack y) noexcept nogil:
    """x > y ? x : y"""
    if pack is vf:
        return larger_f(x, y)
    else:
        return larger_d(x, y)


cdef inline pack minus_size(pack x) noexcept nogil:
    """-|x|"""
    if pack is vf:
        return minus_size_f(x)
    else:
        return minus_size_d(x)


cdef inline bint begins_with_zero(const pack* x) noexcept nogil:
    if pack is vf:
        return (<const float*> x)[0] == 0
    else:
        return (<const double*> x)[0] == 0


cdef inline pack times_power(pack s, pack n) noexcept nogil:
    """s * 2^n"""
    if pack is vf:
        return times_power_f(s, n)
    else:
        return times_power_d(s, n)
