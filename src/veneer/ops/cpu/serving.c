/* Serving in bfloat16: low-rank products of many adapters in one call, and attention over a paged
   cache. Needs AVX512-BF16; elsewhere torch's operations run (serve/forward/lowrank.py,
   serve/forward/paged.py), which are also the reference. Arithmetic is float32 inside. Work is divided
   statically, and a row's result does not depend on the other rows. */

#include "serving.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)

const int has_serving = 1;

enum { BLOCK = 16, TILE = 12, PARTS = 3, RECORD = THIN_RECORD };

#define FEW static inline __attribute__((always_inline)) void

/* u[i][16] = s_i A x_i for n rows and sixteen ranks; A as (in / 2, 16, 2): pairs of inputs, sixteen
   ranks adjacent. */
FEW first(const int n, const bf16 *A, i64 pairs_in, const uint32_t **x, const float *strengths, bf16 *u, i64 ldu) {
    __m512 c[4][2];
    for (int i = 0; i < n; i++) c[i][0] = c[i][1] = _mm512_setzero_ps();
    i64 j = 0;
    for (; j + 1 < pairs_in; j += 2) {
        __m512bh a = pairs(A + j * 32), b = pairs(A + j * 32 + 32);
        for (int i = 0; i < n; i++) {
            c[i][0] = _mm512_dpbf16_ps(c[i][0], a, both(x[i][j]));
            c[i][1] = _mm512_dpbf16_ps(c[i][1], b, both(x[i][j + 1]));
        }
    }
    if (j < pairs_in)
        for (int i = 0; i < n; i++) c[i][0] = _mm512_dpbf16_ps(c[i][0], pairs(A + j * 32), both(x[i][j]));
    for (int i = 0; i < n; i++) {
        __m512 sum = _mm512_mul_ps(_mm512_add_ps(c[i][0], c[i][1]), _mm512_set1_ps(strengths[i]));
        _mm256_storeu_si256((__m256i *)(u + i * ldu), (__m256i)_mm512_cvtneps_pbh(sum));
    }
}

/* y_i[from … to] += B u_i for n rows; B as (rank / 2, columns, 2). */
FEW second(const int n, const bf16 *B, i64 columns, i64 rank, const uint32_t **u, bf16 **y, i64 from, i64 to) {
    for (i64 c = from; c < to; c += 16) {
        __mmask16 mask = to - c < 16 ? (__mmask16)((1u << (to - c)) - 1) : 0xffff;
        __m512 sum[4];
        for (int i = 0; i < n; i++)
            sum[i] = _mm512_castsi512_ps(
                _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, y[i] + c)), 16));
        for (i64 k = 0; k < rank / 2; k++) {
            __m512bh b = (__m512bh)_mm512_maskz_loadu_epi32(mask, B + (k * columns + c) * 2);
            for (int i = 0; i < n; i++) sum[i] = _mm512_dpbf16_ps(sum[i], b, both(u[i][k]));
        }
        for (int i = 0; i < n; i++) _mm256_mask_storeu_epi16(y[i] + c, mask, (__m256i)_mm512_cvtneps_pbh(sum[i]));
    }
}

#define BY_FEW(f, n, ...) \
    switch (n) { \
    case 1: f(1, __VA_ARGS__); break; \
    case 2: f(2, __VA_ARGS__); break; \
    case 3: f(3, __VA_ARGS__); break; \
    default: f(4, __VA_ARGS__); \
    }

/* y[row] += strength_i B_s (A_s x[row]) for each i of segment s, row = rows[i], starts[s] <= i <
   starts[s + 1].
   table: RECORD numbers per segment: A, its rank, then up to PARTS of { B, first column of y, columns,
   first rank, number of ranks }. A (rank / 16, in / 2, 16, 2), B (rank / 2, columns, 2). A part whose B is
   0 is absent.
   Parts of two segments that share a row must have the same columns, or disjoint ones: threads divide a
   part's columns, so otherwise two threads could add to one number at once.
   u: memory for starts[nseg] rows of ldu; `in` and the parts' ranks are even, a total rank is a multiple
   of 16. */
