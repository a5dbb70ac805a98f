/* All layers of a Llama-like decoder in one parallel region, and its products. Needs the vectors of
   vec.h. On other processors, serve/forward/llama.py computes the same with one call per operation; it is
   also the reference.

   A step of few tokens is hundreds of products of some tens of microseconds. If each product started its
   own region, waking the threads would take longer than the products; here threads meet at barriers and
   never sleep. Arithmetic is float32 inside and rounded where plan.py rounds. A row's result depends
   neither on the other rows nor on the number of threads. */

#include "amx.h"
#include "serving.h"

#if HAS_VECTORS

const int has_decoder = 1;

enum { PANEL = 64, ROWS = 64, DEEP = 1024, CHUNK = 512, NEAR = 128, FEW = REGISTERS == 32 ? 8 : 4, SOON = 4096 };
/* Pairs along the inputs: DEEP per sum in registers; CHUNK are dequantized at once, for the
   second-level cache. Up to FEW rows multiply by codes as they are dequantized; for more rows, the next
   codes are dequantized between the products of a tile, and codes SOON bytes ahead are prefetched. In
   AMX tiles sums stay in place, and few rows use NEAR pairs at once, for the first-level cache. */

/* W (out, in) in panels of 64 rows, by kind:
     DENSE   bf16                             (out / 64, in / 2, 64, 2)
     ROWS8   q scale                          int8, -127 … 127, (out / 64, in / 4, 4, 4, 2, 4, 2): sixteen columns, in fours, with
                                              the two pairs of each; one scale per row, (out / 64, 64) float32, applied to the
                                              sums; table: the low bytes of bfloat16 0 … 127, then the high bytes
     EIGHT   q scale + zero, to bf16          int8 q in DENSE's order
     FOUR    table[q] scale + zero, to bf16   32 bits for eight inputs of every second column, (out / 64, in / 8, 4, 16): lane
                                              2 c + e of the j-th sixteen has, in its half byte 2 i + h, input 2 i + e of
                                              column 16 j + 8 h + c. table: sixteen float32
   In EIGHT and FOUR, `size` inputs of a row, 8, 16, 32 or 64, share scale and zero, in the layout
   `constants`:
     ONE     scale, float32                   (out / 64, in / size, 64); zero is 0
     TWO     scale, then zero, float32        (out / 64, in / size, 2, 64)
     PAIR    scale and zero in bf16           (out / 64, in / size, 64, 2)
   `tiles`: whether AMX multiplies. Its sums have another order, so all rows must use the same way. */
enum { DENSE, ROWS8, EIGHT, FOUR };
enum { ONE, TWO, PAIR };
typedef struct {
    i64 kind, size, constants, tiles;
    const void *codes, *scales;
    const void *table;
} matrix;

/* c[r][16 J] (+)= sum over p of a_r[p] . b[p][.] for R rows; b are pairs of bf16, a panel's columns. */
static inline __attribute__((always_inline)) void tile(const int R, const int J, const factor *a, i64 lda, const uint32_t *b,
                                                       i64 pairs_in, float *c, int add) {
    v16 s[4][4];
    for (int r = 0; r < R; r++)
        for (int j = 0; j < J; j++) s[r][j] = add ? load16(c + r * PANEL + 16 * j) : set16(0.0f);
    for (i64 p = 0; p < pairs_in; p++) {
        columns16 y[4];
        for (int j = 0; j < J; j++) y[j] = columns_of(load_w16(b + p * PANEL + 16 * j));
        for (int r = 0; r < R; r++)
            for (int j = 0; j < J; j++) s[r][j] = dot16(s[r][j], a[r * lda + p], y[j]);
    }
    for (int r = 0; r < R; r++)
        for (int j = 0; j < J; j++) store16(c + r * PANEL + 16 * j, s[r][j]);
}

/* WIDE: how many groups of sixteen columns are computed at once */
#define TILES(R, WIDE)                                                                                                \
    static void tile##R(int J, const factor *a, i64 lda, const uint32_t *b, i64 n, float *c, int add) {               \
        for (int j = 0, own; j < J; j += own) {                                                                       \
            own = J - j < WIDE ? J - j : WIDE;                                                                        \
            if (own == 4) tile(R, 4, a, lda, b + 16 * j, n, c + 16 * j, add);                                         \
            else if (own == 3) tile(R, 3, a, lda, b + 16 * j, n, c + 16 * j, add);                                    \
            else if (own == 2) tile(R, 2, a, lda, b + 16 * j, n, c + 16 * j, add);                                    \
            else tile(R, 1, a, lda, b + 16 * j, n, c + 16 * j, add);                                                  \
        }                                                                                                             \
    }
