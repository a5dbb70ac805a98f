/* Vectors of sixteen numbers of 32 bits: one register with AVX-512, two with AVX2, four with NEON. Also products
   of pairs of bf16, in the arithmetic that bf16.h selects. */

#ifndef VENEER_VEC_H
#define VENEER_VEC_H

#include "bf16.h"

#if !defined(BF16_PRODUCTS)
#define BF16_PRODUCTS 0
#endif

#if defined(__AVX512BW__) && defined(__AVX512VL__)
#define HAS_VECTORS 1
enum { REGISTERS = 32 }; /* each for sixteen numbers */
typedef __m512 v16;
typedef __m512i w16;

static inline v16 set16(float x) { return _mm512_set1_ps(x); }
static inline v16 load16(const float *p) { return _mm512_loadu_ps(p); }
static inline void store16(float *p, v16 x) { _mm512_storeu_ps(p, x); }
static inline v16 add16(v16 a, v16 b) { return _mm512_add_ps(a, b); }
static inline v16 sub16(v16 a, v16 b) { return _mm512_sub_ps(a, b); }
static inline v16 mul16(v16 a, v16 b) { return _mm512_mul_ps(a, b); }
static inline v16 div16(v16 a, v16 b) { return _mm512_div_ps(a, b); }
static inline v16 fma16(v16 a, v16 b, v16 c) { return _mm512_fmadd_ps(a, b, c); } /* a b + c */
static inline v16 max16(v16 a, v16 b) { return _mm512_max_ps(a, b); }
static inline v16 abs16(v16 a) { return _mm512_abs_ps(a); }
static inline v16 exp16(v16 x) { return exp512(x); }
static inline float sum_of(v16 a) { return _mm512_reduce_add_ps(a); }
static inline float max_of(v16 a) { return _mm512_reduce_max_ps(a); }
static inline v16 with_sign_of(v16 a, v16 sign) { /* a >= 0 */
    return _mm512_mask_sub_ps(a, _mm512_cmp_ps_mask(sign, set16(0.0f), _CMP_LT_OQ), set16(0.0f), a);
}
/* x in lanes from … to, `other` in the other lanes */
static inline v16 only16(v16 x, int from, int to, float other) {
    __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __mmask16 in = _mm512_cmplt_epi32_mask(lane, _mm512_set1_epi32(to)) & _mm512_cmpge_epi32_mask(lane, _mm512_set1_epi32(from));
    return _mm512_mask_blend_ps(in, set16(other), x);
}
static inline w16 load_w16(const void *p) { return _mm512_loadu_si512(p); }
static inline void store_w16(void *p, w16 x) { _mm512_storeu_si512(p, x); }
static inline v16 even16(w16 x) { return even_of(x); }
static inline v16 odd16(w16 x) { return odd_of(x); }
static inline v16 load_bf16(const bf16 *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
static inline void store_bf16(bf16 *p, v16 x) { _mm256_storeu_si256((__m256i *)p, narrow16(x)); }
/* Load and store only the first n lanes; a load sets the other lanes to 0. */
static inline __mmask16 first_lanes(int64_t n) { return n < 16 ? (__mmask16)((1u << n) - 1) : 0xffff; }
static inline w16 load_some_w16(const void *p, int64_t n) { return _mm512_maskz_loadu_epi32(first_lanes(n), p); }
static inline v16 load_some_bf16(const bf16 *p, int64_t n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(n), p)), 16));
}
static inline void store_some_bf16(bf16 *p, v16 x, int64_t n) { _mm256_mask_storeu_epi16(p, first_lanes(n), narrow16(x)); }
static inline v16 rounded_bf16(v16 x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow16(x)), 16));
}
static inline v16 from_int8(const int8_t *q) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)q))); }
static inline w16 join16(v16 even, v16 odd) { /* pairs of bf16; exact */
    return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(even), 16), _mm512_castps_si512(odd));
}
/* Every two lanes become a pair of bf16: eight pairs from `low`, then eight from `high`. */
static inline w16 pairs16(v16 low, v16 high) { return narrow_two(low, high); }
/* Every four lanes contain sixteen int8. Spread the first or the last eight of them to the odd bytes, two per lane. */
static inline w16 spread_bytes(w16 q, const int last) {
    return last ? _mm512_unpackhi_epi8(_mm512_setzero_si512(), q) : _mm512_unpacklo_epi8(_mm512_setzero_si512(), q);
}
static inline v16 byte_of(w16 x, const int left) { return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(x, left), 24)); }
/* table[x >> shift & 15] */
static inline v16 look_up(w16 x, const int shift, v16 table) { return _mm512_permutexvar_ps(_mm512_srli_epi32(x, shift), table); }
/* Repeat each of the lanes 0 … 7, or 8 … 15, twice. */
static inline v16 twice16(v16 x, const int last) {
    const __m512i first = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    return _mm512_permutexvar_ps(last ? _mm512_add_epi32(first, _mm512_set1_epi32(8)) : first, x);
}