void thin_rows_inside(const bf16 *x, i64 in, bf16 *y, i64 ldy, const i64 *table, i64 nseg, const i64 *starts,
                      const i64 *rows, const float *strengths, bf16 *u, i64 ldu, meeting *m) {
    int me = omp_get_thread_num(), all = omp_get_num_threads();
    i64 turn = 0;
    for (i64 s = 0; s < nseg; s++) {
        const i64 *rec = table + s * RECORD;
        if (!rec[0]) continue;
        for (i64 k = 0; k < rec[1]; k += 16)
            for (i64 i0 = starts[s]; i0 < starts[s + 1]; i0 += 4) {
                if (turn++ % all != me) continue;
                i64 few = starts[s + 1] - i0 < 4 ? starts[s + 1] - i0 : 4;
                const uint32_t *xs[4];
                for (i64 i = 0; i < few; i++) xs[i] = (const uint32_t *)(x + rows[i0 + i] * in);
                BY_FEW(first, few, (const bf16 *)rec[0] + k * in, in / 2, xs, strengths + i0, u + i0 * ldu + k, ldu)
            }
    }
    meet(m);
    for (i64 s = 0; s < nseg; s++) {
        const i64 *rec = table + s * RECORD;
        if (!rec[0]) continue;
        for (i64 p = 0; p < PARTS; p++) {
            const i64 *part = rec + 2 + 5 * p;
            i64 columns = part[2], from, to;
            if (!part[0]) continue;
            share(columns, 16, me, all, &from, &to); /* the same for every segment */
            for (i64 i0 = starts[s]; i0 < starts[s + 1]; i0 += 4) {
                i64 few = starts[s + 1] - i0 < 4 ? starts[s + 1] - i0 : 4;
                const uint32_t *us[4];
                bf16 *ys[4];
                for (i64 i = 0; i < few; i++) {
                    us[i] = (const uint32_t *)(u + (i0 + i) * ldu + part[3]);
                    ys[i] = y + rows[i0 + i] * ldy + part[1];
                }
                BY_FEW(second, few, (const bf16 *)part[0], columns, part[4], us, ys, from, to)
            }
        }
    }
}

void lora_rows(const bf16 *x, i64 in, bf16 *y, i64 ldy, const i64 *table, i64 nseg, const i64 *starts, const i64 *rows,
               const float *strengths, bf16 *u, i64 ldu, int threads) {
    meeting m = {0};
#pragma omp parallel num_threads(threads)
    thin_rows_inside(x, in, y, ldy, table, nseg, starts, rows, strengths, u, ldu, &m);
}

/* The cache of one layer: K as (blocks, kv, d / 2, BLOCK, 2), so that sixteen scores are computed at
   once; V as (blocks, kv, BLOCK / 2, d, 2). A token's slot is block BLOCK + its position in the block. */

static void store_token(const bf16 *k, const bf16 *v, bf16 *K, bf16 *V, i64 slot, i64 kv, i64 d) {
    i64 block = slot / BLOCK, at = slot % BLOCK;
    for (i64 h = 0; h < kv; h++, k += d, v += d) {
        bf16 *kb = K + (block * kv + h) * BLOCK * d, *vb = V + (block * kv + h) * BLOCK * d;
        /* clear the previous owner's values, which can be NaN: 0 · NaN is NaN */
        if (!at) memset(vb, 0, BLOCK * d * sizeof *vb);
        for (i64 j = 0; j < d / 2; j++) memcpy(kb + (j * BLOCK + at) * 2, k + 2 * j, 4);
        for (i64 j = 0; j < d; j++) vb[(at / 2 * d + j) * 2 + at % 2] = v[j];
    }
}

