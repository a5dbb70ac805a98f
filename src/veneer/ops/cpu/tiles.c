/* Causal attention of packed rows, with gradients, in tiles: neither scores nor probabilities are ever
   in memory, only log sum exp, from which they are recomputed (arXiv 2205.14135, 2307.08691). The
   products are libtorch's small ones (at::native::cpublas::brgemm: oneDNN's kernels for AMX, AVX-512,
   AVX2 …), so this file names no instructions; ops/cpu/compiled.py finds the products and passes them
   in.

   Tokens are (N, heads, dim) with flat heads; row r has the tokens starts[r] ... starts[r + 1] - 1. The
   queries of one key head, `per` per token, are processed together: column c of a tile is query head c %
   per of token c / per. Everything is transposed, S^T = K Q^T (keys, columns): then maxima, sums and masks
   run along vectors, and in

       S^T = K Q^T     dP^T = V G^T     O^T += V^T P^T     dV += P^T G     dK += dS^T Q     dQ^T += K^T dS^T

   no product needs a transposed tile. A left factor is row-major; so is a right factor in float32, and in
   bf16 pairs of its rows are interleaved (`vnni`), so both consist of 32-bit cells.

   `half`: tokens are bf16, else float32. `narrow`: factors are bf16, else float32. Sums are float32. The
   assignment of threads changes no result: one thread computes each block of queries and each sum of a key
   head, in a fixed order. */

#include "bf16.h"
#include <omp.h>

typedef void (*wide_product)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, _Bool, const float *, const float *, float *,
                             _Bool);
typedef void (*narrow_product)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, _Bool, const bf16 *, const bf16 *, float *,
                               _Bool);
static wide_product of_floats;
static narrow_product of_halves;
static void (*release)(_Bool);

/* Set the addresses of the products. A missing product is NULL, and is never called. */
void use_products(void *floats, void *halves, void *done) {
    of_floats = (wide_product)floats, of_halves = (narrow_product)halves, release = (void (*)(_Bool))done;
}

enum { KEYS = 64, STEP = 16 };
#define NONE (-1e30f) /* below every score, and finite: the exponential of a difference of two is not NaN */

/* The parameters of a call. `chunks[r]`: number of blocks of KEYS keys in rows before r; `blocks[r]`:
   blocks of queries. */
typedef struct {
    const int64_t *starts, *chunks, *blocks;
    int64_t rows, kv, per, dim, D, window, most;
    float scale;
    int half, narrow;
} task;

