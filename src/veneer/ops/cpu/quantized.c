/* Quantize and dequantize frozen weights in 4 and 8 bits, to float32 or bfloat16 (ops/quantized.py has
   the formulas and the reference). The arithmetic is bitsandbytes': products and sums in float32, each
   rounded separately, and one rounding to bfloat16 at the end, so that results are bit-identical. Runs
   on any processor; blocks of 64 have a fast path with AVX512. */

#include "bf16.h"

typedef int64_t i64;

static inline void put(void *out, i64 at, float value, int wide) {
    if (wide)
        ((float *)out)[at] = value;
    else
        ((bf16 *)out)[at] = down(value);
}

/* A block's absmax. Double-quantized, it is map8[q] s + offset: two roundings, so the compiler must not
   fuse them. */
static inline float largest(i64 b, const float *absmax, const uint8_t *codes, const float *map8, i64 nested, float offset) {
    if (!codes) return absmax[b];
    volatile float product = map8[codes[b]] * absmax[b / nested];
    return product + offset;
}

#if defined(__AVX512BW__) && defined(__AVX512VL__)
/* Dequantize 64 codes of one block to bfloat16: the sixteen products of table and absmax are computed
   and rounded once. */
static inline void block64(const uint8_t *packed, __m512 table, float absmax, bf16 *out) {
    __m512i u = _mm512_castps_si512(_mm512_mul_ps(table, _mm512_set1_ps(absmax)));
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    u = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, odd), _mm512_set1_epi32(0x7fff)), 16);
    __m512i rounded = _mm512_castsi256_si512(_mm512_cvtepi32_epi16(u));
    for (int half = 0; half < 2; half++) {
        __m128i both = _mm_loadu_si128((const __m128i *)(packed + 16 * half)), low = _mm_set1_epi8(15);
        __m128i first = _mm_and_si128(_mm_srli_epi16(both, 4), low), second = _mm_and_si128(both, low);
        __m256i order = _mm256_set_m128i(_mm_unpackhi_epi8(first, second), _mm_unpacklo_epi8(first, second));
        _mm512_storeu_si512(out + 32 * half, _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(order), rounded));
    }
}
#endif

/* Elements first … first + count of a weight: table[code] absmax. Two codes per byte, the first in the
   high half. */
void blocks4_dense(const uint8_t *packed, const float *absmax, const uint8_t *codes, const float *map8, float offset,
                   const float *table, i64 first, i64 count, i64 block, i64 nested, void *out, int wide, int threads) {
    i64 from_block = first / block, to_block = (first + count + block - 1) / block;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 b = from_block; b < to_block; b++) {
        float largest_here = largest(b, absmax, codes, map8, nested, offset);
        i64 from = b * block > first ? b * block : first;
        i64 to = (b + 1) * block < first + count ? (b + 1) * block : first + count;
#if defined(__AVX512BW__) && defined(__AVX512VL__)
        if (!wide && block == 64 && to - from == 64) {
            block64(packed + from / 2, _mm512_loadu_ps(table), largest_here, (bf16 *)out + (from - first));
            continue;
        }
#endif
        for (i64 i = from; i < to; i++) {
            int code = i % 2 ? packed[i / 2] & 15 : packed[i / 2] >> 4;
            put(out, i - first, table[code] * largest_here, wide);
        }
    }
}

/* Codes of count elements: the number of the 15 bounds below x / absmax, mapped by `order`. */
void blocks4_quantize(const void *x, int wide, const float *bounds, const int32_t *order, i64 count, i64 block,
                      uint8_t *packed, float *absmax, int threads) {
    i64 blocks = (count + block - 1) / block;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 b = 0; b < blocks; b++) {
        i64 from = b * block, n = count - from < block ? count - from : block;
        float most = 0.0f;
        for (i64 i = 0; i < n; i++) {
            float v = wide ? ((const float *)x)[from + i] : up(((const bf16 *)x)[from + i]);
            most = __builtin_fabsf(v) > most ? __builtin_fabsf(v) : most;
        }
        absmax[b] = most;
        float inverse = 1.0f / (most > 1e-38f ? most : 1e-38f);
        uint8_t *out = packed + from / 2;
        i64 i = 0;
#if defined(__AVX512BW__) && defined(__AVX512VL__)
        for (; i + 16 <= n; i += 16) {
            __m512 v = wide ? _mm512_loadu_ps((const float *)x + from + i)
                            : _mm512_castsi512_ps(_mm512_slli_epi32(
                                  _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)((const bf16 *)x + from + i))), 16));
            v = _mm512_mul_ps(v, _mm512_set1_ps(inverse));
            __m512i place = _mm512_setzero_si512(), one = _mm512_set1_epi32(1);
            for (int k = 0; k < 15; k++)
                place = _mm512_mask_add_epi32(
                    place, _mm512_cmp_ps_mask(v, _mm512_set1_ps(bounds[k]), _CMP_GT_OQ), place, one);
            place = _mm512_permutexvar_epi32(place, _mm512_loadu_si512(order));
            __m128i bytes = _mm_maddubs_epi16(_mm512_cvtepi32_epi8(place), _mm_set1_epi16(0x0110));
            _mm_storel_epi64((__m128i *)(out + i / 2), _mm_packus_epi16(bytes, bytes));
        }