#elif (defined(__AVX2__) && defined(__FMA__)) || defined(__aarch64__)
#define HAS_VECTORS 1
#if defined(__AVX2__)
#include <immintrin.h>
enum { LANES = 8 };
#else
#include <arm_neon.h>
enum { LANES = 4 };
#endif
enum { SETS = 16 / LANES, REGISTERS = 8 };
typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t words __attribute__((vector_size(4 * LANES)));
typedef uint32_t whole __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
/* The same vectors in memory, at any address and of any type. */
typedef float loose_lanes __attribute__((vector_size(4 * LANES), aligned(1), may_alias));
typedef int32_t loose_words __attribute__((vector_size(4 * LANES), aligned(1), may_alias));
typedef uint16_t loose_halves __attribute__((vector_size(2 * LANES), aligned(1), may_alias));
typedef int8_t loose_bytes __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef struct {
    lanes of[SETS];
} v16;
typedef struct {
    words of[SETS];
} w16;

/* Compute each register r.of[i] from a.of[i], b.of[i], … */
#define EACH(r, expression) \
    _Pragma("GCC unroll 4") for (int i = 0; i < SETS; i++) (r).of[i] = (expression);

static inline lanes fma_of(lanes a, lanes b, lanes c) {
#if defined(__AVX2__)
    return _mm256_fmadd_ps(a, b, c);
#else
    return vfmaq_f32(c, a, b);
#endif
}
static inline lanes either(words first, lanes a, lanes b) { return (lanes)((first & (words)a) | (~first & (words)b)); }
static inline lanes all_of(float x) { return x - (lanes){0}; }