TILES(1, 4)
TILES(2, (REGISTERS < 32 ? 2 : 4))
TILES(3, (REGISTERS < 32 ? 1 : 4))
TILES(4, (REGISTERS < 32 ? 1 : 4))

/* Scale and zero of a group of sixteen columns starting at `column`, each twice: first eight columns,
   then the others. */
static inline void constants_of(const matrix *w, i64 group, i64 column, v16 *scale, v16 *zero) {
    v16 s, z = set16(0.0f);
    if (w->constants == PAIR) {
        w16 both = load_w16((const uint32_t *)w->scales + group * PANEL + column);
        s = even16(both), z = odd16(both);
    } else {
        const float *from = (const float *)w->scales + (w->constants == TWO ? 2 : 1) * group * PANEL + column;
        s = load16(from);
        if (w->constants == TWO) z = load16(from + PANEL);
    }
    scale[0] = twice16(s, 0), zero[0] = twice16(z, 0);
    scale[1] = twice16(s, 1), zero[1] = twice16(z, 1);
}

/* Four pairs of codes of sixteen columns. */
typedef struct {
    const int8_t *eight;
    w16 words[2];
    columns16 both[2];
    v16 scale[2], zero[2];
} unit;

/* `at`: the panel's number times the pairs of a row, plus the pair in it; the constants are already loaded. */
static inline __attribute__((always_inline)) void begin(const i64 kind, const matrix *w, i64 at, i64 column, unit *u) {
    if (kind == FOUR) u->words[0] = load_w16((const uint32_t *)w->codes + at / 4 * PANEL + column);
    else if (kind == ROWS8)
        for (int i = 0; i < 2; i++)
            u->words[i] = load_w16((const uint8_t *)w->codes + (at / 2 + i) * 4 * PANEL + 4 * column);
    else u->eight = (const int8_t *)w->codes + (at * PANEL + column) * 2;
}

/* Both pairs of 64 ROWS8 codes. */
static inline __attribute__((always_inline)) void made_of_rows8(w16 q, const matrix *w, columns16 *out) {
#if BF16_PRODUCTS && defined(__AVX512VBMI__)
    const uint8_t *table = w->table;
    __asm__("" : "+r"(table)); /* reload each time: in registers it would displace those of a tile's sums */
    __m512i size = _mm512_abs_epi8(q), low, high;
    low = _mm512_permutex2var_epi8(_mm512_loadu_si512(table), size, _mm512_loadu_si512(table + 64));
    high = _mm512_permutex2var_epi8(_mm512_loadu_si512(table + 128), size, _mm512_loadu_si512(table + 192));
    high = _mm512_ternarylogic_epi32(high, q, _mm512_set1_epi8((char)0x80), 0xf8); /* the sign */
    out[0] = _mm512_unpacklo_epi8(low, high), out[1] = _mm512_unpackhi_epi8(low, high);
#else
    (void)w;
    w16 first = spread_bytes(q, 0), second = spread_bytes(q, 1);
    out[0] = columns_from(byte_of(first, 16), byte_of(first, 0));
    out[1] = columns_from(byte_of(second, 16), byte_of(second, 0));
#endif
}

/* Pair e of a unit; pairs are requested in order. */
static inline __attribute__((always_inline)) columns16 made_of(const i64 kind, const matrix *w, unit *u, v16 table,
                                                               const int e) {
    v16 low, high;
    if (kind == ROWS8) {
        if (e % 2 == 0) made_of_rows8(u->words[e / 2], w, u->both);
        return u->both[e % 2];
    }
    if (kind == FOUR) low = look_up(u->words[0], 8 * e, table), high = look_up(u->words[0], 8 * e + 4, table);
    else low = from_int8(u->eight + 2 * PANEL * e), high = from_int8(u->eight + 2 * PANEL * e + 16);
    return columns_of(pairs16(fma16(low, u->scale[0], u->zero[0]), fma16(high, u->scale[1], u->zero[1])));
}

static inline int pairs_shift(const matrix *w) { return __builtin_ctzll((unsigned long long)w->size) - 1; }

