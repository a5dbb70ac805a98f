/* Shared by all kernels: bfloat16 to float32 and back, and e^x. */

#ifndef VENEER_BF16_H
#define VENEER_BF16_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bf16;

/* Return codes of kernels that can fail; ops/cpu/compiled.py converts them to exceptions. */
enum { DONE, NO_ROOM, BAD_TARGET };

static inline void *aligned_room(int64_t bytes) { return aligned_alloc(64, bytes > 0 ? (size_t)((bytes + 63) / 64 * 64) : 64); }

/* A thread without memory sets *failed and skips its part of the loop: it must still reach the barrier
   at the end. */
static inline int all_there(int there, int *failed) {
    if (!there) {
#pragma omp atomic write
        *failed = NO_ROOM;
    }
    return there;
}

static inline float up(bf16 h) {
    uint32_t u = (uint32_t)h << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

static inline bf16 down(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return (bf16)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

/* e^x to about 2 units in the last place of float32; 0 below -87, and no overflow for the x <= 0 of a
   softmax. Cody-Waite reduction x = n ln2 + r, then a polynomial in r (the coefficients of Cephes
   expf). */
static inline float exp32(float x) {
    float clamped = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
    float n = __builtin_rintf(clamped * 1.44269504088896341f);
    float r = clamped - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float s;
    memcpy(&s, &bits, 4);
    float y = p * s;
    return x < -87.0f ? 0.0f : (x == x ? y : x);
}

/* y = w x / sqrt(mean x^2 + eps), one row */
static inline void norm_row(const bf16 *x, const bf16 *w, bf16 *y, int64_t d, float eps) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < d; j++) sum += up(x[j]) * up(x[j]);
    float r = 1.0f / __builtin_sqrtf(sum / (float)d + eps);
#pragma omp simd
    for (int64_t j = 0; j < d; j++) y[j] = down(up(x[j]) * r * up(w[j]));
}

/* h = silu(gate) up, one row */
static inline void silu_gate_row(const bf16 *gate, const bf16 *value, bf16 *h, int64_t f) {
#pragma omp simd
    for (int64_t j = 0; j < f; j++) {
        float g = up(gate[j]);
        h[j] = down(g / (1.0f + exp32(-g)) * up(value[j]));
    }
}

#if defined(__AVX512F__)
#include <immintrin.h>

static inline __m512 exp512(__m512 x) { /* as exp32, with 0 for very negative x */
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 8);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(p, n);
}

/* 2^x with relative error 3e-6, before rounding to bfloat16 (2e-3): scalef for the integer part, a
   polynomial for the fraction, 0 ... 1. */
#if defined(__AVX512DQ__)
static inline __m512 exp2_near(__m512 x) {
    __m512 f = _mm512_reduce_ps(x, 1), p = _mm512_set1_ps(1.353407211e-2f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.201120538e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.414432610e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.930036264e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.000002612f));
    return _mm512_scalef_ps(p, x);
}
#endif

/* Sums of products of pairs of bf16: sum + a[2i] b[2i] + a[2i + 1] b[2i + 1] in each of the 16 lanes.

   BF16_PRODUCTS: whether the processor's bf16 instruction computes the sum. Without the instruction, or
   if float32 is faster according to the machine's profile (build.py then defines FLOAT32_PRODUCTS), both
   bf16 are widened to float32 in registers and multiplied exactly. */
#if defined(__AVX512BF16__) && !defined(FLOAT32_PRODUCTS)
#define BF16_PRODUCTS 1
#else
#define BF16_PRODUCTS 0
#endif
static inline __m512 even_of(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
static inline __m512 odd_of(__m512i pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000u)));
}
static inline __m512 dot_pairs(__m512 sum, __m512i a, __m512i b) {
#if BF16_PRODUCTS
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#else
    return _mm512_fmadd_ps(odd_of(a), odd_of(b), _mm512_fmadd_ps(even_of(a), even_of(b), sum));
#endif
}

static inline __m256i narrow16(__m512 x) { /* to bf16, rounded to nearest even */
#if defined(__AVX512BF16__)
    return (__m256i)_mm512_cvtneps_pbh(x);
#else
    __m512i u = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16));
#endif
}

static inline __m512i narrow_two(__m512 low, __m512 high) { /* to bf16: all of low, then all of high */
    return _mm512_inserti64x4(_mm512_castsi256_si512(narrow16(low)), narrow16(high), 1);
}
#endif

#endif
