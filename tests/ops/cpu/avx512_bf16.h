/* For tests on processors with AVX-512 and without its BF16 part: the intrinsics of it that our kernels use, made of the
   others, so that what is compiled only with AVX512-BF16 is compiled and tried here too (gcc -include this). Rounding is to
   nearest even, as the instructions have it; they take denormals for zero, and these do not. */

#include <immintrin.h>

#ifndef __AVX512BF16__
#define __AVX512BF16__ 1

static inline __m512i emulated_narrow(__m512 x) { /* bf16 in the low halves of sixteen numbers */
    __m512i u = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, odd), _mm512_set1_epi32(0x7fff)), 16);
    __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(0x40));
    return _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), quiet);
}

static inline __m256bh emulated_cvtneps_pbh(__m512 x) { return (__m256bh)_mm512_cvtepi32_epi16(emulated_narrow(x)); }

static inline __m512bh emulated_cvtne2ps_pbh(__m512 high, __m512 low) {
    __m512i both = _mm512_castsi256_si512(_mm512_cvtepi32_epi16(emulated_narrow(low)));
    return (__m512bh)_mm512_inserti64x4(both, _mm512_cvtepi32_epi16(emulated_narrow(high)), 1);
}

static inline __m512 emulated_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
    __m512i x = (__m512i)a, y = (__m512i)b, upper = _mm512_set1_epi32((int)0xffff0000);
    sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(x, upper)), _mm512_castsi512_ps(_mm512_and_si512(y, upper)), sum);
    return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(y, 16)), sum);
}

#define _mm512_cvtneps_pbh emulated_cvtneps_pbh
#define _mm512_cvtne2ps_pbh emulated_cvtne2ps_pbh
#define _mm512_dpbf16_ps emulated_dpbf16_ps
#endif