/* Dequantize `count` pairs of codes starting at `at` (see `begin`), 16 J columns of a panel starting at
   `within`, to bf16: out (count, 64, 2). */
static inline __attribute__((always_inline)) void widen(const i64 kind, const int J, const matrix *w, i64 at, i64 count,
                                                        i64 within, uint32_t *out) {
    const v16 table = kind == FOUR ? load16(w->table) : set16(0.0f);
    i64 of = kind == ROWS8 ? 2 : w->size / 2;
    for (i64 p = 0; p < count; p += of)
        for (int j = 0; j < J; j++) {
            unit u;
            if (kind == ROWS8) { /* two pairs are the minimum */
                w16 q = load_w16((const uint8_t *)w->codes + (at + p) * 2 * PANEL + 4 * (within + 16 * j));
                made_of_rows8(q, w, u.both);
                for (int e = 0; e < 2; e++) store_w16(out + PANEL * (p + e) + 16 * j, pairs_of(u.both[e]));
                continue;
            }
            constants_of(w, (at + p) >> pairs_shift(w), within + 16 * j, u.scale, u.zero);
            for (i64 i = p; i < p + of; i += 4) {
                begin(kind, w, at + i, within + 16 * j, &u);
#pragma GCC unroll 4
                for (int e = 0; e < 4; e++) store_w16(out + PANEL * (i + e) + 16 * j, pairs_of(made_of(kind, w, &u, table, e)));
            }
        }
}

#define BY_KIND(f, kind, ...) \
    switch (kind) { \
    case ROWS8: f(ROWS8, __VA_ARGS__); break; \
    case EIGHT: f(EIGHT, __VA_ARGS__); break; \
    default: f(FOUR, __VA_ARGS__); \
    }

static void widen_codes(int J, const matrix *w, i64 at, i64 count, i64 within, uint32_t *out) {
    if (J == 4) BY_KIND(widen, w->kind, 4, w, at, count, within, out)
    else BY_KIND(widen, w->kind, J, w, at, count, within, out)
}

/* c[r][64] of R rows, all columns of a panel, 16 J at a time, dequantizing codes on the fly: the sums
   of `tile` in the same order. */
static inline __attribute__((always_inline)) void few_rows(const i64 kind, const int R, const int J, const factor *a, i64 lda,
                                                           const matrix *w, i64 at, i64 half, float *c) {
    const v16 table = kind == FOUR ? load16(w->table) : set16(0.0f);
    i64 of = kind == ROWS8 ? 2 : w->size / 2;
    for (int first = 0; first < 4; first += J) {
        v16 s[8][4];
        for (int r = 0; r < R; r++)
            for (int j = 0; j < J; j++) s[r][j] = set16(0.0f);
        for (i64 p = 0; p < half; p += of) {
            if (kind == ROWS8) {
#pragma GCC unroll 4
                for (int j = 0; j < J; j++) {
                    w16 q = load_w16((const uint8_t *)w->codes + (at + p) * 2 * PANEL + 64 * (first + j));
                    columns16 y[2];
                    made_of_rows8(q, w, y);
#pragma GCC unroll 2
                    for (int e = 0; e < 2; e++)
#pragma GCC unroll 8
                        for (int r = 0; r < R; r++) s[r][j] = dot16(s[r][j], a[r * lda + p + e], y[e]);
                }
                continue;
            }
            const int T = R < 4 && REGISTERS == 32 ? 2 : 1; /* units at once: a sum waits for the previous one */
#pragma GCC unroll 4
            for (int j = 0; j < J; j += T) {
                unit u[2];
#pragma GCC unroll 2
                for (int t = 0; t < T; t++)
                    constants_of(w, (at + p) >> pairs_shift(w), 16 * (first + j + t), u[t].scale, u[t].zero);
                for (i64 i = p; i < p + of; i += 4) {
#pragma GCC unroll 2
                    for (int t = 0; t < T; t++) begin(kind, w, at + i, 16 * (first + j + t), &u[t]);
#pragma GCC unroll 4
                    for (int e = 0; e < 4; e++)
#pragma GCC unroll 2
                        for (int t = 0; t < T; t++) {
                            columns16 y = made_of(kind, w, &u[t], table, e);
#pragma GCC unroll 8
                            for (int r = 0; r < R; r++) s[r][j + t] = dot16(s[r][j + t], a[r * lda + i + e], y);
                        }
                }
            }
        }
        for (int r = 0; r < R; r++)
            for (int j = 0; j < J; j++) store16(c + r * PANEL + 16 * (first + j), s[r][j]);
    }
}