static inline int64_t up_to(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
static inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t bytes_of(const task *t) { return t->narrow ? 2 : 4; }

/* Tokens in a block of queries: about 192 columns. */
static int64_t block_of(int64_t per) { return STEP * lesser(8, greater(2, (12 + per / 2) / per)); }

/* c (m, n) (+)= a (m, k) b (k, n) */
static void multiply(const task *t, int64_t m, int64_t n, int64_t k, const void *a, const void *b, float *c, int add) {
    if (t->narrow) of_halves(m, n, k, k, n, n, add, a, b, c, 1);
    else of_floats(m, n, k, k, n, n, add, a, b, c, 0);
}

static void end_thread(const task *t) {
    if (t->narrow && release) release(1);
}

static inline void widened(const task *t, const void *x, int64_t at, int64_t n, float *y) {
    if (t->half)
        for (int64_t j = 0; j < n; j++) y[j] = up(((const bf16 *)x)[at + j]);
    else memcpy(y, (const float *)x + at, n * sizeof *y);
}

/* dim values of one head, widened, rotated by the angles of cs and sn (NULL: not rotated) and
   multiplied by `by` */
static void head_of(const task *t, const void *x, int64_t at, const void *cs, const void *sn, int64_t angle, float by, float *y) {
    int64_t dim = t->dim, half = dim / 2;
    float a[dim], c[half + 1], s[half + 1];
    widened(t, x, at, dim, a);
    if (!cs) {
        for (int64_t j = 0; j < dim; j++) y[j] = a[j] * by;
        return;
    }
    widened(t, cs, angle * half, half, c);
    widened(t, sn, angle * half, half, s);
    for (int64_t j = 0; j < half; j++) {
        y[j] = (a[j] * c[j] - a[half + j] * s[j]) * by;
        y[half + j] = (a[half + j] * c[j] + a[j] * s[j]) * by;
    }
}

/* The transpose: rotated back, multiplied, and rounded to the token's dtype. */
static void head_to(const task *t, const float *x, const void *cs, const void *sn, int64_t angle, float by, void *y, int64_t at) {
    int64_t dim = t->dim, half = dim / 2;
    float a[dim], c[half + 1], s[half + 1];
    if (cs) {
        widened(t, cs, angle * half, half, c);
        widened(t, sn, angle * half, half, s);
        for (int64_t j = 0; j < half; j++) {
            a[j] = (x[j] * c[j] + x[half + j] * s[j]) * by;
            a[half + j] = (x[half + j] * c[j] - x[j] * s[j]) * by;
        }
    } else
        for (int64_t j = 0; j < dim; j++) a[j] = x[j] * by;
    if (t->half)
        for (int64_t j = 0; j < dim; j++) ((bf16 *)y)[at + j] = down(a[j]);
    else memcpy((float *)y + at, a, dim * sizeof *a);
}

/* e^x for x <= 0 within 1e-7, and 0 below -87; NaN stays. x = n ln 2 + r by Cody and Waite, then 1 + r
   + r^2 p(r), p the polynomial of degree 4 with the least maximum relative error of e^r on -ln 2 / 2
   ... ln 2 / 2. */
static inline float exponential(float x) {
    float clamped = x < -87.0f ? -87.0f : x, n = __builtin_rintf(clamped * 1.44269504088896341f);
    float r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.381459853e-3f;
    p = p * r + 8.368716882e-3f;
    p = p * r + 4.166838805e-2f;
    p = p * r + 1.666652063e-1f;
    p = p * r + 4.999999345e-1f;
    p = p * r * r + r + 1.0f;
    uint32_t bits;
    memcpy(&bits, &p, 4);
    bits += (uint32_t)(int32_t)n << 23;
    memcpy(&p, &bits, 4);
    return x < -87.0f ? 0.0f : p;
}

/* -- factors ----------------------------------------------------------------------------------------------------------- */

static inline uint32_t pair_of(float a, float b) {
    uint32_t u, v;
    memcpy(&u, &a, 4), memcpy(&v, &b, 4);
    u += 0x7fffu + ((u >> 16) & 1u), v += 0x7fffu + ((v >> 16) & 1u);
    return u >> 16 | (v & 0xffff0000u);
}

/* Row `r` of a left factor of `ld` columns. */
static inline void put_left(const task *t, const float *x, int64_t n, void *a, int64_t r, int64_t ld) {
    if (!t->narrow) memcpy((float *)a + r * ld, x, n * sizeof *x);
    else
        for (int64_t j = 0; j < n; j++) ((bf16 *)a)[r * ld + j] = down(x[j]);
}

/* Two rows of a narrow right factor. */
static inline void put_pair(const float *x, const float *y, int64_t n, uint32_t *pairs) {
#pragma omp simd
    for (int64_t j = 0; j < n; j++) pairs[j] = pair_of(x[j], y[j]);
}

/* STEP rows of x (STEP, D) as rows c ... of a right factor with D columns. */
static void put_right(const task *t, const float *x, void *b, int64_t c) {
    if (!t->narrow) memcpy((float *)b + c * t->D, x, STEP * t->D * sizeof *x);
    else
        for (int64_t i = 0; i < STEP; i += 2) put_pair(x + i * t->D, x + (i + 1) * t->D, t->D, (uint32_t *)b + (c + i) / 2 * t->D);
}

/* The same rows as columns c ... of a right factor (D, ld). */
static void put_right_columns(const task *t, const float *x, void *b, int64_t c, int64_t ld) {
    int64_t D = t->D;
    if (t->narrow)
        for (int64_t j = 0; j < D; j += 2)
            for (int i = 0; i < STEP; i++) ((uint32_t *)b)[j / 2 * ld + c + i] = pair_of(x[i * D + j], x[i * D + j + 1]);
    else
        for (int64_t j = 0; j < D; j++)
            for (int i = 0; i < STEP; i++) ((float *)b)[j * ld + c + i] = x[i * D + j];
}

/* The same rows as columns c ... of a left factor (D, ld); c is even. */
static void put_left_columns(const task *t, const float *x, void *a, int64_t c, int64_t ld) {
    int64_t D = t->D;
    for (int64_t j = 0; j < D; j++)
        if (t->narrow)
            for (int i = 0; i < STEP; i += 2) {
                uint32_t both = pair_of(x[i * D + j], x[(i + 1) * D + j]);
                memcpy((bf16 *)a + j * ld + c + i, &both, 4);
            }
        else
            for (int i = 0; i < STEP; i++) ((float *)a)[j * ld + c + i] = x[i * D + j];
}

/* -- where things are -------------------------------------------------------------------------------------------------- */

/* chunks (rows + 1) and blocks (rows + 1), counted from the first row. */
static void count(const int64_t *starts, int64_t rows, int64_t block, int64_t *chunks, int64_t *blocks) {
    chunks[0] = blocks[0] = 0;
    for (int64_t r = 0; r < rows; r++) {
        int64_t n = starts[r + 1] - starts[r];
        chunks[r + 1] = chunks[r] + (n + KEYS - 1) / KEYS;
        blocks[r + 1] = blocks[r] + (n + block - 1) / block;
    }
}

static int64_t row_of(const int64_t *sums, int64_t at) {
    int64_t r = 0;
    while (sums[r + 1] <= at) r++;
    return r;
}

/* Keys of a chunk, starting at `key`, of row r and its key head h: rows of a left factor (KEYS, D), or
   its columns (D, KEYS); zero past the row's end and past dim. */
static void pack_keys(const task *t, const void *x, int64_t ld, int64_t first_head, int64_t r, int64_t h, int64_t key,
                      const void *cs, const void *sn, void *rows, void *columns) {
    int64_t first = t->starts[r] + key, real = lesser(KEYS, t->starts[r + 1] - first), D = t->D;
    float y[STEP * D];
    for (int64_t at = 0; at < KEYS; at += STEP) {
        memset(y, 0, sizeof y);
        for (int64_t j = at; j < lesser(at + STEP, real); j++)
            head_of(t, x, (first + j) * ld + (first_head + h) * t->dim, cs, sn, first + j, 1.0f, y + (j - at) * D);
        for (int64_t j = 0; rows && j < STEP; j++) put_left(t, y + j * D, D, rows, at + j, D);
        if (columns) put_left_columns(t, y, columns, at, KEYS);
    }
}

/* Columns of one block of queries: tokens `from` ... of row r, all query heads of key head h. As a
   right factor summed over dim, (D, M), and one summed over columns, (M, D); zero past the row's end. */
static void pack_queries(const task *t, const void *x, int64_t ld, int64_t r, int64_t h, int64_t from, int64_t M, const void *cs,
                         const void *sn, float by, void *over_dim, void *over_columns) {
    int64_t first = t->starts[r] + from, real = lesser(M / t->per, t->starts[r + 1] - first) * t->per, D = t->D;
    float y[STEP * D];
    for (int64_t at = 0; at < M; at += STEP) {
        memset(y, 0, sizeof y);
        for (int64_t c = at; c < lesser(at + STEP, real); c++) {
            int64_t token = first + c / t->per, head = h * t->per + c % t->per;
            head_of(t, x, token * ld + head * t->dim, cs, sn, token, by, y + (c - at) * D);
        }
        put_right_columns(t, y, over_dim, at, M);
        if (over_columns) put_right(t, y, over_columns, at);
    }
}

/* Columns that see key `key` of the row, for a block that starts at token `from`: [low, high). */
static inline void seen(const task *t, int64_t key, int64_t from, int64_t M, int64_t *low, int64_t *high) {
    *low = lesser(M, greater(0, (key - from) * t->per));
    *high = t->window > 0 ? lesser(M, greater(0, (key + t->window - from) * t->per)) : M;
    if (*high < *low) *high = *low;
}

static inline int64_t first_key(const task *t, int64_t from) {
    return t->window > 0 ? greater(0, from - t->window + 1) / KEYS * KEYS : 0;
}

/* STEP columns of x (D, ld) as rows. */
static void columns_of(const float *x, int64_t D, int64_t ld, float *y) {
    for (int64_t d = 0; d < D; d++)
        for (int i = 0; i < STEP; i++) y[i * D + d] = x[d * ld + i];
}

/* -- forward ----------------------------------------------------------------------------------------------------------- */

/* One block of queries: out (token, heads, dim) and lse (token, heads). keys, values: of its row and
   key head, in chunks. */
static void attend_block(const task *t, const char *keys, const char *values, const void *queries, int64_t r, int64_t h,
                         int64_t from, int64_t M, float *s, void *p, float *o, float *line, void *out, float *lse) {
    int64_t D = t->D, size = KEYS * D * bytes_of(t), first = t->starts[r] + from;
    int64_t real = lesser(M / t->per, t->starts[r + 1] - first), end = from + real, heads = t->kv * t->per;
    float *top = line, *sum = line + M, *less = line + 2 * M;
    for (int64_t c = 0; c < M; c++) top[c] = NONE, sum[c] = 0.0f;
    memset(o, 0, D * M * 4);
    for (int64_t key = first_key(t, from); key < end; key += KEYS) {
        multiply(t, KEYS, M, D, keys + key / KEYS * size, queries, s, 0);
        memcpy(less, top, M * sizeof *top);
        for (int64_t j = 0; j < KEYS; j++) {
            int64_t low, high;
            seen(t, key + j, from, M, &low, &high);
            const float *x = s + j * M;
#pragma omp simd
            for (int64_t c = low; c < high; c++) top[c] = x[c] > top[c] || x[c] != x[c] ? x[c] : top[c];
        }
#pragma omp simd
        for (int64_t c = 0; c < M; c++) {
            less[c] = exponential(less[c] - top[c]);
            sum[c] *= less[c];
        }
        for (int64_t j = 0; j < KEYS; j++) {
            int64_t low, high;
            seen(t, key + j, from, M, &low, &high);
            float *x = s + j * M;
            for (int64_t c = 0; c < low; c++) x[c] = 0.0f;
#pragma omp simd
            for (int64_t c = low; c < high; c++) {
                x[c] = exponential(x[c] - top[c]);
                sum[c] += x[c];
            }
            for (int64_t c = high; c < M; c++) x[c] = 0.0f;
            if (t->narrow && j % 2) put_pair(x - M, x, M, (uint32_t *)p + j / 2 * M);
        }
        for (int64_t d = 0; d < D; d++)
#pragma omp simd
            for (int64_t c = 0; c < M; c++) o[d * M + c] *= less[c];
        multiply(t, D, M, KEYS, values + key / KEYS * size, t->narrow ? p : s, o, 1);
    }
    float y[STEP * D];
    for (int64_t from_c = 0; from_c < real * t->per; from_c += STEP) {
        columns_of(o + from_c, D, M, y);
        for (int64_t c = from_c; c < lesser(from_c + STEP, real * t->per); c++) {
            int64_t at = (first + c / t->per) * heads + h * t->per + c % t->per;
            head_to(t, y + (c - from_c) * D, NULL, NULL, 0, 1.0f / sum[c], out, at * t->dim);
            lse[at] = top[c] + __builtin_logf(sum[c]);
        }
    }
}

/* qkv (N, kv * per + 2 kv, dim) with `ld` between tokens; cs, sn (N, dim / 2) rotate q and k, NULL does
   not. out (N, heads, dim), lse (N, heads) float32. A query sees itself and the window - 1 tokens
   before it; window <= 0: all tokens before it. */
static int forward(const void *qkv, int64_t ld, const void *cs, const void *sn, const int64_t *starts, int64_t rows, int64_t kv,
                int64_t per, int64_t dim, float scale, int64_t window, int half, int narrow, void *out, float *lse, int threads) {
    int64_t block = block_of(per), D = up_to(dim, STEP);
    int64_t *sums = aligned_room(2 * (rows + 1) * 8), *chunks = sums, *blocks = sums ? sums + rows + 1 : NULL;
    int failed = DONE;
    if (!all_there(sums != NULL, &failed)) return failed;
    count(starts, rows, block, chunks, blocks);
    task t = {starts, chunks, blocks, rows, kv, per, dim, D, window, block * per, scale, half, narrow};
    int64_t size = KEYS * D * bytes_of(&t), pieces = chunks[rows] * kv, heads = kv * per;
    char *keys = aligned_room(pieces * size), *values = aligned_room(pieces * size);
    if (!all_there(keys && values, &failed)) return free(sums), free(keys), free(values), failed;
#pragma omp parallel num_threads(threads)
    {
        float *s = aligned_room(KEYS * t.most * 4), *o = aligned_room(D * t.most * 4), *line = aligned_room(3 * t.most * 4);
        void *q = aligned_room(D * t.most * 4), *p = aligned_room(KEYS * t.most * 2);
        int there = all_there(s && o && line && q && p, &failed);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < pieces; i++) {
            if (!there) continue;
            int64_t r = row_of(chunks, i / kv), n = chunks[r + 1] - chunks[r], own = i - chunks[r] * kv, h = own / n;
            pack_keys(&t, qkv, ld, heads, r, h, own % n * KEYS, cs, sn, keys + i * size, NULL);
            pack_keys(&t, qkv, ld, heads + kv, r, h, own % n * KEYS, NULL, NULL, NULL, values + i * size);
        }
#pragma omp for schedule(dynamic, 1)
        /* last blocks of a row first: they see the most keys */
        for (int64_t i = blocks[rows] * kv - 1; i >= 0; i--) {
            if (!there) continue;
            int64_t r = row_of(blocks, i / kv), own = i - blocks[r] * kv, h = own % kv, from = own / kv * block;
            int64_t M = per * up_to(lesser(block, starts[r + 1] - starts[r] - from), STEP);
            int64_t at = (chunks[r] * kv + h * (chunks[r + 1] - chunks[r])) * size;
            pack_queries(&t, qkv, ld, r, h, from, M, cs, sn, scale, q, NULL);
            attend_block(&t, keys + at, values + at, q, r, h, from, M, s, p, o, line, out, lse);
        }
        end_thread(&t);
        free(s), free(o), free(line), free(q), free(p);
    }
    free(sums), free(keys), free(values);
    return failed;
}

