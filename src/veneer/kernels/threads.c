/* Where the threads of a region run, and how long they wait awake. */
#define _GNU_SOURCE
#ifdef __linux__
#include <sched.h>
#endif

enum { LOOKS = 10000 };
int meeting_spins = LOOKS; /* looks of serving.h's meeting before it lets others have the processor */

/* Whether threads that meet let others have the processor at once; *before: whether they did. */
void meet_asleep(int asleep, int *before) {
    if (before) *before = meeting_spins == 0;
    meeting_spins = asleep ? 0 : LOOKS;
}

/* Every thread of a region of so many may run on these processors from now on. Does nothing without Linux's affinity. */
void stay(const int *processors, int n, int threads) {
#ifdef __linux__
    cpu_set_t set;
    CPU_ZERO(&set);
    for (int i = 0; i < n; i++)
        if (processors[i] < CPU_SETSIZE) CPU_SET(processors[i], &set);
#pragma omp parallel num_threads(threads)
    sched_setaffinity(0, sizeof set, &set);
#endif
}