#define FEW_ROWS(R, J) \
    static void few_rows##R(const factor *a, i64 lda, const matrix *w, i64 at, i64 half, float *c) { \
        if (R <= FEW) BY_KIND(few_rows, w->kind, R, J, a, lda, w, at, half, c) \
    }
FEW_ROWS(1, (REGISTERS < 32 ? 2 : 4))
FEW_ROWS(2, (REGISTERS < 32 ? 1 : 4))
FEW_ROWS(3, (REGISTERS < 32 ? 1 : 4))
FEW_ROWS(4, (REGISTERS < 32 ? 1 : 4))
FEW_ROWS(5, 2)
FEW_ROWS(6, 2)
FEW_ROWS(7, 2)
FEW_ROWS(8, 2)
static void (*const few_rows_of[])(const factor *, i64, const matrix *, i64, i64, float *) = {
    NULL, few_rows1, few_rows2, few_rows3, few_rows4, few_rows5, few_rows6, few_rows7, few_rows8};

/* Codes to dequantize in the meantime: units next … last of a panel's chunk, four adjacent ones. */
typedef struct {
    const matrix *w;
    i64 at, next, last;
    uint32_t *out;
} ahead;

static inline __attribute__((always_inline)) void begin_next(const i64 kind, const ahead *j, unit *u) {
    i64 at = j->at + j->next / 4 * 4, column = j->next % 4 * 16;
    if (kind != ROWS8) constants_of(j->w, at >> pairs_shift(j->w), column, u->scale, u->zero);
    begin(kind, j->w, at, column, u);
    const char *here = (const char *)j->w->codes + (kind == FOUR ? at * PANEL + 4 * column : 2 * at * PANEL + 8 * column);
    for (int i = 0; i < (kind == FOUR ? 1 : 2); i++) __builtin_prefetch(here + SOON + 64 * i);
}

static inline __attribute__((always_inline)) void store_next(const i64 kind, const ahead *j, unit *u, v16 table, const int e) {
    store_w16(j->out + PANEL * (j->next / 4 * 4 + e) + j->next % 4 * 16, pairs_of(made_of(kind, j->w, u, table, e)));
}

/* tile(4, 4, …) with a unit for every four pairs: dequantizing uses the execution units that the
   products leave idle. */
static inline __attribute__((always_inline)) void tile_ahead(const i64 kind, const factor *a, i64 lda, const uint32_t *b,
                                                             i64 pairs_in, float *c, int add, ahead *job) {
    const v16 table = kind == FOUR ? load16(job->w->table) : set16(0.0f);
    i64 p = 0;
    v16 s[4][4];
    for (int r = 0; r < 4; r++)
        for (int j = 0; j < 4; j++) s[r][j] = add ? load16(c + r * PANEL + 16 * j) : set16(0.0f);
#define STEP(p) \
    { \
        columns16 y[4]; \
        for (int j = 0; j < 4; j++) y[j] = columns_of(load_w16(b + (p) * PANEL + 16 * j)); \
        for (int r = 0; r < 4; r++) \
            for (int j = 0; j < 4; j++) s[r][j] = dot16(s[r][j], a[r * lda + (p)], y[j]); \
    }
    for (; p + 4 <= pairs_in && job->next < job->last; p += 4, job->next++) {
        unit u;
        begin_next(kind, job, &u);
#pragma GCC unroll 4
        for (int e = 0; e < 4; e++) {
            STEP(p + e)
            store_next(kind, job, &u, table, e);
        }
    }
    for (; p < pairs_in; p++) STEP(p)
#undef STEP
    for (int r = 0; r < 4; r++)
        for (int j = 0; j < 4; j++) store16(c + r * PANEL + 16 * j, s[r][j]);
}

static void tile4_ahead(const factor *a, i64 lda, const uint32_t *b, i64 n, float *c, int add, ahead *job) {
    BY_KIND(tile_ahead, job->w->kind, a, lda, b, n, c, add, job)
}

static inline __attribute__((always_inline)) void rest_ahead(const i64 kind, ahead *job) {
    const v16 table = kind == FOUR ? load16(job->w->table) : set16(0.0f);
    for (; job->next < job->last; job->next++) {
        unit u;
        begin_next(kind, job, &u);
#pragma GCC unroll 4
        for (int e = 0; e < 4; e++) store_next(kind, job, &u, table, e);
    }
}

