/* Affinity of the threads of a region, and how long they spin while waiting. */
#ifdef __linux__
#include <sys/syscall.h>
long syscall(long number, ...);
#endif

enum { LOOKS = 10000, WORD = 8 * sizeof(unsigned long), WORDS = 128 };
int meeting_spins = LOOKS; /* polls of serving.h's meeting before it yields the processor */

/* Set whether waiting threads yield the processor at once; *before: the previous setting. */
void meet_asleep(int asleep, int *before) {
    if (before) *before = meeting_spins == 0;
    meeting_spins = asleep ? 0 : LOOKS;
}

/* Let every thread of a region of `threads` run on these processors from now on. Does nothing without
   Linux's affinity. */
void stay(const int *processors, int n, int threads) {
#ifdef __linux__
    unsigned long set[WORDS] = {0};
    for (int i = 0; i < n; i++)
        if (processors[i] < (int)(WORD * WORDS)) set[processors[i] / WORD] |= 1ul << processors[i] % WORD;
#pragma omp parallel num_threads(threads)
    syscall(SYS_sched_setaffinity, 0, sizeof set, set);
#endif
}