/* -- backward ---------------------------------------------------------------------------------------------------------- */

/* A thread's buffers in backward: factors of a block of queries, and tiles of a chunk. */
typedef struct {
    void *q, *q_along, *g, *g_along, *p, *ds, *pairs;
    float *s, *dp, *dq, *line;
} bench;

static int make_bench(const task *t, bench *b) {
    int64_t M = t->most, D = t->D, e = bytes_of(t);
    void **factors[] = {&b->q, &b->q_along, &b->g, &b->g_along};
    int there = 1;
    for (int i = 0; i < 4; i++) there &= (*factors[i] = aligned_room(D * M * e)) != NULL;
    b->p = aligned_room(KEYS * M * 2), b->ds = aligned_room(KEYS * M * 2), b->pairs = aligned_room(KEYS * M * 2);
    b->s = aligned_room(KEYS * M * 4), b->dp = aligned_room(KEYS * M * 4), b->dq = aligned_room(D * M * 4);
    b->line = aligned_room(2 * M * 4);
    return there && b->p && b->ds && b->pairs && b->s && b->dp && b->dq && b->line;
}

static void free_bench(bench *b) {
    free(b->q), free(b->q_along), free(b->g), free(b->g_along), free(b->p), free(b->ds), free(b->pairs);
    free(b->s), free(b->dp), free(b->dq), free(b->line);
}