static void finish_ahead(ahead *job) { BY_KIND(rest_ahead, job->w->kind, job) }

#if HAS_TILES
enum { TILE = 16, TWO_TILES = 32 };

/* Configure tiles for `m` rows of x. Up to sixteen: tiles 0 … 3 are sums of sixteen columns each, 4 is
   x, 5 … 7 are W. Up to 32: 0 and 1 are sums of the first sixteen rows by 32 columns, 2 and 3 of the
   others, 4 and 5 are x, 6 and 7 are W. */
static void shape_tiles(i64 m) {
    tile_shapes shapes = {.palette = 1};
    int low = m <= TILE;
    for (int t = 0; t < 8; t++) shapes.bytes[t] = 64, shapes.rows[t] = TILE;
    for (int t = low ? 0 : 2; t < 4; t++) shapes.rows[t] = (uint8_t)(low ? m : m - TILE);
    shapes.rows[low ? 4 : 5] = shapes.rows[3];
    tile_configure(&shapes);
}

/* Prefetch the data of two products ahead: the hardware prefetcher does not see that a tile's rows, 256
   bytes apart, are a stream. */
static inline void ask_ahead(const uint32_t *b, int J) {
    for (int p = 0; p < TILE; p++)
        for (int j = 0; j < J; j++) __builtin_prefetch((const char *)(b + p * PANEL + 16 * j) + 2 * SOON);
}

static inline void step_low(const uint32_t *a, i64 lda, const uint32_t *b, int J) {
    const i64 ldb = PANEL * 4;
    tile_load(4, a, lda * 4);
    tile_load(5, b, ldb);
    tile_product(0, 4, 5);
    if (J > 1) {
        tile_load(6, b + 16, ldb);
        tile_product(1, 4, 6);
    }
    if (J > 2) {
        tile_load(7, b + 32, ldb);
        tile_product(2, 4, 7);
    }
    if (J > 3) {
        tile_load(5, b + 48, ldb);
        tile_product(3, 4, 5);
    }
}

static inline void step_high(const uint32_t *a, i64 lda, const uint32_t *b, int both_columns) {
    const i64 ldb = PANEL * 4;
    tile_load(6, b, ldb);
    tile_load(4, a, lda * 4);
    tile_load(5, a + TILE * lda, lda * 4);
    tile_product(0, 4, 6);
    tile_product(2, 5, 6);
    if (both_columns) {
        tile_load(7, b + 16, ldb);
        tile_product(1, 4, 7);
        tile_product(3, 5, 7);
    }
}

/* Tiles 0 to 3 hold the sums. */
static inline void zero_sums(void) {
    tile_zero(0);
    tile_zero(1);
    tile_zero(2);
    tile_zero(3);
}

/* `tile` for up to 32 rows, with tiles configured for m: sixteen pairs at a time, the last ones padded
   with zeros. */
static void product_in_tiles(i64 m, int J, const uint32_t *a, i64 lda, const uint32_t *b, i64 pairs_in, float *c, int add,
                             int from_memory) {
    const i64 ldc = PANEL * 4;
    i64 whole = pairs_in / TILE * TILE, rest = pairs_in - whole;
    uint32_t a_rest[TWO_TILES * TILE], b_rest[TILE * PANEL];
    if (rest) {
        memset(a_rest, 0, sizeof a_rest), memset(b_rest, 0, sizeof b_rest);
        for (i64 r = 0; r < m; r++) memcpy(a_rest + r * TILE, a + r * lda + whole, rest * sizeof *a);
        for (i64 p = 0; p < rest; p++) memcpy(b_rest + p * PANEL, b + (whole + p) * PANEL, 16 * J * sizeof *b);
    }
    if (m <= TILE) {
        if (add) {
            tile_load(0, c, ldc);
            if (J > 1) tile_load(1, c + 16, ldc);
            if (J > 2) tile_load(2, c + 32, ldc);
            if (J > 3) tile_load(3, c + 48, ldc);
        } else {
            zero_sums();
        }
        for (i64 p = 0; p < whole; p += TILE) {
            if (from_memory) ask_ahead(b + p * PANEL, J);
            step_low(a + p, lda, b + p * PANEL, J);
        }
        if (rest) step_low(a_rest, TILE, b_rest, J);
        tile_store(0, c, ldc);
        if (J > 1) tile_store(1, c + 16, ldc);
        if (J > 2) tile_store(2, c + 32, ldc);
        if (J > 3) tile_store(3, c + 48, ldc);
        return;
    }
    float *below = c + TILE * PANEL;
    for (int j = 0; j < J; j += 2) {
        int both_columns = j + 1 < J;
        if (add) {
            tile_load(0, c + 16 * j, ldc);
            tile_load(2, below + 16 * j, ldc);
            if (both_columns) {
                tile_load(1, c + 16 * j + 16, ldc);
                tile_load(3, below + 16 * j + 16, ldc);
            }
        } else {
            zero_sums();
        }
        for (i64 p = 0; p < whole; p += TILE) {
            if (from_memory && j == 0) ask_ahead(b + p * PANEL, J);
            step_high(a + p, lda, b + p * PANEL + 16 * j, both_columns);
        }
        if (rest) step_high(a_rest, TILE, b_rest + 16 * j, both_columns);
        tile_store(0, c + 16 * j, ldc);
        tile_store(2, below + 16 * j, ldc);
        if (both_columns) {
            tile_store(1, c + 16 * j + 16, ldc);
            tile_store(3, below + 16 * j + 16, ldc);
        }
    }
}

