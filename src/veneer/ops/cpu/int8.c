/* Products with a frozen weight in 8 bits, with VNNI (ops/int8.py has the formulas and the reference).
   VNNI multiplies unsigned by signed bytes, so 128 is added to the weight's codes when they are packed,
   and 128 Σ q is subtracted from each sum. */

#include "bf16.h"

typedef int64_t i64;

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

/* A tile of sums is ROWS rows and 3 vectors of 16 columns: 24 of the 32 registers. (6 rows and 4 vectors
   run at 0.8 times the speed on Zen 5.) */
enum { ROWS = 8, PANEL = 48, CHUNK = 64 * ROWS };

static inline __m512 wide16(const bf16 *x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x)), 16));
}

/* One row of k values: codes round(x factor / step) with step = max |x factor| / 127, and 128 Σ codes. */
static void quantize_row(const bf16 *x, const float *factor, i64 k, int8_t *codes, float *step, int32_t *excess) {
    __m512 most = _mm512_setzero_ps(), wrong = most; /* 0, or NaN if a value is not finite */
    for (i64 j = 0; j < k; j += 16) {
        __m512 v = _mm512_mul_ps(wide16(x + j), _mm512_loadu_ps(factor + j));
        most = _mm512_max_ps(most, _mm512_abs_ps(v));
        wrong = _mm512_fmadd_ps(v, _mm512_setzero_ps(), wrong);
    }
    float largest = _mm512_reduce_max_ps(most);
    __m512 inverse = _mm512_set1_ps(largest > 0 ? 127.0f / largest : 0.0f);
    __m512i sum = _mm512_setzero_si512();
    for (i64 j = 0; j < k; j += 16) {
        __m512 v = _mm512_mul_ps(wide16(x + j), _mm512_loadu_ps(factor + j));
        __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(v, inverse));
        sum = _mm512_add_epi32(sum, code);
        _mm_storeu_si128((__m128i *)(codes + j), _mm512_cvtsepi32_epi8(code));
    }
    *step = largest / 127.0f + _mm512_reduce_add_ps(wrong);
    *excess = 128 * _mm512_reduce_add_epi32(sum);
}

/* Transpose 16 x 16 groups of four bytes, and add 128 to each byte: out[q][i] = rows[i][q], q = 0 … 15. */
static void transpose16(const int8_t *w, i64 stride, uint8_t *out, i64 step) {
    __m512i a[16], b[16];
    const __m512i plus = _mm512_set1_epi8((char)128);
    for (int i = 0; i < 16; i++) a[i] = _mm512_xor_si512(_mm512_loadu_si512(w + i * stride), plus);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int h = 0; h < 2; h++) {
            a[i + 2 * h] = _mm512_unpacklo_epi64(b[i + h], b[i + h + 2]);
            a[i + 2 * h + 1] = _mm512_unpackhi_epi64(b[i + h], b[i + h + 2]);
        }
    for (int i = 0; i < 4; i++) {
        __m512i low = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88), high = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
        __m512i low2 = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88), high2 = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
        _mm512_store_si512(out + i * step, _mm512_shuffle_i32x4(low, low2, 0x88));
        _mm512_store_si512(out + (i + 8) * step, _mm512_shuffle_i32x4(low, low2, 0xdd));
        _mm512_store_si512(out + (i + 4) * step, _mm512_shuffle_i32x4(high, high2, 0x88));
        _mm512_store_si512(out + (i + 12) * step, _mm512_shuffle_i32x4(high, high2, 0xdd));
    }
}

/* Pack the panel of 16 J columns from `at`: for every four inputs, four bytes of each column. A column of
   the panel is a row of the weight (for x Wᵀ) or a column of the weight (for x W). */
static void pack(const int8_t *w, i64 in, i64 k, int transposed, i64 at, int J, uint8_t *panel) {
    i64 step = 64 * J;
    if (transposed) {
        for (int j = 0; j < J; j++) {
            const int8_t *rows = w + (at + 16 * j) * in;
            i64 q = 0;
            for (; q + 64 <= k; q += 64) transpose16(rows + q, in, panel + q / 4 * step + 64 * j, step);
            for (; q < k; q++)
                for (int i = 0; i < 16; i++) panel[q / 4 * step + 64 * j + 4 * i + q % 4] = (uint8_t)(rows[i * in + q] + 128);
        }
        return;
    }
    for (i64 q = 0; q < k; q += 4)
        for (int j = 0; j < J; j++) {
            __m128i r[4];
            for (int i = 0; i < 4; i++)
                r[i] = _mm_xor_si128(_mm_loadu_si128((const __m128i *)(w + (q + i) * in + at + 16 * j)), _mm_set1_epi8((char)128));
            __m128i a = _mm_unpacklo_epi8(r[0], r[1]), b = _mm_unpackhi_epi8(r[0], r[1]);
            __m128i c = _mm_unpacklo_epi8(r[2], r[3]), d = _mm_unpackhi_epi8(r[2], r[3]);
            __m128i *to = (__m128i *)(panel + q / 4 * step + 64 * j);
            _mm_store_si128(to, _mm_unpacklo_epi16(a, c));
            _mm_store_si128(to + 1, _mm_unpackhi_epi16(a, c));
            _mm_store_si128(to + 2, _mm_unpacklo_epi16(b, d));
            _mm_store_si128(to + 3, _mm_unpackhi_epi16(b, d));
        }
}