static inline v16 set16(float x) { v16 r; EACH(r, all_of(x)) return r; }
static inline v16 load16(const float *p) { v16 r; EACH(r, *(const loose_lanes *)(p + LANES * i)) return r; }
static inline void store16(float *p, v16 x) {
    _Pragma("GCC unroll 4") for (int i = 0; i < SETS; i++) *(loose_lanes *)(p + LANES * i) = x.of[i];
}
static inline v16 add16(v16 a, v16 b) { EACH(a, a.of[i] + b.of[i]) return a; }
static inline v16 sub16(v16 a, v16 b) { EACH(a, a.of[i] - b.of[i]) return a; }
static inline v16 mul16(v16 a, v16 b) { EACH(a, a.of[i] * b.of[i]) return a; }
static inline v16 div16(v16 a, v16 b) { EACH(a, a.of[i] / b.of[i]) return a; }
static inline v16 fma16(v16 a, v16 b, v16 c) { EACH(a, fma_of(a.of[i], b.of[i], c.of[i])) return a; }
static inline v16 max16(v16 a, v16 b) { EACH(a, either(a.of[i] > b.of[i], a.of[i], b.of[i])) return a; }
static inline v16 abs16(v16 a) { EACH(a, (lanes)((words)a.of[i] & 0x7fffffff)) return a; }
static inline v16 with_sign_of(v16 a, v16 sign) { EACH(a, either(sign.of[i] < 0.0f, -a.of[i], a.of[i])) return a; }
static inline lanes exp_of(lanes x) { /* as exp32 */
    lanes near = either(x > -87.0f, either(x < 88.0f, x, all_of(88.0f)), all_of(-87.0f));
    lanes shifted = near * 1.44269504088896341f + 12582912.0f, n = shifted - 12582912.0f; /* rounds: 1.5 · 2^23 */
    lanes r = fma_of(n, all_of(-0.693359375f), near), p = all_of(1.9875691500e-4f);
    r = fma_of(n, all_of(2.12194440e-4f), r);
    p = fma_of(p, r, all_of(1.3981999507e-3f));
    p = fma_of(p, r, all_of(8.3334519073e-3f));
    p = fma_of(p, r, all_of(4.1665795894e-2f));
    p = fma_of(p, r, all_of(1.6666665459e-1f));
    p = fma_of(p, r, all_of(5.0000001201e-1f));
    p = fma_of(p * r, r, r + 1.0f);
    p *= (lanes)((__builtin_convertvector(n, words) + 127) << 23);
    return either(x == x, either(x < -87.0f, all_of(0.0f), p), x);
}
static inline v16 exp16(v16 a) { EACH(a, exp_of(a.of[i])) return a; }
static inline float sum_of(v16 a) {
    float all[16], sum = 0.0f;
    store16(all, a);
    for (int i = 0; i < 16; i++) sum += all[i];
    return sum;
}
static inline float max_of(v16 a) {
    float all[16], most;
    store16(all, a), most = all[0];
    for (int i = 1; i < 16; i++) most = all[i] > most ? all[i] : most;
    return most;
}
static inline v16 only16(v16 x, int from, int to, float other) {
    float all[16];
    if (from <= 0 && to >= 16) return x;
    store16(all, x);
    for (int i = 0; i < 16; i++) all[i] = from <= i && i < to ? all[i] : other;
    return load16(all);
}
static inline w16 load_w16(const void *p) { w16 r; EACH(r, ((const loose_words *)p)[i]) return r; }
static inline void store_w16(void *p, w16 x) {
    _Pragma("GCC unroll 4") for (int i = 0; i < SETS; i++) ((loose_words *)p)[i] = x.of[i];
}
static inline v16 even16(w16 x) { v16 r; EACH(r, (lanes)(x.of[i] << 16)) return r; }
static inline v16 odd16(w16 x) { v16 r; EACH(r, (lanes)(x.of[i] & (int32_t)0xffff0000)) return r; }
static inline v16 rounded_bf16(v16 x) {
    EACH(x, (lanes)(((words)x.of[i] + 0x7fff + ((words)x.of[i] >> 16 & 1)) & (int32_t)0xffff0000))
    return x;
}
static inline v16 load_bf16(const bf16 *p) {
    v16 r;
    EACH(r, (lanes)(__builtin_convertvector((halves) * (const loose_halves *)(p + LANES * i), whole) << 16))
    return r;
}
static inline void store_bf16(bf16 *p, v16 x) {
    x = rounded_bf16(x);
    for (int i = 0; i < SETS; i++)
        *(loose_halves *)(p + LANES * i) = __builtin_convertvector((whole)x.of[i] >> 16, halves);
}
static inline w16 load_some_w16(const void *p, int64_t n) {
    w16 r = {0};
    if (n >= 16) return load_w16(p);
    memcpy(&r, p, (size_t)n * 4);
    return r;
}
static inline v16 load_some_bf16(const bf16 *p, int64_t n) {
    bf16 all[16] = {0};
    if (n >= 16) return load_bf16(p);
    memcpy(all, p, (size_t)n * 2);
    return load_bf16(all);
}
static inline void store_some_bf16(bf16 *p, v16 x, int64_t n) {
    bf16 all[16];
    store_bf16(n < 16 ? all : p, x);
    if (n < 16) memcpy(p, all, (size_t)n * 2);
}
static inline v16 from_int8(const int8_t *q) {
    v16 r;
#if defined(__AVX2__)
    EACH(r, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(q + LANES * i)))))
#else
    EACH(r, __builtin_convertvector(*(const loose_bytes *)(q + LANES * i), lanes))