/* One block of queries: writes its dq to dqkv, and adds to dk and dv (keys, D) of its row and key head.
   `turned`: its keys as columns of left factors. */
static void backward_block(const task *t, bench *b, const char *keys, const char *turned, const char *values, int64_t r, int64_t h,
                           int64_t from, int64_t M, float *dk, float *dv, const void *cs, const void *sn, void *dqkv) {
    int64_t D = t->D, size = KEYS * D * bytes_of(t), first = t->starts[r] + from, heads = t->kv * t->per;
    int64_t real = lesser(M / t->per, t->starts[r + 1] - first), end = from + real;
    const float *lse = b->line, *dot = b->line + M;
    memset(b->dq, 0, D * M * 4);
    for (int64_t key = first_key(t, from); key < end; key += KEYS) {
        multiply(t, KEYS, M, D, keys + key / KEYS * size, b->q, b->s, 0);
        multiply(t, KEYS, M, D, values + key / KEYS * size, b->g, b->dp, 0);
        for (int64_t j = 0; j < KEYS; j++) {
            int64_t low, high;
            seen(t, key + j, from, M, &low, &high);
            float *p = b->s + j * M, *ds = b->dp + j * M;
            for (int64_t c = 0; c < low; c++) p[c] = ds[c] = 0.0f;
#pragma omp simd
            for (int64_t c = low; c < high; c++) {
                p[c] = exponential(p[c] - lse[c]);
                ds[c] = p[c] * (ds[c] - dot[c]);
            }
            for (int64_t c = high; c < M; c++) p[c] = ds[c] = 0.0f;
            if (!t->narrow) continue;
            put_left(t, p, M, b->p, j, M);
            put_left(t, ds, M, b->ds, j, M);
            if (j % 2) put_pair(ds - M, ds, M, (uint32_t *)b->pairs + j / 2 * M);
        }
        multiply(t, KEYS, D, M, t->narrow ? b->p : b->s, b->g_along, dv + key * D, 1);
        multiply(t, KEYS, D, M, t->narrow ? b->ds : b->dp, b->q_along, dk + key * D, 1);
        multiply(t, D, M, KEYS, turned + key / KEYS * size, t->narrow ? b->pairs : b->dp, b->dq, 1);
    }
    float y[STEP * D];
    for (int64_t from_c = 0; from_c < real * t->per; from_c += STEP) {
        columns_of(b->dq + from_c, D, M, y);
        for (int64_t c = from_c; c < lesser(from_c + STEP, real * t->per); c++) {
            int64_t token = first + c / t->per, at = token * (heads + 2 * t->kv) + h * t->per + c % t->per;
            head_to(t, y + (c - from_c) * D, cs, sn, token, t->scale, dqkv, at * t->dim);
        }
    }
}

/* Number of groups that a row's queries are divided into if there are few rows and key heads: each
   group has its own sums of dk and dv. */
static int64_t groups_of(const task *t) {
    int64_t longest = 0;
    for (int64_t r = 0; r < t->rows; r++) longest = greater(longest, t->starts[r + 1] - t->starts[r]);
    return t->rows * t->kv >= 12 ? 1 : lesser(4, greater(1, longest / 512));
}

/* g: the gradient of rope_varlen_attention's output, out: this output, both (N, heads, dim). dqkv (N,
   heads + 2 kv, dim). */