/* The same for up to ROWS rows. A row's sums do not depend on the number of rows. */
static void rows_in_tiles(i64 m, int J, const uint32_t *a, i64 lda, const uint32_t *b, i64 pairs_in, float *c, int add,
                          int from_memory) {
    for (i64 r = 0, own; r < m; r += own) {
        own = m - r < TWO_TILES ? m - r : TWO_TILES;
        shape_tiles(own);
        product_in_tiles(own, J, a + r * lda, lda, b, pairs_in, c + r * PANEL, add, from_memory && r == 0);
    }
}

int amx_granted(void) { return tiles_granted(); }
#else
int amx_granted(void) { return 0; }
#endif

/* Write the sums of m rows and 16 J columns to y, or add them. */
static void put_sums(const float *c, i64 m, int J, const matrix *w, const bf16 *bias, bf16 *y, i64 ldy, int onto, i64 at) {
    for (i64 r = 0; r < m; r++)
        for (int j = 0; j < J; j++) {
            bf16 *o = y + r * ldy + at + 16 * j;
            v16 v = load16(c + r * PANEL + 16 * j);
            if (w->kind == ROWS8) v = mul16(v, load16((const float *)w->scales + at + 16 * j));
            if (bias) v = add16(v, load_bf16(bias + at + 16 * j));
            if (onto) v = add16(rounded_bf16(v), load_bf16(o)); /* rounded first, as a separate tensor would be */
            store_bf16(o, v);
        }
}

/* Columns from … to (multiples of 16) of y = x Wᵀ + bias, or of y += …; x (n, in). A block has few
   enough rows for its sums to stay in the first-level cache with the panel's columns. xs: x as factors. */