static void store_rows_inside(const bf16 *k, i64 ldk, const bf16 *v, i64 ldv, const i64 *slots, const i64 *starts, i64 nseq,
                              i64 kv, i64 d, bf16 *K, bf16 *V) {
    i64 from, to;
    share(nseq, 1, omp_get_thread_num(), omp_get_num_threads(), &from, &to);
    for (i64 s = from; s < to; s++)
        for (i64 t = starts[s]; t < starts[s + 1]; t++) store_token(k + t * ldk, v + t * ldv, K, V, slots[t], kv, d);
}

/* Store keys and values of all tokens in the cache; sequence s has tokens starts[s] … starts[s + 1], in
   order. */
void store_rows(const bf16 *k, i64 ldk, const bf16 *v, i64 ldv, const i64 *slots, const i64 *starts, i64 nseq, i64 kv, i64 d,
                bf16 *K, bf16 *V, int threads) {
#pragma omp parallel num_threads(threads)
    store_rows_inside(k, ldk, v, ldv, slots, starts, nseq, kv, d, K, V);
}

/* x ← w x / sqrt(mean x² + eps), if w is given; then rotated: (a, b) ← (a cos - b sin, b cos + a sin),
   b is d / 2 after a. */
static void turn(bf16 *x, const bf16 *w, float eps, const float *cs, const float *sn, i64 d) {
    float r = 1.0f, sum = 0.0f;
    if (w) {
#pragma omp simd reduction(+ : sum)
        for (i64 j = 0; j < d; j++) sum += up(x[j]) * up(x[j]);
        r = 1.0f / __builtin_sqrtf(sum / (float)d + eps);
    }
#pragma omp simd
    for (i64 j = 0; j < d / 2; j++) {
        float a = up(x[j]), b = up(x[j + d / 2]);
        if (w) a *= r * up(w[j]), b *= r * up(w[j + d / 2]);
        x[j] = down(a * cs[j] - b * sn[j]);
        x[j + d / 2] = down(b * cs[j] + a * sn[j]);
    }
}

/* qkv (n, (heads + 2 kv) d): queries and keys are normalized by qn and kn, if given, and rotated to
   their positions, in place; keys and values are stored in the cache. cs, sn: float32 (positions, d /
   2). */
void turn_and_store_inside(bf16 *qkv, i64 heads, i64 kv, i64 d, const float *cs, const float *sn, const bf16 *qn,
                           const bf16 *kn, float eps, const i64 *positions, const i64 *slots, const i64 *starts, i64 nseq,
                           bf16 *K, bf16 *V, meeting *m) {
    i64 ld = (heads + 2 * kv) * d, from, to;
    share(starts[nseq], 1, omp_get_thread_num(), omp_get_num_threads(), &from, &to);
    for (i64 t = from; t < to; t++)
        for (i64 h = 0; h < heads + kv; h++)
            turn(qkv + t * ld + h * d, h < heads ? qn : kn, eps, cs + positions[t] * (d / 2), sn + positions[t] * (d / 2), d);
    meet(m);
    store_rows_inside(qkv + heads * d, ld, qkv + (heads + kv) * d, ld, slots, starts, nseq, kv, d, K, V);
}

void rope_and_cache(bf16 *qkv, i64 heads, i64 kv, i64 d, const float *cs, const float *sn, const bf16 *qn, const bf16 *kn,
                    float eps, const i64 *positions, const i64 *slots, const i64 *starts, i64 nseq, bf16 *K, bf16 *V,
                    int threads) {
    meeting m = {0};
#pragma omp parallel num_threads(threads)
    turn_and_store_inside(qkv, heads, kv, d, cs, sn, qn, kn, eps, positions, slots, starts, nseq, K, V, &m);
}