static int backward(const void *g, const void *out, const float *lse, const void *qkv, int64_t ld, const void *cs,
                         const void *sn, const int64_t *starts, int64_t rows, int64_t kv, int64_t per, int64_t dim, float scale,
                         int64_t window, int half, int narrow, void *dqkv, int threads) {
    int64_t block = block_of(per), D = up_to(dim, STEP), heads = kv * per;
    int64_t *sums = aligned_room(2 * (rows + 1) * 8), *chunks = sums, *blocks = sums ? sums + rows + 1 : NULL;
    int failed = DONE;
    if (!all_there(sums != NULL, &failed)) return failed;
    count(starts, rows, block, chunks, blocks);
    task t = {starts, chunks, blocks, rows, kv, per, dim, D, window, block * per, scale, half, narrow};
    int64_t size = KEYS * D * bytes_of(&t), pieces = chunks[rows] * kv, groups = groups_of(&t), cells = pieces * KEYS * D;
    char *keys = aligned_room(pieces * size), *turned = aligned_room(pieces * size), *values = aligned_room(pieces * size);
    float *dk = aligned_room(groups * cells * 4), *dv = aligned_room(groups * cells * 4);
    if (!all_there(keys && turned && values && dk && dv, &failed))
        return free(sums), free(keys), free(turned), free(values), free(dk), free(dv), failed;
#pragma omp parallel num_threads(threads)
    {
        bench b;
        int there = all_there(make_bench(&t, &b), &failed);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < pieces; i++) {
            if (!there) continue;
            int64_t r = row_of(chunks, i / kv), n = chunks[r + 1] - chunks[r], own = i - chunks[r] * kv, h = own / n;
            pack_keys(&t, qkv, ld, heads, r, h, own % n * KEYS, cs, sn, keys + i * size, turned + i * size);
            pack_keys(&t, qkv, ld, heads + kv, r, h, own % n * KEYS, NULL, NULL, values + i * size, NULL);
            for (int64_t k = 0; k < groups; k++) {
                memset(dk + k * cells + i * KEYS * D, 0, KEYS * D * 4);
                memset(dv + k * cells + i * KEYS * D, 0, KEYS * D * 4);
            }
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = rows * kv * groups - 1; i >= 0; i--) {
            if (!there) continue;
            int64_t k = i / (rows * kv), r = i / kv % rows, h = i % kv, n = blocks[r + 1] - blocks[r];
            int64_t at = chunks[r] * kv + h * (chunks[r + 1] - chunks[r]);
            /* every groups-th block, so that all groups have the same amount of work */
            for (int64_t one = k; one < n; one += groups) {
                int64_t from = one * block, M = per * up_to(lesser(block, starts[r + 1] - starts[r] - from), STEP);
                int64_t real = lesser(M / per, starts[r + 1] - starts[r] - from) * per;
                pack_queries(&t, qkv, ld, r, h, from, M, cs, sn, scale, b.q, b.q_along);
                pack_queries(&t, g, heads * dim, r, h, from, M, NULL, NULL, 1.0f, b.g, b.g_along);
                for (int64_t c = 0; c < M; c++) {
                    float sum = 0.0f, a[dim], e[dim];
                    int64_t place = (starts[r] + from + c / per) * heads + h * per + c % per;
                    b.line[c] = 0.0f, b.line[M + c] = 0.0f;
                    if (c >= real) continue;
                    head_of(&t, g, place * dim, NULL, NULL, 0, 1.0f, a);
                    head_of(&t, out, place * dim, NULL, NULL, 0, 1.0f, e);
#pragma omp simd reduction(+ : sum)
                    for (int64_t j = 0; j < dim; j++) sum += a[j] * e[j];
                    b.line[c] = lse[place], b.line[M + c] = sum;
                }
                backward_block(&t, &b, keys + at * size, turned + at * size, values + at * size, r, h, from, M,
                               dk + k * cells + at * KEYS * D, dv + k * cells + at * KEYS * D, cs, sn, dqkv);
            }
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < pieces; i++) {
            if (!there) continue;
            int64_t r = row_of(chunks, i / kv), n = chunks[r + 1] - chunks[r], own = i - chunks[r] * kv, h = own / n;
            int64_t first = starts[r] + own % n * KEYS, real = lesser(KEYS, starts[r + 1] - first);
            for (int64_t k = 1; k < groups; k++)
                for (int64_t j = 0; j < KEYS * D; j++) {
                    dk[i * KEYS * D + j] += dk[k * cells + i * KEYS * D + j];
                    dv[i * KEYS * D + j] += dv[k * cells + i * KEYS * D + j];
                }
            for (int64_t j = 0; j < real; j++) {
                int64_t token = (first + j) * (heads + 2 * kv), from = (i * KEYS + j) * D;
                head_to(&t, dk + from, cs, sn, first + j, 1.0f, dqkv, (token + heads + h) * dim);
                head_to(&t, dv + from, NULL, NULL, 0, 1.0f, dqkv, (token + heads + kv + h) * dim);
            }
        }
        end_thread(&t);
        free_bench(&b);
    }
    free(sums), free(keys), free(turned), free(values), free(dk), free(dv);
    return failed;
}

/* Each with float32 factors, and with bf16 factors. */
#define FORWARD(name, narrow)                                                                                                  \
    int name(const void *qkv, int64_t ld, const void *cs, const void *sn, const int64_t *starts, int64_t rows, int64_t kv,     \
             int64_t per, int64_t dim, float scale, int64_t window, int half, void *out, float *lse, int threads) {            \
        return forward(qkv, ld, cs, sn, starts, rows, kv, per, dim, scale, window, half, narrow, out, lse, threads);           \
    }
FORWARD(rope_varlen_attention, 0)
FORWARD(narrow_rope_varlen_attention, 1)

#define BACKWARD(name, narrow)                                                                                                 \
    int name(const void *g, const void *out, const float *lse, const void *qkv, int64_t ld, const void *cs, const void *sn,    \
             const int64_t *starts, int64_t rows, int64_t kv, int64_t per, int64_t dim, float scale, int64_t window, int half, \
             void *dqkv, int threads) {                                                                                        \
        return backward(g, out, lse, qkv, ld, cs, sn, starts, rows, kv, per, dim, scale, window, half, narrow, dqkv, threads); \
    }
