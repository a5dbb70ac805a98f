/* Serving in bfloat16: low-rank products of many adapters in one call, and attention over a paged
   cache. Needs the vectors of vec.h; otherwise torch's operations run (serve/forward/lowrank.py,
   serve/forward/paged.py), which are also the reference. Arithmetic is float32 inside. Work is divided
   statically, and a row's result does not depend on the other rows. */

#include "serving.h"

#if HAS_VECTORS

const int has_serving = 1;

enum { BLOCK = 16, TILE = REGISTERS == 32 ? 12 : 4, PARTS = 3, RECORD = THIN_RECORD };
enum { NEAR = 256, SUMS = REGISTERS == 32 ? 2 : 1 }; /* pairs of x widened at once; independent sums per row */

#define FEW static inline __attribute__((always_inline)) void

/* u[i][16] = s_i A x_i for n rows and sixteen ranks; A as (in / 2, 16, 2): pairs of inputs, sixteen
   ranks adjacent. */
FEW first(const int n, const bf16 *A, i64 pairs_in, const bf16 **x, const float *strengths, factor *u, i64 ldu) {
    v16 c[4][2];
    factor room[4][NEAR];
    const factor *xs[4];
    for (int i = 0; i < n; i++) c[i][0] = c[i][1] = set16(0.0f);
    for (i64 from = 0, to; from < pairs_in; from = to) {
        to = BF16_PRODUCTS || pairs_in - from <= NEAR ? pairs_in : from + NEAR;
        for (int i = 0; i < n; i++) xs[i] = factors_of(x[i] + 2 * from, to - from, room[i]) - from;
        i64 j = from;
        for (; j + SUMS <= to; j += SUMS)
            for (int k = 0; k < SUMS; k++) {
                columns16 a = columns_of(load_w16(A + (j + k) * 32));
                for (int i = 0; i < n; i++) c[i][k] = dot16(c[i][k], xs[i][j + k], a);
            }
        for (; j < to; j++)
            for (int i = 0; i < n; i++) c[i][0] = dot16(c[i][0], xs[i][j], columns_of(load_w16(A + j * 32)));
    }
    for (int i = 0; i < n; i++) store_factors(u + i * ldu, mul16(add16(c[i][0], c[i][1]), set16(strengths[i])));
}

