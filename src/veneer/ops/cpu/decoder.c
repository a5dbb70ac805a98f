/* All layers of a decoder of Llama's kind in one parallel region, and the products they are made of. Needs AVX512-BF16;
   elsewhere serve/forward/llama.py does the same call by call, which is also the reference.

   A step of few tokens is hundreds of products of some tens of microseconds. Begun one by one, more time goes into
   waking the other threads than into the products; here they meet at barriers, and nobody sleeps. Arithmetic is float32
   inside and rounded where plan.py rounds. A row's result depends neither on the other rows nor on the number of threads. */

#include "serving.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)

const int has_decoder = 1;

enum { PANEL = 64, ROWS = 64, DEEP = 1024, CHUNK = 64, GROUP = 16 };
/* Pairs along the inputs: DEEP to a sum in registers, CHUNK that are made again of codes at once, GROUP under one scale. */

/* W (out, in) in panels of 64 rows, by what its numbers are:
     DENSE   bf16                              (out / 64, in / 2, 64, 2)
     INT8    scale q                           q like that; a scale a row, float32
     INT4    scale (q - 8) + zero, rounded     16 bytes for each (64 / 16) of a pair's columns: low halves the first eight
                                               columns' two inputs, high halves the other eight's; scale and zero in bf16 for
                                               each 32 inputs of a row, (out / 64, in / 32, 64, 2) */
enum { DENSE, INT8, INT4 };
typedef struct {
    i64 kind;
    const void *codes, *scales;
} matrix;

/* c[r][16 J] (+)= sum over p of a_r[p] . b[p][.] for R rows; a and b in pairs of bf16, b a panel's columns. */
static inline __attribute__((always_inline)) void tile(const int R, const int J, const uint32_t *a, i64 lda, const uint32_t *b,
                                                       i64 pairs_in, float *c, int add) {
    __m512 s[4][4];
    for (int r = 0; r < R; r++)
        for (int j = 0; j < J; j++) s[r][j] = add ? _mm512_load_ps(c + r * PANEL + 16 * j) : _mm512_setzero_ps();
    for (i64 p = 0; p < pairs_in; p++) {
        __m512bh y[4];
        for (int j = 0; j < J; j++) y[j] = pairs(b + p * PANEL + 16 * j);
        for (int r = 0; r < R; r++) {
            __m512bh x = both(a[r * lda + p]);
            for (int j = 0; j < J; j++) s[r][j] = _mm512_dpbf16_ps(s[r][j], x, y[j]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int j = 0; j < J; j++) _mm512_store_ps(c + r * PANEL + 16 * j, s[r][j]);
}

#define TILES(R)                                                                                                           \
    static void tile##R(int J, const uint32_t *a, i64 lda, const uint32_t *b, i64 n, float *c, int add) {                    \
        if (J == 4) tile(R, 4, a, lda, b, n, c, add);                                                                       \
        else if (J == 3) tile(R, 3, a, lda, b, n, c, add);                                                                  \
        else if (J == 2) tile(R, 2, a, lda, b, n, c, add);                                                                  \
        else tile(R, 1, a, lda, b, n, c, add);                                                                              \
    }
TILES(1)
TILES(2)
TILES(3)
TILES(4)

static inline __m512 wide(const bf16 *x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x)), 16));
}

/* `count` pairs of codes from pair k on, 16 J columns of a panel, as bf16: out (count, 64, 2). */
static void widen_codes(const matrix *w, i64 panel, i64 half, i64 k, i64 count, i64 within, int J, uint32_t *out) {
    if (w->kind == INT8) {
        const int8_t *q = (const int8_t *)w->codes + ((panel * half + k) * PANEL + within) * 2;
        for (i64 p = 0; p < count; p++, q += 2 * PANEL, out += PANEL)
            for (int j = 0; j < J; j++) {
                __m512 two[2];
                for (int e = 0; e < 2; e++) {
                    __m128i eight = _mm_loadu_si128((const __m128i *)(q + 32 * j + 16 * e));
                    two[e] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(eight));
                }
                _mm512_store_si512(out + 16 * j, narrow_two(two[0], two[1]));
            }
        return;
    }
    const uint8_t *q = (const uint8_t *)w->codes + ((panel * half + k) * PANEL + within);
    const uint32_t *scales = (const uint32_t *)w->scales + (panel * (half / GROUP) + k / GROUP) * PANEL + within;
    const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    for (i64 p = 0; p < count; p += GROUP, scales += PANEL, q += GROUP * PANEL, out += GROUP * PANEL)
        for (int j = 0; j < J; j++) {
            __m512 by[2], plus[2];
            for (int e = 0; e < 2; e++) { /* eight columns' scale and zero, each for both inputs */
                __m256i eight = _mm256_loadu_si256((const __m256i *)(scales + 16 * j + 8 * e));
                __m512i own = _mm512_permutexvar_epi32(twice, _mm512_castsi256_si512(eight));
                by[e] = _mm512_castsi512_ps(_mm512_slli_epi32(own, 16));
                __m512 zero = _mm512_castsi512_ps(_mm512_and_si512(own, _mm512_set1_epi32((int)0xffff0000)));
                plus[e] = _mm512_fnmadd_ps(by[e], _mm512_set1_ps(8.0f), zero);
            }
            for (i64 g = 0; g < GROUP; g++) {
                __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(q + g * PANEL + 16 * j)));
                __m512 low = _mm512_cvtepi32_ps(_mm512_and_si512(codes, _mm512_set1_epi32(15)));
                __m512 high = _mm512_cvtepi32_ps(_mm512_srli_epi32(codes, 4));
                low = _mm512_fmadd_ps(low, by[0], plus[0]);
                high = _mm512_fmadd_ps(high, by[1], plus[1]);
                _mm512_store_si512(out + g * PANEL + 16 * j, narrow_two(low, high));
            }
        }
}