BACKWARD(rope_varlen_attention_backward, 0)
BACKWARD(narrow_rope_varlen_attention_backward, 1)

/* -- products in float32 of matrices in bf16 or float32 ------------------------------------------------------------------ */

enum { BLOCK = 128, PANEL = 64, SHALLOW = 1024, DEEP = 4096, ROOM = 1 << 20 };

/* A matrix with any strides, in elements: `down` between rows, `along` between columns. bf16 if `half`, else float32. */
typedef struct {
    const void *x;
    int64_t down, along;
    int half;
} matrix;

static inline float value_of(const matrix *a, int64_t r, int64_t c) {
    int64_t at = r * a->down + c * a->along;
    return a->half ? up(((const bf16 *)a->x)[at]) : ((const float *)a->x)[at];
}

#if defined(__AVX512F__)
/* Transpose 16 x 16 cells of 32 bits, by four perfect shuffles of the 256 cells. */
static inline void transpose16(__m512i *x) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    for (int turn = 0; turn < 4; turn++) {
        __m512i y[16];
        for (int i = 0; i < 8; i++) {
            y[2 * i] = _mm512_permutex2var_epi32(x[i], low, x[i + 8]);
            y[2 * i + 1] = _mm512_permutex2var_epi32(x[i], high, x[i + 8]);
        }
        memcpy(x, y, sizeof y);
    }
}

/* Widen 32 rows and 16 columns of a bf16 matrix whose columns are contiguous. */
static inline void turned(const bf16 *x, int64_t along, float *out, int64_t ld) {
    __m512i pairs[16];
    for (int c = 0; c < 16; c++) pairs[c] = _mm512_loadu_si512(x + c * along);
    transpose16(pairs);
    for (int r = 0; r < 16; r++) {
        _mm512_storeu_ps(out + 2 * r * ld, even_of(pairs[r]));
        _mm512_storeu_ps(out + (2 * r + 1) * ld, odd_of(pairs[r]));
    }
}
#endif

/* Widen rows x columns of a, from (r, c), to `out`, whose rows are ld apart. Rows from `rows` to `padded`, and columns
   from `columns` to `wide`, are set to zero. */
static void widen_block(const matrix *a, int64_t r, int64_t c, int64_t rows, int64_t padded, int64_t columns, int64_t wide,
                        float *out, int64_t ld) {
    int64_t first = 0;
#if defined(__AVX512F__)
    if (a->half && a->down == 1 && columns % 16 == 0)
        for (; first + 32 <= rows; first += 32)
            for (int64_t j = 0; j < columns; j += 16)
                turned((const bf16 *)a->x + r + first + (c + j) * a->along, a->along, out + first * ld + j, ld);
#endif
    for (int64_t i = first; i < rows; i++) {
        float *to = out + i * ld;
        const bf16 *from = (const bf16 *)a->x + (r + i) * a->down + c;
        if (a->half && a->along == 1)
            for (int64_t j = 0; j < columns; j++) to[j] = up(from[j]);
        else
            for (int64_t j = 0; j < columns; j++) to[j] = value_of(a, r + i, c + j);
        memset(to + columns, 0, (wide - columns) * sizeof *to);
    }
    for (int64_t i = 0; i < first; i++) memset(out + i * ld + columns, 0, (wide - columns) * sizeof *out);
    for (int64_t i = rows; i < padded; i++) memset(out + i * ld, 0, wide * sizeof *out);
}

static inline int all_zero(const float *x, int64_t n) {
    for (int64_t j = 0; j < n; j++)
        if (x[j] != 0.0f) return 0;
    return 1;
}

/* c (m, n) (+)= a (m, k) b (k, n) + u (m, rank) v (rank, n) + bias, computed in float32 and rounded once. u and v
   are float32; rank is 0 if there are none. Zero rows at the start and the end of v's panel are not multiplied. bias
   has c's dtype, or is NULL. All threads together widen b, a few panels of PANEL columns at a time; the thread that
   multiplies a block of BLOCK rows of a also widens it. If k > DEEP, a buffer keeps the sums between parts of k. */
