/* AMX tiles: eight tiles of sixteen rows of 64 bytes, and their bf16 product. HAS_TILES: whether they
   are available. With VENEER_EMULATE_AMX the tiles are emulated in plain C, so that code for tiles
   compiles and runs on any processor. */

#ifndef VENEER_AMX_H
#define VENEER_AMX_H

#include <stdint.h>
#include <string.h>

/* A thread's tile configuration, in the processor's format; palette 1. Tile t has rows[t] rows of bytes[t]. */
typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} tile_shapes;

#if defined(VENEER_EMULATE_AMX)
#define HAS_TILES 1

static _Thread_local tile_shapes emulated_shapes;
static _Thread_local uint32_t emulated_tiles[8][16][16];

/* Denormals are flushed to 0, whatever the thread's rounding mode. */
static inline float emulated_flush(float x) { return __builtin_fabsf(x) < 1.17549435e-38f ? __builtin_copysignf(0.0f, x) : x; }

static inline float emulated_up(uint32_t half) {
    float x;
    half <<= 16;
    memcpy(&x, &half, 4);
    return emulated_flush(x);
}

static void emulated_configure(const tile_shapes *shapes) {
    emulated_shapes = *shapes;
    memset(emulated_tiles, 0, sizeof emulated_tiles);
}

static void emulated_load(int t, const void *from, int64_t stride) {
    memset(emulated_tiles[t], 0, sizeof emulated_tiles[t]);
    for (int r = 0; r < emulated_shapes.rows[t]; r++)
        memcpy(emulated_tiles[t][r], (const char *)from + r * stride, emulated_shapes.bytes[t]);
}

static void emulated_store(int t, void *to, int64_t stride) {
    for (int r = 0; r < emulated_shapes.rows[t]; r++)
        memcpy((char *)to + r * stride, emulated_tiles[t][r], emulated_shapes.bytes[t]);
}

/* The first inputs of the pairs are summed separately from the second ones; then both sums are added
   (TDPBF16PS). */
static void emulated_product(int c, int a, int b) {
    for (int r = 0; r < emulated_shapes.rows[c]; r++)
        for (int n = 0; n < emulated_shapes.bytes[c] / 4; n++) {
            float first = 0.0f, second = 0.0f, sum;
            for (int k = 0; k < emulated_shapes.bytes[a] / 4; k++) {
                uint32_t x = emulated_tiles[a][r][k], y = emulated_tiles[b][k][n];
                first = emulated_flush(__builtin_fmaf(emulated_up(x & 0xffff), emulated_up(y & 0xffff), first));
                second = emulated_flush(__builtin_fmaf(emulated_up(x >> 16), emulated_up(y >> 16), second));
            }
            memcpy(&sum, &emulated_tiles[c][r][n], 4);
            sum = emulated_flush(emulated_flush(sum) + emulated_flush(first + second));
            memcpy(&emulated_tiles[c][r][n], &sum, 4);
        }
}

#define tile_configure(shapes) emulated_configure(shapes)
#define tile_zero(t) memset(emulated_tiles[t], 0, sizeof emulated_tiles[t])
#define tile_load(t, from, stride) emulated_load(t, from, stride)
#define tile_store(t, to, stride) emulated_store(t, to, stride)
#define tile_product(c, a, b) emulated_product(c, a, b)
#define tile_release() memset(&emulated_shapes, 0, sizeof emulated_shapes)

/* Return whether the system lets this process use tiles. */
static inline int tiles_granted(void) { return 1; }

#elif defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#define HAS_TILES 1
#include <immintrin.h>
#include <sys/syscall.h>
long syscall(long number, ...);

/* Not all compilers' intrinsics declare the memory that they read. */
#define memory_is_read(from) __asm__ volatile("" : : "r"(from) : "memory")
#define tile_configure(shapes) \
    do { \
        memory_is_read(shapes); \
        _tile_loadconfig(shapes); \
    } while (0)
#define tile_load(t, from, stride) \
    do { \
        memory_is_read(from); \
        _tile_loadd(t, from, stride); \
    } while (0)
#define tile_zero(t) _tile_zero(t)
#define tile_store(t, to, stride) _tile_stored(t, to, stride)
#define tile_product(c, a, b) _tile_dpbf16ps(c, a, b)
#define tile_release() _tile_release()

/* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA: 8 kB more per thread */
enum { ASK_FOR_STATE = 0x1023, TILE_DATA = 18 };
static inline int tiles_granted(void) { return syscall(SYS_arch_prctl, ASK_FOR_STATE, TILE_DATA) == 0; }

#else
#define HAS_TILES 0
#endif
#endif
