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
#if defined(__AVX512BF16__)
static inline __m512i narrow_two(__m512 low, __m512 high) { /* to bf16: all of low, then all of high */
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}
#endif
#endif

#endif
