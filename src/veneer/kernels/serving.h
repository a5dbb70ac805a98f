/* What serving.c and decoder.c share. Functions named …_inside are called by every thread of a parallel region that the
   caller has begun; unless it says so, one ends before all threads are done with it. */

#ifndef VENEER_SERVING_H
#define VENEER_SERVING_H

#include "bf16.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <omp.h>

typedef int64_t i64;

enum { THIN_RECORD = 17 }; /* numbers that thin_rows has of a segment */

static inline __m512bh pairs(const void *p) { return (__m512bh)_mm512_loadu_si512(p); }

static inline __m512bh both(uint32_t pair) { return (__m512bh)_mm512_set1_epi32((int)pair); }

static inline void share(i64 n, i64 step, int t, int threads, i64 *from, i64 *to) { /* a thread's part of 0 … n */
    i64 steps = (n + step - 1) / step, per = (steps + threads - 1) / threads;
    *from = t * per * step < n ? t * per * step : n;
    *to = (t + 1) * per * step < n ? (t + 1) * per * step : n;
}

void thin_rows_inside(const bf16 *x, i64 in, bf16 *y, i64 ldy, const i64 *table, i64 nseg, const i64 *starts,
                      const i64 *rows, const float *strengths, bf16 *u, i64 ldu);

/* All threads are done when it ends. */
void turn_and_store_inside(bf16 *qkv, i64 heads, i64 kv, i64 d, const float *cs, const float *sn, const bf16 *qn,
                           const bf16 *kn, float eps, const i64 *positions, const i64 *slots, const i64 *starts, i64 nseq,
                           bf16 *K, bf16 *V);

/* All threads are done when it ends. */
void paged_attend_inside(const bf16 *q, i64 ldq, bf16 *out, i64 heads, i64 kv, i64 d, const i64 *positions,
                         const i64 *starts, i64 nseq, const i64 *tables, i64 ldt, const bf16 *K, const bf16 *V, float scale,
                         float cap, i64 window, i64 longest);
#endif
#endif
