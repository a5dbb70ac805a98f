/* The element-wise half of a training step in bfloat16, each as one pass over memory. Arithmetic is float32 inside and
   rounded once, to nearest even. Compiled on the user's machine by kernels/__init__.py where a C compiler exists; the same
   formulas in torch (core/fused.py, core/attention.py) are the reference and what runs elsewhere.

   Rows are shared out statically among `threads`, so a result does not depend on timing. Every pointer is to bfloat16
   (uint16_t) unless it says otherwise; `ld` is the distance between rows in elements. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bf16;

static inline float up(bf16 h) {
    uint32_t u = (uint32_t)h << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

static inline bf16 down(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return (bf16)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

/* e^x to about 2 units in the last place of float32; 0 below -87, and no overflow for the x <= 0 of a softmax. Cody-Waite
   reduction x = n ln2 + r, then a polynomial in r (the coefficients of Cephes expf). */
static inline float exp32(float x) {
    float clamped = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
    float n = __builtin_rintf(clamped * 1.44269504088896341f);
    float r = clamped - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float s;
    memcpy(&s, &bits, 4);
    float y = p * s;
    return x < -87.0f ? 0.0f : (x == x ? y : x);
}

/* y = w x / sqrt(mean x^2 + eps), row by row */
void rms_norm(const bf16 *x, const bf16 *w, bf16 *y, int64_t n, int64_t d, float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        const bf16 *xi = x + i * d;
        bf16 *yi = y + i * d;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < d; j++) sum += up(xi[j]) * up(xi[j]);
        float r = 1.0f / __builtin_sqrtf(sum / (float)d + eps);
#pragma omp simd
        for (int64_t j = 0; j < d; j++) yi[j] = down(up(xi[j]) * r * up(w[j]));
    }
}

/* dx = r (w g) - x r^3 mean(w g x) */
void rms_norm_backward(const bf16 *g, const bf16 *x, const bf16 *w, bf16 *dx, int64_t n, int64_t d, float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        const bf16 *xi = x + i * d, *gi = g + i * d;
        bf16 *di = dx + i * d;
        float sum = 0.0f, dot = 0.0f;
#pragma omp simd reduction(+ : sum, dot)
        for (int64_t j = 0; j < d; j++) {
            float xj = up(xi[j]);
            sum += xj * xj;
            dot += up(gi[j]) * up(w[j]) * xj;
        }
        float r = 1.0f / __builtin_sqrtf(sum / (float)d + eps);
        float c = r * r * r * dot / (float)d;
#pragma omp simd
        for (int64_t j = 0; j < d; j++) di[j] = down(up(gi[j]) * up(w[j]) * r - up(xi[j]) * c);
    }
}

/* h = silu(gate) up, from gate_up = [gate | up] of 2f columns */
void silu_gate(const bf16 *gate_up, bf16 *h, int64_t n, int64_t f, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        const bf16 *gi = gate_up + i * 2 * f, *ui = gi + f;
        bf16 *hi = h + i * f;
#pragma omp simd
        for (int64_t j = 0; j < f; j++) {
            float g = up(gi[j]);
            hi[j] = down(g / (1.0f + exp32(-g)) * up(ui[j]));
        }
    }
}

/* From dh: d = [d_gate | d_up], and h = silu(gate) up once more. */
void silu_gate_backward(const bf16 *dh, const bf16 *gate_up, bf16 *d, bf16 *h, int64_t n, int64_t f, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        const bf16 *gi = gate_up + i * 2 * f, *ui = gi + f, *di = dh + i * f;
        bf16 *dg = d + i * 2 * f, *du = dg + f, *hi = h + i * f;
#pragma omp simd
        for (int64_t j = 0; j < f; j++) {
            float g = up(gi[j]), u = up(ui[j]), e = up(di[j]);
            float s = 1.0f / (1.0f + exp32(-g)), a = g * s;
            hi[j] = down(a * u);
            du[j] = down(e * a);
            dg[j] = down(e * u * (s + a * (1.0f - s)));
        }
    }
}

/* Heads of tokens that lie flat, (token, head, dim) with `ld` between tokens, into the layout that attention multiplies:
   (row, kv head, time, query head of that kv head, dim). tokens[i] is a flat token, slots[i] = row * length + time its
   place. cos, sin: (token, dim/2) turn each head in halves by +theta; NULL copies. Everything is multiplied by scale. */
void gather_heads(const bf16 *x, int64_t ld, const bf16 *cs, const bf16 *sn, const int64_t *tokens, const int64_t *slots,
                  int64_t count, int64_t length, int64_t kv, int64_t per, int64_t dim, float scale, bf16 *out, int threads) {
    int64_t half = dim / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < count; i++) {
        int64_t t = tokens[i], row = slots[i] / length, time = slots[i] % length;
        const bf16 *c = cs ? cs + t * half : 0, *s = sn ? sn + t * half : 0;
        for (int64_t h = 0; h < kv * per; h++) {
            const bf16 *a = x + t * ld + h * dim, *b = a + half;
            bf16 *o = out + ((((row * kv + h / per) * length + time) * per) + h % per) * dim, *p = o + half;
            if (c) {
#pragma omp simd
                for (int64_t j = 0; j < half; j++) {
                    float cj = up(c[j]), sj = up(s[j]), aj = up(a[j]), bj = up(b[j]);
                    o[j] = down((aj * cj - bj * sj) * scale);
                    p[j] = down((bj * cj + aj * sj) * scale);
                }
            } else if (scale == 1.0f) {
                memcpy(o, a, dim * sizeof(bf16));
            } else {
#pragma omp simd
                for (int64_t j = 0; j < dim; j++) o[j] = down(up(a[j]) * scale);
            }
        }
    }
}