#endif
        for (; i < n; i++) {
            float v = (wide ? ((const float *)x)[from + i] : up(((const bf16 *)x)[from + i])) * inverse;
            int place = 0;
            for (int k = 0; k < 15; k++) place += v > bounds[k];
            if (i % 2)
                out[i / 2] |= (uint8_t)order[place];
            else
                out[i / 2] = (uint8_t)(order[place] << 4);
        }
    }
}

/* rows × columns of codes q scale / 127, one scale per row. */
void rows8_dense(const int8_t *codes, const float *scale, i64 rows, i64 columns, void *out, int wide, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 r = 0; r < rows; r++) {
        float s = scale[r];
        const int8_t *q = codes + r * columns;
        for (i64 c = 0; c < columns; c++)
            put(out, r * columns + c, (float)q[c] * s * 7.874015718698502e-3f, wide);
    }
}

/* -- the blocks of GGUF files (ggml's types; gguf-py's quants.py is the reference) ---------------------------------- */

static inline float half(const uint8_t *p) {
    uint32_t h = (uint32_t)p[0] | (uint32_t)p[1] << 8, sign = (h & 0x8000u) << 16, e = h >> 10 & 31, m = h & 1023, u;
    if (e == 31)
        u = sign | 0x7f800000u | m << 13;
    else if (e)
        u = sign | (e + 112) << 23 | m << 13;
    else { /* subnormal: m / 2^24 */
        float f = (float)m * 5.9604644775390625e-8f;
        return sign ? -f : f;
    }
    float f;
    memcpy(&f, &u, 4);
    return f;
}

/* The j-th of eight 6-bit scales and minima of a K block, packed in 12 bytes. */
static inline void scale_min(const uint8_t *q, int j, int *scale, int *min) {
    if (j < 4) {
        *scale = q[j] & 63;
        *min = q[j + 4] & 63;
    } else {
        *scale = (q[j + 4] & 15) | (q[j - 4] >> 6) << 4;
        *min = q[j + 4] >> 4 | (q[j] >> 6) << 4;
    }
}

static inline uint32_t bits32(const uint8_t *p) {
    uint32_t u;
    memcpy(&u, p, 4);
    return u;
}

/* d q - m in two roundings, as in the reference. */
static inline float less(float product, float m) {
    volatile float rounded = product;
    return rounded - m;
}

static inline float more(float product, float m) {
    volatile float rounded = product;
    return rounded + m;
}

static void block_dense(int type, const uint8_t *p, float *y) {
    if (type == 2 || type == 3 || type == 6 || type == 7) { /* Q4_0, Q4_1, Q5_0, Q5_1: 32 weights */
        int five = type >= 6, shifted = type == 2 || type == 6;
        float d = half(p), m = shifted ? 0.0f : half(p + 2);
        const uint8_t *q = p + (shifted ? 2 : 4);
        uint32_t high = five ? bits32(q) : 0;
        q += five ? 4 : 0;
        for (int i = 0; i < 16; i++) {
            int a = (q[i] & 15) | (int)(high >> i & 1) << 4, b = q[i] >> 4 | (int)(high >> (i + 16) & 1) << 4;
            int zero = five ? 16 : 8;
            y[i] = shifted ? d * (float)(a - zero) : more(d * (float)a, m);
            y[i + 16] = shifted ? d * (float)(b - zero) : more(d * (float)b, m);
        }
    } else if (type == 8) { /* Q8_0: 32 weights */
        float d = half(p);
        for (int i = 0; i < 32; i++) y[i] = d * (float)(int8_t)p[2 + i];
    } else if (type == 12 || type == 13) { /* Q4_K, Q5_K: 256 weights, eight scales and minima */
        float d = half(p), dmin = half(p + 2);
        const uint8_t *high = p + 16, *q = p + (type == 13 ? 48 : 16);
        for (int j = 0; j < 8; j++) {
            int scale, min;
            scale_min(p + 4, j, &scale, &min);
            float s = d * (float)scale, m = dmin * (float)min;
            for (int i = 0; i < 32; i++) {
                int code = j % 2 ? q[j / 2 * 32 + i] >> 4 : q[j / 2 * 32 + i] & 15;
                if (type == 13) code |= (high[i] >> j & 1) << 4;
                y[j * 32 + i] = less(s * (float)code, m);
            }
        }
    } else { /* Q6_K: 256 weights, sixteen scales */
        const uint8_t *low = p, *high = p + 128;
        const int8_t *scales = (const int8_t *)(p + 192);
        float d = half(p + 208);
        for (int n = 0; n < 256; n++) {
            int part = n / 128, in = n % 128, l = in % 32, which = in / 32;
            int four = which < 2 ? low[part * 64 + which * 32 + l] & 15 : low[part * 64 + (which - 2) * 32 + l] >> 4;
            int two = high[part * 32 + l] >> (2 * which) & 3;
            float s = d * (float)scales[n / 16];
            y[n] = s * (float)((four | two << 4) - 32);
        }
    }
}

void ggml_dense(int type, const uint8_t *raw, i64 bytes, void *out, int wide, int threads) {
    static const int sizes[] = {[2] = 18, [3] = 20, [6] = 22, [7] = 24, [8] = 34, [12] = 144, [13] = 176, [14] = 210};
    int size = sizes[type], count = type < 12 ? 32 : 256;
    i64 blocks = bytes / size;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 b = 0; b < blocks; b++) {
        float y[256];
        block_dense(type, raw + b * size, wide ? (float *)out + b * count : y);
        if (!wide)
            for (int i = 0; i < count; i++) ((bf16 *)out)[b * count + i] = down(y[i]);
    }
}