int float_product(const void *a, int64_t a_down, int64_t a_along, int a_half, const void *b, int64_t b_down, int64_t b_along,
                  int b_half, const float *u, const float *v, int64_t v_down, int64_t v_along, int64_t rank, const void *bias,
                  void *c, int64_t ldc, int c_half, int add, int64_t m, int64_t k, int64_t n, int threads) {
    if (m <= 0 || n <= 0) return DONE;
    matrix A = {a, a_down, a_along, a_half}, B = {b, b_down, b_along, b_half};
    matrix U = {u, rank, 1, 0}, V = {v, v_down, v_along, 0};
    int64_t deep = lesser(k, DEEP), blocks = (m + BLOCK - 1) / BLOCK, all = up_to(n, STEP);
    int64_t wide = lesser(up_to(all, PANEL), up_to(greater(ROOM / greater(deep, 1), PANEL), PANEL)), panels = wide / PANEL;
    /* If there are few blocks, several threads share a block's panels. */
    int64_t shares = lesser(panels, (2 * threads + blocks - 1) / blocks), each = (panels + shares - 1) / shares;
    float *packed = aligned_room(wide * deep * 4), *sums = k > DEEP ? aligned_room(blocks * BLOCK * all * 4) : NULL;
    float *packed_v = aligned_room(wide * rank * 4);
    int failed = DONE;
    if (!all_there(packed && packed_v && (sums || k <= DEEP), &failed)) return free(packed), free(packed_v), free(sums), failed;
#pragma omp parallel num_threads(threads)
    {
        float *rows = aligned_room(BLOCK * deep * 4), *tile = aligned_room(BLOCK * PANEL * 4);
        float *thin = aligned_room(BLOCK * rank * 4);
        int there = all_there(rows && tile && thin, &failed);
        for (int64_t from = 0; from < greater(k, 1); from += DEEP)
            for (int64_t first = 0; first < n; first += wide) {
                int64_t depth = lesser(DEEP, k - from), seen_block = -1;
#pragma omp for schedule(static)
                for (int64_t p = first; p < lesser(first + wide, n); p += PANEL) {
                    int64_t real = lesser(PANEL, n - p), ld = up_to(real, STEP);
                    widen_block(&B, from, p, depth, depth, real, ld, packed + (p - first) * depth, ld);
                    widen_block(&V, 0, p, rank, rank, real, ld, packed_v + (p - first) * rank, ld);
                }
#pragma omp for schedule(static)
                for (int64_t i = 0; i < blocks * shares; i++) {
                    if (!there) continue;
                    int64_t block = i / shares, at = block * BLOCK, real_rows = lesser(BLOCK, m - at), M = up_to(real_rows, STEP);
                    int64_t low = first + i % shares * each * PANEL, high = lesser(lesser(low + each * PANEL, first + wide), n);
                    if (block != seen_block && low < high) {
                        widen_block(&A, at, from, real_rows, M, depth, depth, rows, depth);
                        widen_block(&U, at, 0, real_rows, M, rank, rank, thin, rank);
                        seen_block = block;
                    }
                    for (int64_t p = low; p < high; p += PANEL) {
                        int64_t real = lesser(PANEL, n - p), N = up_to(real, STEP), parts = (depth + SHALLOW - 1) / SHALLOW;
                        int64_t step = up_to((depth + parts - 1) / greater(parts, 1), STEP), ld = sums ? all : N;
                        float *to = sums ? sums + at * all + p : tile;
                        if (!depth) memset(tile, 0, BLOCK * PANEL * 4);
                        for (int64_t d = 0; d < depth; d += step)
                            of_floats(M, N, lesser(step, depth - d), depth, N, ld, d > 0 || from > 0, rows + d,
                                      packed + (p - first) * depth + d * N, to, 0);
                        if (from + depth < k) continue;
                        const float *last = packed_v + (p - first) * rank;
                        int64_t begin = 0, end = rank;
                        while (begin < end && all_zero(last + begin * N, N)) begin++;
                        while (begin < end && all_zero(last + (end - 1) * N, N)) end--;
                        if (begin < end) of_floats(M, N, end - begin, rank, N, ld, 1, thin + begin, last + begin * N, to, 0);
                        for (int64_t r = 0; r < real_rows; r++) {
                            float *x = to + r * ld;
                            bf16 *narrow = (bf16 *)c + (at + r) * ldc + p;
                            float *single = (float *)c + (at + r) * ldc + p;
                            if (bias)
                                for (int64_t j = 0; j < real; j++)
                                    x[j] += c_half ? up(((const bf16 *)bias)[p + j]) : ((const float *)bias)[p + j];
                            if (c_half && add)
                                for (int64_t j = 0; j < real; j++) narrow[j] = down(up(narrow[j]) + x[j]);
                            else if (c_half)
                                for (int64_t j = 0; j < real; j++) narrow[j] = down(x[j]);
                            else if (add)
                                for (int64_t j = 0; j < real; j++) single[j] += x[j];
                            else memcpy(single, x, real * sizeof *x);
                        }
                    }
                }
            }
        free(rows), free(tile), free(thin);
    }
    free(packed), free(packed_v), free(sums);
    return failed;
}

/* -- 3 x 3 convolutions in float32 ------------------------------------------------------------------------------------- */

/* Winograd's minimal filtering F(2 x 2, 3 x 3) (arXiv 1509.09308): with 16 instead of 36 multiplications for 2 x 2
   outputs,

       y = Aᵀ (Σ over channels of (G g Gᵀ) ⊙ (Bᵀ d B)) A      d: 4 x 4 inputs, g: 3 x 3 weights

   For each of the 16 places in a tile, the sum over channels is a matrix product. A block has about TILES tiles of
   2 x 2 outputs, in segments. A segment is one row of tiles of one picture, followed by a tile that is ignored. */

enum { TILES = 64, KERNELS = 1 << 21 };

/* Compute G g Gᵀ for the kernels of one output channel, which are `along` apart. Place k is written to u + k place. */
static void kernel_places(const bf16 *w, int64_t along, int turned, int64_t channels, float *u, int64_t place) {
    enum { FEW = 64 };
    for (int64_t first = 0; first < channels; first += FEW) {
        int64_t n = lesser(FEW, channels - first);
        float g[9][FEW], a[4][3][FEW];
        for (int e = 0; e < 9; e++)
            for (int64_t c = 0; c < n; c++) g[e][c] = up(w[(first + c) * along + (turned ? 8 - e : e)]);
        for (int j = 0; j < 3; j++)
            for (int64_t c = 0; c < n; c++) {
                float outer = 0.5f * (g[j][c] + g[6 + j][c]), inner = 0.5f * g[3 + j][c];
                a[0][j][c] = g[j][c], a[1][j][c] = outer + inner, a[2][j][c] = outer - inner, a[3][j][c] = g[6 + j][c];
            }
        for (int i = 0; i < 4; i++) {
            float *to = u + 4 * i * place + first;
            for (int64_t c = 0; c < n; c++) {
                float outer = 0.5f * (a[i][0][c] + a[i][2][c]), inner = 0.5f * a[i][1][c];
                to[c] = a[i][0][c], to[place + c] = outer + inner;
                to[2 * place + c] = outer - inner, to[3 * place + c] = a[i][2][c];
            }
        }
    }
}

/* Copy n values; constant sizes let the compiler copy short rows without a call. */
static inline void copy_row(bf16 *to, const bf16 *from, int64_t n) {
    if (n == 4) memcpy(to, from, 8);
    else if (n == 8) memcpy(to, from, 16);
    else if (n == 16) memcpy(to, from, 32);
    else memcpy(to, from, n * 2);
}