/* The transpose of gather_heads: back to flat tokens, turned by -theta. */
void scatter_heads(const bf16 *g, int64_t ld, const bf16 *cs, const bf16 *sn, const int64_t *tokens, const int64_t *slots,
                   int64_t count, int64_t length, int64_t kv, int64_t per, int64_t dim, float scale, bf16 *out, int threads) {
    int64_t half = dim / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < count; i++) {
        int64_t t = tokens[i], row = slots[i] / length, time = slots[i] % length;
        const bf16 *c = cs ? cs + t * half : 0, *s = sn ? sn + t * half : 0;
        for (int64_t h = 0; h < kv * per; h++) {
            const bf16 *a = g + ((((row * kv + h / per) * length + time) * per) + h % per) * dim, *b = a + half;
            bf16 *o = out + t * ld + h * dim, *p = o + half;
            if (c) {
#pragma omp simd
                for (int64_t j = 0; j < half; j++) {
                    float cj = up(c[j]), sj = up(s[j]), aj = up(a[j]), bj = up(b[j]);
                    o[j] = down((aj * cj + bj * sj) * scale);
                    p[j] = down((bj * cj - aj * sj) * scale);
                }
            } else if (scale == 1.0f) {
                memcpy(o, a, dim * sizeof(bf16));
            } else {
#pragma omp simd
                for (int64_t j = 0; j < dim; j++) o[j] = down(up(a[j]) * scale);
            }
        }
    }
}

/* In place, scores to probabilities: scores (b, queries * per, keys), query t = q0 + row / per, key k0 + column. A query
   sees keys max(0, t - window + 1) ... t; elsewhere the probability is 0. window <= 0: no window. */
void causal_softmax(bf16 *scores, int64_t b, int64_t queries, int64_t per, int64_t keys, int64_t q0, int64_t k0, int64_t window,
                    int threads) {
    int64_t rows = queries * per;
#pragma omp parallel num_threads(threads)
    {
        float *e = malloc(sizeof(float) * (size_t)keys);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < b * rows; i++) {
            bf16 *s = scores + i * keys;
            int64_t t = q0 + (i % rows) / per;
            int64_t lo = window > 0 && t - window + 1 > k0 ? t - window + 1 - k0 : 0, hi = t - k0 + 1;
            float top = -__builtin_inff(), sum = 0.0f;
#pragma omp simd reduction(max : top)
            for (int64_t j = lo; j < hi; j++) {
                float v = up(s[j]);
                top = v > top ? v : top;
            }
#pragma omp simd reduction(+ : sum)
            for (int64_t j = lo; j < hi; j++) {
                e[j] = exp32(up(s[j]) - top);
                sum += e[j];
            }
            float r = 1.0f / sum;
            for (int64_t j = 0; j < lo; j++) s[j] = 0;
#pragma omp simd
            for (int64_t j = lo; j < hi; j++) s[j] = down(e[j] * r);
            for (int64_t j = hi; j < keys; j++) s[j] = 0;
        }
        free(e);
    }
}

/* In place, ds = p (dp - sum p dp), over rows of `keys` */
void softmax_backward(const bf16 *p, bf16 *dp, int64_t rows, int64_t keys, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        const bf16 *pi = p + i * keys;
        bf16 *di = dp + i * keys;
        float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
        for (int64_t j = 0; j < keys; j++) dot += up(pi[j]) * up(di[j]);
#pragma omp simd
        for (int64_t j = 0; j < keys; j++) di[j] = down(up(pi[j]) * (up(di[j]) - dot));
    }
}

/* nll[i] = logsumexp(logits[i]) - logits[i][target] (float32); if grad, logits become softmax - onehot in place. */
void token_nll(bf16 *logits, const int64_t *targets, float *nll, int64_t n, int64_t v, int grad, int threads) {
#pragma omp parallel num_threads(threads)
    {
        float *e = malloc(sizeof(float) * (size_t)v);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n; i++) {
            bf16 *x = logits + i * v;
            float top = -__builtin_inff(), sum = 0.0f, hit = up(x[targets[i]]);
#pragma omp simd reduction(max : top)
            for (int64_t j = 0; j < v; j++) {
                float y = up(x[j]);
                top = y > top ? y : top;
            }
#pragma omp simd reduction(+ : sum)
            for (int64_t j = 0; j < v; j++) {
                e[j] = exp32(up(x[j]) - top);
                sum += e[j];
            }
            nll[i] = __builtin_logf(sum) + top - hit;
            if (!grad) continue;
            float r = 1.0f / sum;
            e[targets[i]] -= sum;
#pragma omp simd
            for (int64_t j = 0; j < v; j++) x[j] = down(e[j] * r);
        }
        free(e);
    }
}