static void columns(const bf16 *x, const factor *xs, i64 n, i64 in, const matrix *w, const bf16 *bias, bf16 *y, i64 ldy,
                    int onto, i64 from, i64 to) {
    float c[ROWS * PANEL] __attribute__((aligned(64)));
    uint32_t made[2][CHUNK * PANEL] __attribute__((aligned(64)));
    i64 half = in / 2, most = w->kind == DENSE ? DEEP : CHUNK;
#if !HAS_TILES
    (void)x;
#else
    if (w->tiles) most = w->kind == DENSE ? half : n <= TWO_TILES ? NEAR : CHUNK;
#endif
    int turn = 0, ready = 0; /* whether made[turn] has the next chunk */
    for (i64 at = from, width; at < to; at += width) {
        i64 within = at % PANEL, row = at / PANEL * half;
        width = PANEL - within < to - at ? PANEL - within : to - at;
        int J = (int)(width / 16);
        if (w->kind != DENSE && !w->tiles && J == 4 && n > 0 && n <= FEW) {
            i64 first = w->kind == ROWS8 && n > 4 ? 4 : n; /* its table leaves no registers for more sums */
            few_rows_of[first](xs, half, w, row, half, c);
            if (first < n) few_rows_of[n - first](xs + first * half, half, w, row, half, c + first * PANEL);
            put_sums(c, n, J, w, bias, y, ldy, onto, at);
            continue;
        }
        for (i64 r0 = 0; r0 < n; r0 += ROWS) {
            i64 m = n - r0 < ROWS ? n - r0 : ROWS;
            for (i64 k = 0; k < half; k += most) {
                i64 deep = half - k < most ? half - k : most;
                const uint32_t *b = made[turn];
                ahead job = {0};
                if (w->kind == DENSE) b = (const uint32_t *)w->codes + (row + k) * PANEL + within;
                else {
                    if (!ready) widen_codes(J, w, row + k, deep, within, made[turn]);
                    turn = !turn;
                    i64 after = k + deep < half ? k + deep : 0, then = after || r0 + ROWS < n ? at : at + width;
                    i64 long_ = half - after < most ? half - after : most;
                    ready = REGISTERS == 32 && !w->tiles && J == 4 && m > FEW && then + PANEL <= to && long_ % 4 == 0;
                    if (ready) job = (ahead){w, then / PANEL * half + after, 0, long_, made[turn]};
                }
#if HAS_TILES
                if (w->tiles) {
                    rows_in_tiles(m, J, (const uint32_t *)x + r0 * half + k, half, b, deep, c, k > 0, w->kind == DENSE && r0 == 0);
                    continue;
                }
#endif
                for (i64 r = 0; r < m; r += 4) {
                    const factor *a = xs + (r0 + r) * half + k;
                    float *sums = c + r * PANEL;
                    switch (m - r) {
                    case 1: tile1(J, a, half, b, deep, sums, k > 0); break;
                    case 2: tile2(J, a, half, b, deep, sums, k > 0); break;
                    case 3: tile3(J, a, half, b, deep, sums, k > 0); break;
                    default:
                        if (REGISTERS == 32 && job.next < job.last) tile4_ahead(a, half, b, deep, sums, k > 0, &job);
                        else tile4(J, a, half, b, deep, sums, k > 0);
                    }
                }
                if (REGISTERS == 32 && ready) finish_ahead(&job);
            }
            put_sums(c, m, J, w, bias, y + r0 * ldy, ldy, onto, at);
        }
    }
#if HAS_TILES
    if (w->tiles) tile_release();
#endif
}

/* `room`: memory for the factors of x, or NULL if products read bf16. */
static void product_inside(const bf16 *x, i64 n, i64 in, const matrix *w, const bf16 *bias, bf16 *y, i64 out, int onto,
                           factor *room, meeting *m) {
    i64 from, to;
    int me = omp_get_thread_num(), all = omp_get_num_threads();
    if (room) {
        share(n * in / 2, 64, me, all, &from, &to);
        factors_of(x + 2 * from, to - from, room + from);
        meet(m);
    }
    share(out, 16, me, all, &from, &to);
    columns(x, room ? room : (const factor *)x, n, in, w, bias, y, out, onto, from, to);
}

/* y (n, out) = x Wᵀ + bias, or y += …: `columns` for all columns. `out` is a multiple of 16; `in` is
   even, for ROWS8 a multiple of 4, for EIGHT and FOUR of w's size. */
int panel_product(const bf16 *x, i64 n, i64 in, const matrix *w, const bf16 *bias, bf16 *y, i64 out, int onto, int threads) {
    factor *room = BF16_PRODUCTS ? NULL : aligned_room(n * in / 2 * (i64)sizeof *room);
    meeting m = {0};
    if (!BF16_PRODUCTS && !room) return NO_ROOM;
#pragma omp parallel num_threads(threads)
    product_inside(x, n, in, w, bias, y, out, onto, room, &m);
    free(room);
    return DONE;
}

#if HAS_TILES
/* The same in AMX tiles, whatever `w` says. */
int amx_panel_product(const bf16 *x, i64 n, i64 in, const matrix *w, const bf16 *bias, bf16 *y, i64 out, int onto,
                      int threads) {
    matrix own = *w;
    own.tiles = 1;
    return panel_product(x, n, in, &own, bias, y, out, onto, threads);
}
#endif

static void norm_inside(const bf16 *x, const bf16 *w, bf16 *y, i64 n, i64 dim, float eps) {
    i64 from, to;
    share(n, 1, omp_get_thread_num(), omp_get_num_threads(), &from, &to);
    for (i64 i = from; i < to; i++) norm_row(x + i * dim, w, y + i * dim, dim, eps);
}

enum {
    NORM, QKV, QKV_BIAS, Q_NORM, K_NORM, OUT, OUT_BIAS, NORM_AFTER, GATE_UP, DOWN, WINDOW, KEYS, VALUES, FIELDS
};