/* y_i[from … to] += B u_i for n rows; B as (rank / 2, columns, 2). */
FEW second(const int n, const bf16 *B, i64 columns, i64 rank, const factor **u, bf16 **y, i64 from, i64 to) {
    for (i64 c = from; c < to; c += 16) {
        v16 sum[4];
        for (int i = 0; i < n; i++) sum[i] = load_some_bf16(y[i] + c, to - c);
        for (i64 k = 0; k < rank / 2; k++) {
            columns16 b = columns_of(load_some_w16(B + (k * columns + c) * 2, to - c));
            for (int i = 0; i < n; i++) sum[i] = dot16(sum[i], u[i][k], b);
        }
        for (int i = 0; i < n; i++) store_some_bf16(y[i] + c, sum[i], to - c);
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
   u: memory for starts[nseg] rows of ldu / 2 factors; `in`, ldu and the parts' ranks are even, a total rank
   is a multiple of 16. */
void thin_rows_inside(const bf16 *x, i64 in, bf16 *y, i64 ldy, const i64 *table, i64 nseg, const i64 *starts,
                      const i64 *rows, const float *strengths, factor *u, i64 ldu, meeting *m) {
    int me = omp_get_thread_num(), all = omp_get_num_threads();
    i64 turn = 0, half = ldu / 2;
    for (i64 s = 0; s < nseg; s++) {
        const i64 *rec = table + s * RECORD;
        if (!rec[0]) continue;
        for (i64 k = 0; k < rec[1]; k += 16)
            for (i64 i0 = starts[s]; i0 < starts[s + 1]; i0 += 4) {
                if (turn++ % all != me) continue;
                i64 few = starts[s + 1] - i0 < 4 ? starts[s + 1] - i0 : 4;
                const bf16 *xs[4];
                for (i64 i = 0; i < few; i++) xs[i] = x + rows[i0 + i] * in;
                BY_FEW(first, few, (const bf16 *)rec[0] + k * in, in / 2, xs, strengths + i0, u + i0 * half + k / 2, half)
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
                const factor *us[4];
                bf16 *ys[4];
                for (i64 i = 0; i < few; i++) {
                    us[i] = u + (i0 + i) * half + part[3] / 2;
                    ys[i] = y + rows[i0 + i] * ldy + part[1];
                }
                BY_FEW(second, few, (const bf16 *)part[0], columns, part[4], us, ys, from, to)
            }
        }
    }
}

void lora_rows(const bf16 *x, i64 in, bf16 *y, i64 ldy, const i64 *table, i64 nseg, const i64 *starts, const i64 *rows,
               const float *strengths, factor *u, i64 ldu, int threads) {
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

#define SCORES(N)                                                                                                     \
    static void scores##N(const factor *q, i64 d2, const uint32_t *k, float *s, i64 lds) {                            \
        v16 c[N];                                                                                                     \
        for (int r = 0; r < N; r++) c[r] = set16(0.0f);                                                               \
        for (i64 j = 0; j < d2; j++) {                                                                                \
            columns16 b = columns_of(load_w16(k + j * BLOCK));                                                        \
            for (int r = 0; r < N; r++) c[r] = dot16(c[r], q[r * d2 + j], b);                                         \
        }                                                                                                             \
        for (int r = 0; r < N; r++) store16(s + r * lds, c[r]);                                                       \
    }                                                                                                                 \
    static void values##N(const factor *p, i64 ldp, const i64 *blocks, i64 first, i64 last, i64 kv, i64 h, i64 d,     \
                          const bf16 *V, i64 at, float *out) {                                                        \
        v16 c[N];                                                                                                     \
        for (int r = 0; r < N; r++) c[r] = set16(0.0f);                                                               \
        for (i64 b = first; b < last; b++) {                                                                          \
            const uint32_t *v = (const uint32_t *)(V + (blocks[b] * kv + h) * BLOCK * d) + at;                        \
            for (i64 j = 0; j < BLOCK / 2; j++) {                                                                     \
                columns16 w = columns_of(load_w16(v + j * d));                                                        \
                for (int r = 0; r < N; r++) c[r] = dot16(c[r], p[r * ldp + b * (BLOCK / 2) + j], w);                  \
            }                                                                                                         \
        }                                                                                                             \
        for (int r = 0; r < N; r++) store16(out + r * d + at, c[r]);                                                  \
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
        factor *qs = aligned_room(TILE * d2 * (i64)sizeof *qs), *pr = aligned_room(TILE * room / 2 * (i64)sizeof *pr);
        float *sc = aligned_room(TILE * room * 4), *o = aligned_room(TILE * d * 4);
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
                const bf16 *query = q + t * ldq + (h * group + row % group) * d;
                memcpy(qs + r * d2, factors_of(query, d2, qs + r * d2), (size_t)d2 * sizeof *qs);
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
                v16 top = set16(-__builtin_inff());
                for (i64 b = b0; b < b1; b++) {
                    v16 v = mul16(load16(x + b * BLOCK), set16(scale));
                    if (cap > 0) { /* tanh(a) = (1 - e^-2a) / (1 + e^-2a), a >= 0 */
                        v16 e = exp16(mul16(abs16(v), set16(-2.0f / cap))), one = set16(1.0f);
                        v = with_sign_of(mul16(set16(cap), div16(sub16(one, e), add16(one, e))), v);
                    }
                    v = only16(v, (int)(from - b * BLOCK), (int)(to - b * BLOCK), -__builtin_inff());
                    top = max16(top, v);
                    store16(x + b * BLOCK, v);
                }
                v16 shift = set16(max_of(top)), sum = set16(0.0f);
                for (i64 b = b0; b < b1; b++) {
                    v16 e = exp16(sub16(load16(x + b * BLOCK), shift));
                    sum = add16(sum, e);
                    store_factors(pr + (r * room + b * BLOCK) / 2, e);
                }
                scales[r] = 1.0f / sum_of(sum);
            }
            for (i64 at = 0; at < d; at += 16)
                BY_ROWS(values, n, pr, room / 2, blocks, b0, b1, kv, h, d, V, at, o);
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