/* Columns from … to (multiples of 16) of y = x Wᵀ + bias, or of y += …; x (n, in). The rows of a block are few enough for
   their sums to stay in the first cache beside the panel's columns. */
static void columns(const bf16 *x, i64 n, i64 in, const matrix *w, const bf16 *bias, bf16 *y, i64 ldy, int onto, i64 from,
                    i64 to) {
    float c[ROWS * PANEL] __attribute__((aligned(64)));
    uint32_t made[CHUNK * PANEL] __attribute__((aligned(64)));
    const uint32_t *xs = (const uint32_t *)x;
    i64 half = in / 2, most = w->kind == DENSE ? DEEP : CHUNK;
    for (i64 at = from, width; at < to; at += width) {
        i64 within = at % PANEL;
        width = PANEL - within < to - at ? PANEL - within : to - at;
        int J = (int)(width / 16);
        for (i64 r0 = 0; r0 < n; r0 += ROWS) {
            i64 m = n - r0 < ROWS ? n - r0 : ROWS;
            for (i64 k = 0; k < half; k += most) {
                i64 deep = half - k < most ? half - k : most;
                const uint32_t *b = made;
                if (w->kind == DENSE) b = (const uint32_t *)w->codes + (at / PANEL * half + k) * PANEL + within;
                else widen_codes(w, at / PANEL, half, k, deep, within, J, made);
                for (i64 r = 0; r < m; r += 4) {
                    const uint32_t *a = xs + (r0 + r) * half + k;
                    float *sums = c + r * PANEL;
                    switch (m - r) {
                    case 1: tile1(J, a, half, b, deep, sums, k > 0); break;
                    case 2: tile2(J, a, half, b, deep, sums, k > 0); break;
                    case 3: tile3(J, a, half, b, deep, sums, k > 0); break;
                    default: tile4(J, a, half, b, deep, sums, k > 0);
                    }
                }
            }
            for (i64 r = 0; r < m; r++)
                for (int j = 0; j < J; j++) {
                    bf16 *o = y + (r0 + r) * ldy + at + 16 * j;
                    __m512 v = _mm512_load_ps(c + r * PANEL + 16 * j);
                    if (w->kind == INT8) v = _mm512_mul_ps(v, _mm512_loadu_ps((const float *)w->scales + at + 16 * j));
                    if (bias) v = _mm512_add_ps(v, wide(bias + at + 16 * j));
                    if (onto) { /* the product is rounded before it is added, as where it is a tensor of its own */
                        __m256i whole = (__m256i)_mm512_cvtneps_pbh(v);
                        v = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(whole), 16));
                        v = _mm512_add_ps(v, wide(o));
                    }
                    _mm256_storeu_si256((__m256i *)o, (__m256i)_mm512_cvtneps_pbh(v));
                }
        }
    }
}

static void product_inside(const bf16 *x, i64 n, i64 in, matrix w, const bf16 *bias, bf16 *y, i64 out, int onto) {
    i64 from, to;
    share(out, 16, omp_get_thread_num(), omp_get_num_threads(), &from, &to);
    columns(x, n, in, &w, bias, y, out, onto, from, to);
}

/* y (n, out) = x Wᵀ + bias, or y += …: `columns` for all of them. `out` a multiple of 16, `in` even, of 32 for INT4. */
void panel_product(const bf16 *x, i64 n, i64 in, i64 kind, const void *codes, const void *scales, const bf16 *bias, bf16 *y,
                   i64 out, int onto, int threads) {
#pragma omp parallel num_threads(threads)
    product_inside(x, n, in, (matrix){kind, codes, scales}, bias, y, out, onto);
}