#define SCORES(N)                                                                                    \
    static void scores##N(const uint32_t *q, i64 d2, const uint32_t *k, float *s, i64 lds) {         \
        __m512 c[N];                                                                                 \
        for (int r = 0; r < N; r++) c[r] = _mm512_setzero_ps();                                      \
        for (i64 j = 0; j < d2; j++) {                                                               \
            __m512bh b = pairs(k + j * BLOCK);                                                       \
            for (int r = 0; r < N; r++) c[r] = _mm512_dpbf16_ps(c[r], b, both(q[r * d2 + j]));       \
        }                                                                                            \
        for (int r = 0; r < N; r++) _mm512_storeu_ps(s + r * lds, c[r]);                             \
    }                                                                                                \
    static void values##N(const uint32_t *p, i64 ldp, const i64 *blocks, i64 first, i64 last, i64 kv, i64 h, i64 d,     \
                          const bf16 *V, i64 at, float *out) {                                       \
        __m512 c[N];                                                                                 \
        for (int r = 0; r < N; r++) c[r] = _mm512_setzero_ps();                                      \
        for (i64 b = first; b < last; b++) {                                                         \
            const uint32_t *v = (const uint32_t *)(V + (blocks[b] * kv + h) * BLOCK * d) + at;       \
            for (i64 j = 0; j < BLOCK / 2; j++) {                                                    \
                __m512bh w = pairs(v + j * d);                                                       \
                for (int r = 0; r < N; r++)                                                          \
                    c[r] = _mm512_dpbf16_ps(c[r], w, both(p[r * ldp + b * (BLOCK / 2) + j]));        \
            }                                                                                        \
        }                                                                                            \
        for (int r = 0; r < N; r++) _mm512_storeu_ps(out + r * d + at, c[r]);                        \
    }
SCORES(1)
SCORES(3)
SCORES(4)
SCORES(8)
SCORES(12)