/* Compute Bᵀ d B for T tiles of one channel. d has 4 rows of 2 T + 2 inputs; place k is written to v + k place. */
static void input_places(const bf16 *strip, int64_t T, float *restrict v, int64_t place) {
    int64_t R = 2 * T + 2;
    float d[4 * R], b[4 * R];
    for (int64_t j = 0; j < 4 * R; j++) d[j] = up(strip[j]);
    for (int64_t j = 0; j < R; j++) {
        float d0 = d[j], d1 = d[R + j], d2 = d[2 * R + j], d3 = d[3 * R + j];
        b[j] = d0 - d2, b[R + j] = d1 + d2, b[2 * R + j] = d2 - d1, b[3 * R + j] = d1 - d3;
    }
    for (int i = 0; i < 4; i++) {
        float *restrict v0 = v + 4 * i * place, *restrict v1 = v0 + place, *restrict v2 = v1 + place, *restrict v3 = v2 + place;
        const float *row = b + i * R;
        for (int64_t t = 0; t < T; t++) {
            float b0 = row[2 * t], b1 = row[2 * t + 1], b2 = row[2 * t + 2], b3 = row[2 * t + 3];
            v0[t] = b0 - b2, v1[t] = b1 + b2, v2[t] = b2 - b1, v3[t] = b1 - b3;
        }
    }
}

/* Compute Aᵀ m A + bias for T tiles of one output channel: 2 rows of 2 T outputs. */
static void outputs_of(const float *m, int64_t place, int64_t T, float bias, bf16 *y) {
    float rows[2][4][T], line[2 * T];
    for (int j = 0; j < 4; j++) {
        const float *m0 = m + j * place, *m1 = m0 + 4 * place, *m2 = m1 + 4 * place, *m3 = m2 + 4 * place;
        for (int64_t t = 0; t < T; t++) rows[0][j][t] = m0[t] + m1[t] + m2[t], rows[1][j][t] = m1[t] - m2[t] - m3[t];
    }
    for (int i = 0; i < 2; i++) {
        for (int64_t t = 0; t < T; t++) {
            float s0 = rows[i][0][t], s1 = rows[i][1][t], s2 = rows[i][2][t], s3 = rows[i][3][t];
            line[2 * t] = s0 + s1 + s2 + bias, line[2 * t + 1] = s1 - s2 - s3 + bias;
        }
        for (int64_t j = 0; j < 2 * T; j++) y[2 * T * i + j] = down(line[j]);
    }
}

/* y (n, outputs, height, width) = x (n, channels, height, width) convolved with w, with padding 1, plus bias
   (outputs) or NULL. The kernel of an output and a channel is at w + output w_down + channel w_along; if `turned`,
   its 9 weights are read in reverse order. The pictures of y are y_picture elements apart. */
int conv3x3(const bf16 *x, const bf16 *w, int64_t w_down, int64_t w_along, int turned, const bf16 *bias, bf16 *y, int64_t y_picture,
            int64_t n, int64_t channels, int64_t outputs, int64_t height, int64_t width, int threads) {
    int64_t per = (width + 1) / 2 + 1, high = (height + 1) / 2, segments = n * high, each = greater(1, TILES / per);
    int64_t T = up_to(lesser(each, segments) * per, STEP), blocks = (segments + each - 1) / each, R = 2 * T + 2;
    int64_t wide = lesser(outputs, greater(STEP, KERNELS / (16 * channels))), parts = (channels + SHALLOW - 1) / SHALLOW;
    int64_t step = up_to((channels + parts - 1) / parts, STEP);
    float *kernels = aligned_room(16 * wide * channels * 4);
    int failed = DONE;
    if (!all_there(kernels != NULL, &failed)) return failed;
#pragma omp parallel num_threads(threads)
    {
        float *inputs = aligned_room(16 * channels * T * 4), *sums = aligned_room(16 * wide * T * 4);
        bf16 *strip = aligned_room(4 * R * 2), *lines = aligned_room(4 * T * 2);
        int there = all_there(inputs && sums && strip && lines, &failed);
        for (int64_t first = 0; first < outputs; first += wide) {
            int64_t real = lesser(wide, outputs - first);
#pragma omp for schedule(static)
            for (int64_t o = 0; o < real; o++)
                kernel_places(w + (first + o) * w_down, w_along, turned, channels, kernels + o * channels, wide * channels);
#pragma omp for schedule(static)
            for (int64_t block = 0; block < blocks; block++) {
                if (!there) continue;
                int64_t from = block * each, count = lesser(each, segments - from);
                int64_t picture[TILES], top[TILES]; /* of the segments */
                for (int64_t s = 0; s < count; s++) picture[s] = (from + s) / high, top[s] = (from + s) % high * 2;
                memset(strip, 0, 4 * R * 2);
                for (int64_t c = 0; c < channels; c++) {
                    for (int64_t s = 0; s < count; s++)
                        for (int64_t i = 0, row = top[s] - 1; i < 4; i++, row++)
                            if (row >= 0 && row < height)
                                copy_row(strip + i * R + s * 2 * per + 1, x + ((picture[s] * channels + c) * height + row) * width, width);
                    input_places(strip, T, inputs + c * T, channels * T);
                }
                for (int k = 0; k < 16; k++)
                    for (int64_t d = 0; d < channels; d += step)
                        of_floats(real, T, lesser(step, channels - d), channels, T, T, d > 0, kernels + k * wide * channels + d,
                                  inputs + (k * channels + d) * T, sums + k * wide * T, 0);
                for (int64_t o = 0; o < real; o++) {
                    outputs_of(sums + o * T, wide * T, T, bias ? up(bias[first + o]) : 0.0f, lines);
                    for (int64_t s = 0; s < count; s++)
                        for (int64_t i = 0; i < lesser(2, height - top[s]); i++)
                            copy_row(y + picture[s] * y_picture + ((first + o) * height + top[s] + i) * width,
                                     lines + 2 * T * i + s * 2 * per, width);
                }
            }
        }
        free(inputs), free(sums), free(strip), free(lines);
    }
    free(kernels);
    return failed;
}
