/* Shared by serving.c and decoder.c. Every thread of a parallel region, started by the caller, calls
   the functions named …_inside; such a function can return before all threads are done with it. */

#ifndef VENEER_SERVING_H
#define VENEER_SERVING_H

#include "vec.h"

#if HAS_VECTORS
#include <omp.h>
#include <sched.h>
#include <stdatomic.h>

typedef int64_t i64;

/* A barrier for the threads of a region; initially all zeros. OpenMP's barrier is not used: if a
   process has more threads in its pools than processors (one pool for the engine, one for the thread
   that loaded the base), libgomp puts a waiting thread to sleep at once, and waking it takes longer
   than the work between two barriers. */
typedef struct {
    atomic_int here, turn;
} meeting;

extern int meeting_spins;

static inline void relax(void) {
#if defined(__aarch64__)
    __asm__ volatile("yield");
#else
    _mm_pause();
#endif
}

static inline void meet(meeting *m) {
    int all = omp_get_num_threads(), turn = atomic_load_explicit(&m->turn, memory_order_relaxed);
    if (all == 1) return;
    if (atomic_fetch_add_explicit(&m->here, 1, memory_order_acq_rel) == all - 1) {
        atomic_store_explicit(&m->here, 0, memory_order_relaxed);
        atomic_store_explicit(&m->turn, turn + 1, memory_order_release);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&m->turn, memory_order_acquire) == turn; spins++)
        if (spins < meeting_spins) relax();
        else sched_yield(); /* another process or thread has the processor that the others need */
}

enum { THIN_RECORD = 17 }; /* numbers per segment of lora_rows */

/* a thread's part of 0 … n */
static inline void share(i64 n, i64 step, int t, int threads, i64 *from, i64 *to) {
    i64 steps = (n + step - 1) / step, per = (steps + threads - 1) / threads;
    *from = t * per * step < n ? t * per * step : n;
    *to = (t + 1) * per * step < n ? (t + 1) * per * step : n;
}

void thin_rows_inside(const bf16 *x, i64 in, bf16 *y, i64 ldy, const i64 *table, i64 nseg, const i64 *starts,
                      const i64 *rows, const float *strengths, factor *u, i64 ldu, meeting *m);

void turn_and_store_inside(bf16 *qkv, i64 heads, i64 kv, i64 d, const float *cs, const float *sn, const bf16 *qn,
                           const bf16 *kn, float eps, const i64 *positions, const i64 *slots, const i64 *starts, i64 nseq,
                           bf16 *K, bf16 *V, meeting *m);

void paged_attend_inside(const bf16 *q, i64 ldq, bf16 *out, i64 heads, i64 kv, i64 d, const i64 *positions,
                         const i64 *starts, i64 nseq, const i64 *tables, i64 ldt, const bf16 *K, const bf16 *V, float scale,
                         float cap, i64 window, i64 longest, int *failed);
#endif
#endif