#endif
    return r;
}
static inline w16 join16(v16 even, v16 odd) {
    w16 r;
    EACH(r, (words)((whole)even.of[i] >> 16) | (words)odd.of[i])
    return r;
}
static inline w16 pairs16(v16 low, v16 high) {
    w16 r;
    low = rounded_bf16(low), high = rounded_bf16(high);
#if defined(__AVX2__)
    for (int i = 0; i < SETS; i++) { /* the pack interleaves halves of registers, and the permute restores their order */
        v16 x = i ? high : low;
        __m256i both = _mm256_packus_epi32(_mm256_srli_epi32((__m256i)x.of[0], 16), _mm256_srli_epi32((__m256i)x.of[1], 16));
        r.of[i] = (words)_mm256_permute4x64_epi64(both, 0xd8);
    }
#else
    for (int i = 0; i < SETS; i++) {
        v16 x = i < SETS / 2 ? low : high;
        uint16x4_t first = vmovn_u32(vshrq_n_u32((uint32x4_t)x.of[2 * i % SETS], 16));
        r.of[i] = (words)vcombine_u16(first, vmovn_u32(vshrq_n_u32((uint32x4_t)x.of[2 * i % SETS + 1], 16)));
    }
#endif
    return r;
}
static inline w16 spread_bytes(w16 q, const int last) {
#if defined(__AVX2__)
    EACH(q, (words)(last ? _mm256_unpackhi_epi8(_mm256_setzero_si256(), (__m256i)q.of[i])
                         : _mm256_unpacklo_epi8(_mm256_setzero_si256(), (__m256i)q.of[i])))
#else
    EACH(q, (words)(last ? vzip2q_s8(vdupq_n_s8(0), (int8x16_t)q.of[i]) : vzip1q_s8(vdupq_n_s8(0), (int8x16_t)q.of[i])))
#endif
    return q;
}
static inline v16 byte_of(w16 x, const int left) { v16 r; EACH(r, __builtin_convertvector(x.of[i] << left >> 24, lanes)) return r; }
static inline v16 look_up(w16 x, const int shift, v16 table) {
    v16 r;
#if defined(__AVX2__)
    for (int i = 0; i < SETS; i++) { /* the permute uses the lower three bits; the fourth selects the half of the table */
        __m256i at = _mm256_srli_epi32((__m256i)x.of[i], shift);
        r.of[i] = _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.of[0], at), _mm256_permutevar8x32_ps(table.of[1], at),
                                   (__m256)_mm256_slli_epi32(at, 28));
    }
#else
    float from[16], to[16];
    uint32_t at[16];
    store16(from, table), store_w16(at, x);
    for (int i = 0; i < 16; i++) to[i] = from[at[i] >> shift & 15];
    r = load16(to);
#endif
    return r;
}
static inline v16 twice16(v16 x, const int last) {
    v16 r;
#if defined(__AVX2__)
    r.of[0] = _mm256_permutevar8x32_ps(x.of[last], _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3));
    r.of[1] = _mm256_permutevar8x32_ps(x.of[last], _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7));
#else
    EACH(r, i % 2 ? vzip2q_f32(x.of[2 * last + i / 2], x.of[2 * last + i / 2]) : vzip1q_f32(x.of[2 * last + i / 2], x.of[2 * last + i / 2]))
#endif
    return r;
}
#else
#define HAS_VECTORS 0
#endif

#if HAS_VECTORS
/* factor: a pair of inputs of a row x, as bf16 or widened to float32 once per call. columns16: one pair of each of
   sixteen columns, in registers, to be multiplied by a factor. */
#if BF16_PRODUCTS
typedef uint32_t factor;
typedef w16 columns16;
static inline columns16 columns_of(w16 pairs) { return pairs; }
static inline columns16 columns_from(v16 even, v16 odd) { return join16(even, odd); } /* exact */
static inline w16 pairs_of(columns16 y) { return y; }
static inline v16 dot16(v16 sum, factor x, columns16 y) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32((int)x), (__m512bh)y);
}
/* Return `count` pairs of x as factors. `room`: memory for the factors. */
static inline const factor *factors_of(const bf16 *x, int64_t count, factor *room) {
    (void)count, (void)room;
    return (const factor *)x;
}
static inline void store_factors(factor *to, v16 x) { store_bf16((bf16 *)to, x); } /* sixteen numbers, eight factors */
#else
typedef struct {
    float even, odd;
} factor;
typedef struct {
    v16 even, odd;
} columns16;
static inline columns16 columns_of(w16 pairs) { return (columns16){even16(pairs), odd16(pairs)}; }
static inline columns16 columns_from(v16 even, v16 odd) { return (columns16){even, odd}; }
static inline w16 pairs_of(columns16 y) { return join16(y.even, y.odd); }
static inline v16 dot16(v16 sum, factor x, columns16 y) {
    return fma16(set16(x.odd), y.odd, fma16(set16(x.even), y.even, sum));
}
static inline const factor *factors_of(const bf16 *x, int64_t count, factor *room) {
    float *to = (float *)room;
#pragma omp simd
    for (int64_t i = 0; i < 2 * count; i++) to[i] = up(x[i]);
    return room;
}
static inline void store_factors(factor *to, v16 x) { store16((float *)to, x); }
#endif
#endif
#endif