typedef struct {
    const int8_t *codes;
    const float *steps, *outliers, *column, *rest;
    const int32_t *excess;
    const bf16 *bias;
    bf16 *y;
    i64 k, columns, kept;
} product;

/* Compute ROWS rows from r and 16 J columns from `at`, and write the first m rows. */
static inline __attribute__((always_inline)) void tile(const product *p, const uint8_t *panel, i64 r, i64 m, i64 at, const int J) {
    __m512i sums[ROWS][3];
    const int8_t *a = p->codes + r * p->k;
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 3
        for (int j = 0; j < J; j++) sums[i][j] = _mm512_setzero_si512();
    for (i64 q = 0; q < p->k; q += 4, panel += 64 * J) {
        __m512i b[3];
#pragma GCC unroll 3
        for (int j = 0; j < J; j++) b[j] = _mm512_load_si512(panel + 64 * j);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
            int32_t four;
            memcpy(&four, a + i * p->k + q, 4);
            __m512i x = _mm512_set1_epi32(four);
#pragma GCC unroll 3
            for (int j = 0; j < J; j++) sums[i][j] = _mm512_dpbusd_epi32(sums[i][j], b[j], x);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++) { /* unrolled, so that the sums stay in registers */
        i64 row = r + i;
        if (i >= m) break;
#pragma GCC unroll 3
        for (int j = 0; j < J; j++) {
            i64 c = at + 16 * j;
            __m512 v = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums[i][j], _mm512_set1_epi32(p->excess[row])));
            v = _mm512_mul_ps(v, _mm512_mul_ps(_mm512_set1_ps(p->steps[row]), _mm512_loadu_ps(p->column + c)));
            for (i64 o = 0; o < p->kept; o++)
                v = _mm512_fmadd_ps(_mm512_set1_ps(p->outliers[row * p->kept + o]), _mm512_loadu_ps(p->rest + o * p->columns + c), v);
            if (p->bias) v = _mm512_add_ps(v, wide16(p->bias + c));
            _mm256_storeu_si256((__m256i *)(p->y + row * p->columns + c), narrow16(v));
        }
    }
}

static void rows_of(const product *p, const uint8_t *panel, i64 from, i64 to, i64 at, int J) {
    for (i64 r = from; r < to; r += ROWS) {
        i64 m = to - r < ROWS ? to - r : ROWS;
        if (J == 3) tile(p, panel, r, m, at, 3);
        else if (J == 2) tile(p, panel, r, m, at, 2);
        else tile(p, panel, r, m, at, 1);
    }
}

/* y (n, columns) = x Wᵀ + bias, or x W; x (n, k), w (out, in) codes. Both k and columns are
   multiples of 16.

   factor (k): multiplies x before it is quantized. column (columns): the steps of the columns. kept: the
   number of outlier channels of x, whose indices are `which` and whose factor is 0; rest (kept, columns):
   their weights, in float32. codes: memory for (n + 7) k bytes. */
int int8_product(const bf16 *x, i64 n, i64 k, const float *factor, const int8_t *w, i64 in, int transposed, i64 columns,
                 const float *column, const int32_t *which, i64 kept, const float *rest, const bf16 *bias, int8_t *codes,
                 bf16 *y, int threads) {
    int failed = DONE;
    i64 padded = n + ROWS;
    float *steps = aligned_room(padded * (4 + 4 + 4 * kept));
    if (!steps) return NO_ROOM;
    int32_t *excess = (int32_t *)(steps + padded);
    float *outliers = (float *)(excess + padded);
    product p = {codes, steps, outliers, column, rest, excess, bias, y, k, columns, kept};
    i64 panels = (columns + PANEL - 1) / PANEL, chunks = (n + CHUNK - 1) / CHUNK;
    memset(codes + n * k, 0, (size_t)((ROWS - 1) * k));
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (i64 r = 0; r < n; r++) {
            quantize_row(x + r * k, factor, k, codes + r * k, steps + r, excess + r);
            for (i64 o = 0; o < kept; o++) outliers[r * kept + o] = up(x[r * k + which[o]]);
        }
        uint8_t *panel = aligned_room(k * PANEL);
        int there = all_there(panel != 0, &failed);
        i64 ready = -1;
#pragma omp for schedule(static)
        for (i64 t = 0; t < panels * chunks; t++) {
            if (!there) continue;
            i64 own = t / chunks, at = own * PANEL, from = t % chunks * CHUNK, to = from + CHUNK < n ? from + CHUNK : n;
            int J = (int)((columns - at < PANEL ? columns - at : PANEL) / 16);
            if (own != ready) pack(w, in, k, transposed, at, J, panel);
            ready = own;
            rows_of(&p, panel, from, to, at, J);
        }
        free(panel);
    }
    free(steps);
    return failed;
}
#endif