/* Run x (n, dim) through all layers, in place: serve/forward/llama.py's LlamaForward.hidden up to the
   last norm.
   layers: FIELDS numbers each, mostly pointers, to a `matrix` for weights; sizes: dim, heads, kv, d, ffn;
   numbers: eps, scale. positions … longest: as in paged_attend. thin: lora_rows' tables of groups 4 layer
   … 4 layer + 3, concatenated, or none; nseg … ldu: as in lora_rows. room: n (dim + (heads + 2 kv) d +
   heads d + 3 ffn) elements. */
int decode(bf16 *x, i64 n, const i64 *layers, i64 count, const i64 *sizes, const float *numbers, const float *cs,
            const float *sn, const i64 *positions, const i64 *slots, const i64 *starts, i64 nseq, const i64 *tables, i64 ldt,
            i64 longest, const i64 *thin, i64 nseg, const i64 *segments, const i64 *rows, const float *strengths, factor *u,
            i64 ldu, bf16 *room, int threads) {
    i64 dim = sizes[0], heads = sizes[1], kv = sizes[2], d = sizes[3], ffn = sizes[4], wide_qkv = (heads + 2 * kv) * d;
    float eps = numbers[0], scale = numbers[1];
    bf16 *h = room, *qkv = h + n * dim, *seen = qkv + n * wide_qkv, *gates = seen + n * heads * d, *act = gates + n * 2 * ffn;
    i64 record = THIN_RECORD * nseg;
    i64 widest = ffn > dim ? ffn : dim;
    widest = widest > heads * d ? widest : heads * d;
    factor *factors = BF16_PRODUCTS ? NULL : aligned_room(n * widest / 2 * (i64)sizeof *factors);
    int failed = DONE;
    meeting m = {0};
    if (!BF16_PRODUCTS && !factors) return NO_ROOM;
#pragma omp parallel num_threads(threads)
    for (i64 i = 0; i < count; i++) {
        const i64 *of = layers + i * FIELDS;
#define AT(field) ((const bf16 *)of[field])
#define MATRIX(field) ((const matrix *)of[field])
#define THIN(group, from, in, onto, out) \
    if (thin) { \
        thin_rows_inside(from, in, onto, out, thin + (4 * i + group) * record, nseg, segments, rows, strengths, u, ldu, &m); \
        meet(&m); \
    }
        norm_inside(x, AT(NORM), h, n, dim, eps);
        meet(&m);
        product_inside(h, n, dim, MATRIX(QKV), AT(QKV_BIAS), qkv, wide_qkv, 0, factors, &m);
        meet(&m);
        THIN(0, h, dim, qkv, wide_qkv)
        turn_and_store_inside(qkv, heads, kv, d, cs, sn, AT(Q_NORM), AT(K_NORM), eps, positions, slots, starts, nseq,
                              (bf16 *)of[KEYS], (bf16 *)of[VALUES], &m);
        meet(&m);
        paged_attend_inside(qkv, wide_qkv, seen, heads, kv, d, positions, starts, nseq, tables, ldt, AT(KEYS), AT(VALUES),
                            scale, 0.0f, of[WINDOW], longest, &failed);
        meet(&m);
        product_inside(seen, n, heads * d, MATRIX(OUT), AT(OUT_BIAS), x, dim, 1, factors, &m);
        meet(&m);
        THIN(1, seen, heads * d, x, dim)
        norm_inside(x, AT(NORM_AFTER), h, n, dim, eps);
        meet(&m);
        product_inside(h, n, dim, MATRIX(GATE_UP), NULL, gates, 2 * ffn, 0, factors, &m);
        meet(&m);
        THIN(2, h, dim, gates, 2 * ffn)
        i64 from, to;
        share(ffn, 16, omp_get_thread_num(), omp_get_num_threads(), &from, &to);
        for (i64 r = 0; r < n; r++)
            silu_gate_row(gates + r * 2 * ffn + from, gates + r * 2 * ffn + ffn + from, act + r * ffn + from, to - from);
        meet(&m);
        product_inside(act, n, ffn, MATRIX(DOWN), NULL, x, dim, 1, factors, &m);
        meet(&m);
        THIN(3, act, ffn, x, dim)
#undef AT
#undef MATRIX
#undef THIN
    }
    free(factors);
    return failed;
}

#else
const int has_decoder = 0;
int amx_granted(void) { return 0; }
#endif