#define BY_ROWS(f, n, ...) \
    (n == 1 ? f##1(__VA_ARGS__) : n == 3 ? f##3(__VA_ARGS__) : n == 4 ? f##4(__VA_ARGS__) : n == 8 ? f##8(__VA_ARGS__) : f##12(__VA_ARGS__))

/* out (n, heads d) = attention of each token over the keys of its sequence up to itself, at most
   `window` back if window > 0; scores are capped as cap tanh(s / cap) if cap > 0. positions[t]: number
   of tokens before t. tables: (nseq, ldt) block numbers. longest: the largest position + 1. */
void paged_attend_inside(const bf16 *q, i64 ldq, bf16 *out, i64 heads, i64 kv, i64 d, const i64 *positions,
                         const i64 *starts, i64 nseq, const i64 *tables, i64 ldt, const bf16 *K, const bf16 *V, float scale,
                         float cap, i64 window, i64 longest, int *failed) {
    i64 group = heads / kv, d2 = d / 2, room = (longest + BLOCK - 1) / BLOCK * BLOCK;
    i64 *first = aligned_room((nseq + 1) * 8); /* the number of tiles before each sequence */
    if (!all_there(first != NULL, failed)) return;
    first[0] = 0;
    for (i64 s = 0; s < nseq; s++) first[s + 1] = first[s] + ((starts[s + 1] - starts[s]) * group + TILE - 1) / TILE * kv;
    {
        uint32_t *qs = aligned_room(TILE * d2 * 4);
        float *sc = aligned_room(TILE * room * 4), *o = aligned_room(TILE * d * 4);
        bf16 *pr = aligned_room(TILE * room * 2);
        int there = all_there(qs && sc && o && pr, failed);
        for (i64 w = omp_get_thread_num(); there && w < first[nseq]; w += omp_get_num_threads()) {
            i64 s = 0;
            while (first[s + 1] <= w) s++;
            i64 all = (starts[s + 1] - starts[s]) * group, h = (w - first[s]) % kv, r0 = (w - first[s]) / kv * TILE;
            i64 rows = all - r0 < TILE ? all - r0 : TILE, n = rows <= 1 ? 1 : rows <= 3 ? 3 : rows <= 4 ? 4 : rows <= 8 ? 8 : TILE;
            const i64 *blocks = tables + s * ldt;
            i64 low = longest, high = 0;
            for (i64 r = 0; r < n; r++) {
                i64 row = r < rows ? r0 + r : r0, t = starts[s] + row / group;
                memcpy(qs + r * d2, q + t * ldq + (h * group + row % group) * d, (size_t)d * 2);
                i64 back = window > 0 && positions[t] >= window ? positions[t] - window + 1 : 0;
                if (back < low) low = back;
                if (positions[t] + 1 > high) high = positions[t] + 1;
            }
            i64 b0 = low / BLOCK, b1 = (high + BLOCK - 1) / BLOCK;
            for (i64 b = b0; b < b1; b++)
                BY_ROWS(scores, n, qs, d2, (const uint32_t *)(K + (blocks[b] * kv + h) * BLOCK * d), sc + b * BLOCK, room);
            float scales[TILE];
            for (i64 r = 0; r < n; r++) {
                i64 row = r < rows ? r0 + r : r0, t = starts[s] + row / group, to = positions[t] + 1;
                i64 from = window > 0 && to > window ? to - window : 0;
                float *x = sc + r * room;
                __m512 top = _mm512_set1_ps(-__builtin_inff()), by = _mm512_set1_ps(scale);
                const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
                for (i64 b = b0; b < b1; b++) {
                    __m512i at = _mm512_add_epi32(_mm512_set1_epi32((int)(b * BLOCK)), lanes);
                    __mmask16 seen = _mm512_cmplt_epi32_mask(at, _mm512_set1_epi32((int)to)) &
                                     _mm512_cmpge_epi32_mask(at, _mm512_set1_epi32((int)from));
                    __m512 v = _mm512_mul_ps(_mm512_loadu_ps(x + b * BLOCK), by);
                    if (cap > 0) {
                        __m512 e = exp512(_mm512_mul_ps(_mm512_abs_ps(v), _mm512_set1_ps(-2.0f / cap)));
                        __m512 one = _mm512_set1_ps(1.0f);
                        __m512 tanh = _mm512_div_ps(_mm512_sub_ps(one, e), _mm512_add_ps(one, e));
                        __mmask16 minus = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_LT_OQ);
                        v = _mm512_mul_ps(_mm512_set1_ps(cap), tanh);
                        v = _mm512_mask_sub_ps(v, minus, _mm512_setzero_ps(), v);
                    }
                    v = _mm512_mask_blend_ps(seen, _mm512_set1_ps(-__builtin_inff()), v);
                    top = _mm512_max_ps(top, v);
                    _mm512_storeu_ps(x + b * BLOCK, v);
                }
                __m512 shift = _mm512_set1_ps(_mm512_reduce_max_ps(top)), sum = _mm512_setzero_ps();
                for (i64 b = b0; b < b1; b++) {
                    __m512 e = exp512(_mm512_sub_ps(_mm512_loadu_ps(x + b * BLOCK), shift));
                    sum = _mm512_add_ps(sum, e);
                    _mm256_storeu_si256((__m256i *)(pr + r * room + b * BLOCK), (__m256i)_mm512_cvtneps_pbh(e));
                }
                scales[r] = 1.0f / _mm512_reduce_add_ps(sum);
            }
            for (i64 at = 0; at < d; at += 16)
                BY_ROWS(values, n, (const uint32_t *)pr, room / 2, blocks, b0, b1, kv, h, d, V, at, o);
            for (i64 r = 0; r < rows; r++) {
                bf16 *to = out + (starts[s] + (r0 + r) / group) * heads * d + (h * group + (r0 + r) % group) * d;
                for (i64 j = 0; j < d; j++) to[j] = down(o[r * d + j] * scales[r]);
            }
        }
        free(qs), free(sc), free(o), free(pr);
    }
    free(first);
}

int paged_attend(const bf16 *q, i64 ldq, bf16 *out, i64 heads, i64 kv, i64 d, const i64 *positions, const i64 *starts,
                  i64 nseq, const i64 *tables, i64 ldt, const bf16 *K, const bf16 *V, float scale, float cap, i64 window,
                  i64 longest, int threads) {
    int failed = DONE;
#pragma omp parallel num_threads(threads)
    paged_attend_inside(q, ldq, out, heads, kv, d, positions, starts, nseq, tables, ldt, K, V, scale, cap, window, longest,
                        &failed);
    return failed;
}

#else
const int has_serving = 0;
#endif
