/* Where the threads of a region run, and how long they wait awake. */
#ifdef __linux__
#include <sys/syscall.h>
long syscall(long number, ...);
#endif

enum { LOOKS = 10000, WORD = 8 * sizeof(unsigned long), WORDS = 128 };
int meeting_spins = LOOKS; /* looks of serving.h's meeting before it lets others have the processor */

/* Whether threads that meet let others have the processor at once; *before: whether they did. */
void meet_asleep(int asleep, int *before) {
    if (before) *before = meeting_spins == 0;
    meeting_spins = asleep ? 0 : LOOKS;
}

/* Every thread of a region of so many may run on these processors from now on. Does nothing without Linux's affinity. */
void stay(const int *processors, int n, int threads) {
#ifdef __linux__
    unsigned long set[WORDS] = {0};
    for (int i = 0; i < n; i++)
        if (processors[i] < (int)(WORD * WORDS)) set[processors[i] / WORD] |= 1ul << processors[i] % WORD;
#pragma omp parallel num_threads(threads)
    syscall(SYS_sched_setaffinity, 0, sizeof set, set);
#endif
}