static void norm_inside(const bf16 *x, const bf16 *w, bf16 *y, i64 n, i64 dim, float eps) {
    i64 from, to;
    share(n, 1, omp_get_thread_num(), omp_get_num_threads(), &from, &to);
    for (i64 i = from; i < to; i++) norm_row(x + i * dim, w, y + i * dim, dim, eps);
}

enum {
    NORM, QKV, QKV_SCALES, QKV_BIAS, Q_NORM, K_NORM, OUT, OUT_SCALES, OUT_BIAS, NORM_AFTER, GATE_UP, GATE_UP_SCALES, DOWN,
    DOWN_SCALES, WINDOW, KEYS, VALUES, FIELDS
};

/* x (n, dim) through all layers, in place: serve/forward/llama.py's LlamaForward.hidden up to the last norm.
   layers: FIELDS numbers each, pointers in the main; sizes: dim, heads, kv, d, ffn, the kind of all matrices; numbers: eps, scale. positions … longest:
   as paged_attend has them. thin: thin_rows' tables of groups 4 layer … 4 layer + 3 one after another, or none; nseg … ldu: as
   there. room: n (dim + (heads + 2 kv) d + heads d + 3 ffn) elements. */
int decode(bf16 *x, i64 n, const i64 *layers, i64 count, const i64 *sizes, const float *numbers, const float *cs,
            const float *sn, const i64 *positions, const i64 *slots, const i64 *starts, i64 nseq, const i64 *tables, i64 ldt,
            i64 longest, const i64 *thin, i64 nseg, const i64 *segments, const i64 *rows, const float *strengths, bf16 *u,
            i64 ldu, bf16 *room, int threads) {
    i64 dim = sizes[0], heads = sizes[1], kv = sizes[2], d = sizes[3], ffn = sizes[4], kind = sizes[5], wide_qkv = (heads + 2 * kv) * d;
    float eps = numbers[0], scale = numbers[1];
    bf16 *h = room, *qkv = h + n * dim, *seen = qkv + n * wide_qkv, *gates = seen + n * heads * d, *act = gates + n * 2 * ffn;
    i64 record = THIN_RECORD * nseg;
    int failed = DONE;
    meeting m = {0};
#pragma omp parallel num_threads(threads)
    for (i64 i = 0; i < count; i++) {
        const i64 *of = layers + i * FIELDS;
#define AT(field) ((const bf16 *)of[field])
#define MATRIX(field) ((matrix){kind, (const void *)of[field], (const void *)of[field##_SCALES]})
#define THIN(group, from, in, onto, out) \
    if (thin) { \
        thin_rows_inside(from, in, onto, out, thin + (4 * i + group) * record, nseg, segments, rows, strengths, u, ldu, &m); \
        meet(&m); \
    }
        norm_inside(x, AT(NORM), h, n, dim, eps);
        meet(&m);
        product_inside(h, n, dim, MATRIX(QKV), AT(QKV_BIAS), qkv, wide_qkv, 0);
        meet(&m);
        THIN(0, h, dim, qkv, wide_qkv)
        turn_and_store_inside(qkv, heads, kv, d, cs, sn, AT(Q_NORM), AT(K_NORM), eps, positions, slots, starts, nseq,
                              (bf16 *)of[KEYS], (bf16 *)of[VALUES], &m);
        meet(&m);
        paged_attend_inside(qkv, wide_qkv, seen, heads, kv, d, positions, starts, nseq, tables, ldt, AT(KEYS), AT(VALUES),
                            scale, 0.0f, of[WINDOW], longest, &failed);
        meet(&m);
        product_inside(seen, n, heads * d, MATRIX(OUT), AT(OUT_BIAS), x, dim, 1);
        meet(&m);
        THIN(1, seen, heads * d, x, dim)
        norm_inside(x, AT(NORM_AFTER), h, n, dim, eps);
        meet(&m);
        product_inside(h, n, dim, MATRIX(GATE_UP), NULL, gates, 2 * ffn, 0);
        meet(&m);
        THIN(2, h, dim, gates, 2 * ffn)
        i64 from, to;
        share(ffn, 16, omp_get_thread_num(), omp_get_num_threads(), &from, &to);
        for (i64 r = 0; r < n; r++)
            silu_gate_row(gates + r * 2 * ffn + from, gates + r * 2 * ffn + ffn + from, act + r * ffn + from, to - from);
        meet(&m);
        product_inside(act, n, ffn, MATRIX(DOWN), NULL, x, dim, 1);
        meet(&m);
        THIN(3, act, ffn, x, dim)
#undef AT
#undef MATRIX
#undef THIN
    }
    return failed;
}

#else
const int has_decoder = 0;
#endif
