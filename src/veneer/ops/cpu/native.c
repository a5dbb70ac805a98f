/* Element-wise operations of a training step in bfloat16, each in one pass over memory. Arithmetic is
   float32 inside and rounded once, to nearest even. ops/cpu/build.py compiles this file on the user's
   machine if a C compiler exists; the same formulas in torch (veneer.ops) are the reference and run
   elsewhere.

   Rows are divided statically among `threads`, so a result does not depend on timing. Every pointer is to
   bfloat16 (uint16_t) unless stated otherwise; `ld` is the distance between rows in elements. */

#include "bf16.h"
#include <omp.h>

/* For parallel regions that the calling thread starts, torch's included: both use one OpenMP. */
void use_threads(int n) { omp_set_num_threads(n); }

static inline int64_t padded_to(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

static void *room(int64_t bytes) { return aligned_room(bytes); }

/* y = w x / sqrt(mean x^2 + eps), row by row */
void rms_norm(const bf16 *x, const bf16 *w, bf16 *y, int64_t n, int64_t d, float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) norm_row(x + i * d, w, y + i * d, d, eps);
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

/* Compilers vectorize loops over both 16 and 32 bits poorly: rows are widened, processed as floats in
   the first-level cache, and narrowed again. */
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)

static inline void widen(const bf16 *x, float add, float *y, int64_t n) { /* y = x + add */
    int64_t j = 0;
    for (; j + 16 <= n; j += 16) {
        __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(x + j))), 16);
        _mm512_storeu_ps(y + j, _mm512_add_ps(_mm512_castsi512_ps(wide), _mm512_set1_ps(add)));
    }
    for (; j < n; j++) y[j] = up(x[j]) + add;
}

static inline void narrow_to(const float *x, bf16 *y, int64_t n) {
    int64_t j = 0;
    for (; j + 16 <= n; j += 16)
        _mm256_storeu_si256((__m256i *)(y + j), narrow16(_mm512_loadu_ps(x + j)));
    for (; j < n; j++) y[j] = down(x[j]);
}

static inline void logistic(const float *x, float *y, int64_t n) { /* y = 1 / (1 + e^-x) */
    __m512 one = _mm512_set1_ps(1.0f);
    int64_t j = 0;
    for (; j + 16 <= n; j += 16) {
        __m512 e = exp512(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_loadu_ps(x + j)));
        _mm512_storeu_ps(y + j, _mm512_div_ps(one, _mm512_add_ps(one, e)));
    }
    for (; j < n; j++) y[j] = 1.0f / (1.0f + exp32(-x[j]));
}
#else
static inline void widen(const bf16 *x, float add, float *y, int64_t n) {
#pragma omp simd
    for (int64_t j = 0; j < n; j++) y[j] = up(x[j]) + add;
}

static inline void narrow_to(const float *x, bf16 *y, int64_t n) {
#pragma omp simd
    for (int64_t j = 0; j < n; j++) y[j] = down(x[j]);
}

static inline void logistic(const float *x, float *y, int64_t n) {
#pragma omp simd
    for (int64_t j = 0; j < n; j++) y[j] = 1.0f / (1.0f + exp32(-x[j]));
}
#endif

static inline float mean_of(const float *x, int64_t n) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; j++) sum += x[j];
    return sum / (float)n;
}

/* x -= mean; 1 / sqrt(var + eps) */
static inline float centre(float *x, int64_t n, float mean, float eps) {
    float var = 0.0f;
#pragma omp simd reduction(+ : var)
    for (int64_t j = 0; j < n; j++) {
        x[j] -= mean;
        var += x[j] * x[j];
    }
    return 1.0f / __builtin_sqrtf(var / (float)n + eps);
}

/* x (n, groups, per, places), shift (n, groups, per) or NULL, w and b (groups, per). y = silu(z), with
   z the norm of x + shift over per and places, times w, plus b. */
int norm_silu(const bf16 *x, const bf16 *shift, const bf16 *w, const bf16 *b, bf16 *y, int64_t n, int64_t groups, int64_t per,
               int64_t places, float eps, int threads) {
    int failed = DONE;
#pragma omp parallel num_threads(threads)
    {
        int64_t all = per * places;
        float *z = room(all * 4), *t = room(places * 4);
        int there = all_there(z && t, &failed);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n * groups; i++) {
            if (!there) continue;
            for (int64_t c = 0; c < per; c++)
                widen(x + i * all + c * places, shift ? up(shift[i * per + c]) : 0.0f, z + c * places, places);
            float r = centre(z, all, mean_of(z, all), eps);
            for (int64_t c = 0; c < per; c++) {
                float m = r * up(w[i % groups * per + c]), a = up(b[i % groups * per + c]), *v = z + c * places;
#pragma omp simd
                for (int64_t j = 0; j < places; j++) v[j] = v[j] * m + a;
                logistic(v, t, places);
#pragma omp simd
                for (int64_t j = 0; j < places; j++) v[j] *= t[j];
            }
            narrow_to(z, y + i * all, all);
        }
        free(z), free(t);
    }
    return failed;
}

/* With e the gradient of the norm and z the norm: dx = r (e - mean e - z mean(e z)) */
int norm_silu_backward(const bf16 *g, const bf16 *x, const bf16 *shift, const bf16 *w, const bf16 *b, bf16 *dx, int64_t n,
                        int64_t groups, int64_t per, int64_t places, float eps, int threads) {
    int failed = DONE;
#pragma omp parallel num_threads(threads)
    {
        int64_t all = per * places;
        float *e = room(all * 4), *c = room(all * 4), *v = room(places * 4), *t = room(places * 4);
        int there = all_there(e && c && v && t, &failed);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n * groups; i++) {
            if (!there) continue;
            widen(g + i * all, 0.0f, e, all);
            for (int64_t k = 0; k < per; k++)
                widen(x + i * all + k * places, shift ? up(shift[i * per + k]) : 0.0f, c + k * places, places);
            float r = centre(c, all, mean_of(c, all), eps), sum = 0.0f, dot = 0.0f;
            for (int64_t k = 0; k < per; k++) {
                float m = up(w[i % groups * per + k]), a = up(b[i % groups * per + k]), *ek = e + k * places, *ck = c + k * places;
#pragma omp simd
                for (int64_t j = 0; j < places; j++) v[j] = ck[j] * r * m + a;
                logistic(v, t, places);
#pragma omp simd
                for (int64_t j = 0; j < places; j++) ek[j] *= t[j] * (1.0f + v[j] * (1.0f - t[j])) * m;
            }
#pragma omp simd reduction(+ : sum, dot)
            for (int64_t j = 0; j < all; j++) {
                sum += e[j];
                dot += e[j] * c[j];
            }
            sum /= (float)all, dot *= r * r / (float)all;
#pragma omp simd
            for (int64_t j = 0; j < all; j++) e[j] = r * (e[j] - sum - c[j] * dot);
            narrow_to(e, dx + i * all, all);
        }
        free(e), free(c), free(v), free(t);
    }
    return failed;
}

/* y = x scale if hash(seed, place) >= least, else 0. The hash is Wellons' lowbias32 with the seed's
   words added before its two products, so that the masks of two seeds are not permutations of each
   other. */
void dropped(const bf16 *x, bf16 *y, int64_t n, uint32_t low, uint32_t high, uint32_t least, float scale, int threads) {
#pragma omp parallel for simd num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        uint32_t h = (uint32_t)i ^ low;
        h = (h ^ (h >> 16)) * 0x7feb352dU + high;
        h = (h ^ (h >> 15)) * 0x846ca68bU;
        h ^= h >> 16;
        y[i] = h >= least ? down(up(x[i]) * scale) : 0;
    }
}

/* y = gain x + b, row by row; b can be NULL */
void dora_scale(const bf16 *x, const float *gain, const bf16 *b, bf16 *y, int64_t n, int64_t d, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        const bf16 *xi = x + i * d;
        bf16 *yi = y + i * d;
#pragma omp simd
        for (int64_t j = 0; j < d; j++) yi[j] = down(up(xi[j]) * gain[j] + (b ? up(b[j]) : 0.0f));
    }
}

/* dx = gain g, and d_gain = the sum of g x over the rows: a few columns at a time, so that the order is
   fixed. */
void dora_scale_backward(
    const bf16 *g, const bf16 *x, const float *gain, bf16 *dx, float *d_gain, int64_t n, int64_t d, int threads
) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t first = 0; first < d; first += 128) {
        int64_t width = d - first < 128 ? d - first : 128;
        const float *a = gain + first;
        float sum[128] = {0.0f};
        for (int64_t i = 0; i < n; i++) {
            const bf16 *gi = g + i * d + first, *xi = x + i * d + first;
            bf16 *di = dx + i * d + first;
#pragma omp simd
            for (int64_t j = 0; j < width; j++) {
                float gj = up(gi[j]);
                sum[j] += gj * up(xi[j]);
                di[j] = down(gj * a[j]);
            }
        }
        for (int64_t j = 0; j < width; j++) d_gain[first + j] = sum[j];
    }
}

/* h = silu(gate) up, from gate_up = [gate | up] of 2f columns */
void silu_gate(const bf16 *gate_up, bf16 *h, int64_t n, int64_t f, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) silu_gate_row(gate_up + i * 2 * f, gate_up + i * 2 * f + f, h + i * f, f);
}

/* From dh: d = [d_gate | d_up], and h = silu(gate) up recomputed. */
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

/* Phi(x), the normal distribution, and its derivative in *density: erf by Abramowitz and Stegun 7.1.26,
   within 1.5e-7. */
static inline float normal(float x, float *density) {
    float z = __builtin_fabsf(x) * 0.70710678118654752f, t = 1.0f / (1.0f + 0.3275911f * z), e = exp32(-z * z);
    float p = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    float tail = 0.5f * p * e;
    *density = e * 0.39894228040143268f;
    return x < 0.0f ? tail : 1.0f - tail;
}

/* h = up gelu(gate) from [up | gate], rows of 2f; gelu(x) = x Phi(x) */
void geglu(const bf16 *both, bf16 *h, int64_t n, int64_t f, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        const bf16 *ui = both + i * 2 * f, *gi = ui + f;
        bf16 *hi = h + i * f;
#pragma omp simd
        for (int64_t j = 0; j < f; j++) {
            float g = up(gi[j]), density;
            hi[j] = down(up(ui[j]) * g * normal(g, &density));
        }
    }
}

/* From dh: d = [d_up | d_gate] */
void geglu_backward(const bf16 *dh, const bf16 *both, bf16 *d, int64_t n, int64_t f, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        const bf16 *ui = both + i * 2 * f, *gi = ui + f, *di = dh + i * f;
        bf16 *du = d + i * 2 * f, *dg = du + f;
#pragma omp simd
        for (int64_t j = 0; j < f; j++) {
            float g = up(gi[j]), e = up(di[j]), density, below = normal(g, &density);
            du[j] = down(e * g * below);
            dg[j] = down(e * up(ui[j]) * (below + g * density));
        }
    }
}

/* y = x / (1 + e^-2v), v = sqrt(2/pi) (x + 0.044715 x^3): the tanh approximation of gelu, because (1 +
   tanh v) / 2 is this logistic. */
void gelu_tanh(const bf16 *x, bf16 *y, int64_t n, int threads) {
#pragma omp parallel for simd num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        float a = up(x[i]), v = 0.79788456080286536f * (a + 0.044715f * a * a * a);
        y[i] = down(a / (1.0f + exp32(-2.0f * v)));
    }
}

void gelu_tanh_backward(const bf16 *g, const bf16 *x, bf16 *dx, int64_t n, int threads) {
#pragma omp parallel for simd num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        float a = up(x[i]), v = 0.79788456080286536f * (a + 0.044715f * a * a * a);
        float s = 1.0f / (1.0f + exp32(-2.0f * v)), slope = 1.59576912160573072f * (1.0f + 0.134145f * a * a);
        dx[i] = down(up(g[i]) * (s + a * s * (1.0f - s) * slope));
    }
}

/* In place, scores to probabilities: scores (b, queries * per, keys), query t = q0 + row / per, key k0
   + column. A query sees keys max(0, t - window + 1) ... t; other probabilities are 0. window <= 0: no
   window. */
int causal_softmax(bf16 *scores, int64_t b, int64_t queries, int64_t per, int64_t keys, int64_t q0, int64_t k0, int64_t window,
                    int threads) {
    int64_t rows = queries * per;
    int failed = DONE;
#pragma omp parallel num_threads(threads)
    {
        float *e = room(keys * 4);
        int there = all_there(e != NULL, &failed);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < b * rows; i++) {
            if (!there) continue;
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
    return failed;
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

/* nll[i] = logsumexp(logits[i]) - logits[i][target] (float32); with grad, logits become softmax -
   onehot in place. A row whose target is IGNORED has nll 0 and no gradient. Any other target outside 0
   ... v - 1 is an error, and nothing is written. `half`: logits are bf16, else float32. `right`, if not
   NULL: whether no logit is above the target's. Partial sums of PART terms are float32, their sum is
   double: over a vocabulary, float32 would lose its last digits. */
enum { IGNORED = -100, PART = 1024 };
int token_nll(
    void *logits, int half, const int64_t *targets, float *nll, uint8_t *right, int64_t n, int64_t v, int grad, int threads
) {
    int failed = DONE;
    for (int64_t i = 0; i < n; i++)
        if (targets[i] != IGNORED && (targets[i] < 0 || targets[i] >= v)) return BAD_TARGET;
#pragma omp parallel num_threads(threads)
    {
        float *e = room(v * 4);
        int there = all_there(e != NULL, &failed);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n; i++) {
            if (!there) continue;
            bf16 *narrow = (bf16 *)logits + i * v;
            float *wide = (float *)logits + i * v;
            if (targets[i] == IGNORED) {
                nll[i] = 0.0f;
                if (right) right[i] = 0;
                if (grad) memset(half ? (void *)narrow : (void *)wide, 0, (size_t)v * (half ? 2 : 4));
                continue;
            }
            if (half)
                for (int64_t j = 0; j < v; j++) e[j] = up(narrow[j]);
            else memcpy(e, wide, (size_t)v * 4);
            float top = -__builtin_inff(), hit = e[targets[i]];
#pragma omp simd reduction(max : top)
            for (int64_t j = 0; j < v; j++) top = e[j] > top ? e[j] : top;
            if (right) right[i] = hit >= top;
            double sum = 0.0;
            for (int64_t from = 0; from < v; from += PART) {
                int64_t end = from + PART < v ? from + PART : v;
                float part = 0.0f;
#pragma omp simd reduction(+ : part)
                for (int64_t j = from; j < end; j++) {
                    e[j] = exp32(e[j] - top);
                    part += e[j];
                }
                sum += part;
            }
            nll[i] = (float)(__builtin_log(sum) + top - hit);
            if (!grad) continue;
            float r = (float)(1.0 / sum);
            e[targets[i]] = (float)(e[targets[i]] - sum);
            if (half)
                for (int64_t j = 0; j < v; j++) narrow[j] = down(e[j] * r);
            else
                for (int64_t j = 0; j < v; j++) wide[j] = e[j] * r;
        }
        free(e);
    }
    return failed;
}

/* Full attention: o = softmax(scale q k^T) v, lse = log sum exp(scale q k^T). Neither scores nor
   probabilities are kept: they are computed in tiles that stay in the second-level cache, and
   recomputed in backward (arXiv 2205.14135, 2307.08691). All products use `product`, whose B is packed
   so that the pairs of 16 columns along the summed dimension are adjacent, as vdpbf16ps requires. q, k,
   v, out and their gradients are (n, tokens, heads, d) in any layout with contiguous d: `at` has the
   other three strides of each, in elements, in the order of the pointers. d is even; tiles are padded
   with zeros beyond it. */
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
enum { TILE = 4, ROWS = 192, PANEL = 64, KEYS = 256, DEPTH = 256 };
#define LOG2E 1.44269504088896341f

const int has_products = 1;

/* A cell of a: a pair of bf16, or the first number of the pair in float32. The second number then is
   DEPTH * TILE cells after the first. */
#if BF16_PRODUCTS
typedef uint32_t cell;
#define ACCUMULATE(s, a, y) s = dot_pairs(s, _mm512_set1_epi32((int)*(a)), y)
#else
typedef float cell;
#define ACCUMULATE(s, a, y) \
    s = _mm512_fmadd_ps(_mm512_set1_ps((a)[DEPTH * TILE]), odd_of(y), _mm512_fmadd_ps(_mm512_set1_ps(*(a)), even_of(y), s))
#endif

/* C (4, 16 * n), n = 1 ... 4: c[r][.] (+)= sum over p of a[r * rs + p * ps] . b[p * ldb + .]; a and b
   are pairs of bf16. */
#define PRODUCT(n)                                                                                                            \
    static void product##n(const cell *a, int64_t rs, int64_t ps, const uint32_t *b, int64_t ldb, int64_t pairs, float *c,     \
                           int64_t ldc, int add) {                                                                            \
        __m512 s[TILE][n];                                                                                                    \
        for (int r = 0; r < TILE; r++)                                                                                        \
            for (int j = 0; j < n; j++) s[r][j] = add ? _mm512_loadu_ps(c + r * ldc + 16 * j) : _mm512_setzero_ps();          \
        for (int64_t p = 0; p < pairs; p++) {                                                                                 \
            __m512i y[n];                                                                                                     \
            for (int j = 0; j < n; j++) y[j] = _mm512_loadu_si512(b + p * ldb + 16 * j);                                      \
            for (int r = 0; r < TILE; r++)                                                                                    \
                for (int j = 0; j < n; j++) ACCUMULATE(s[r][j], a + r * rs + p * ps, y[j]);                                   \
        }                                                                                                                     \
        for (int r = 0; r < TILE; r++)                                                                                        \
            for (int j = 0; j < n; j++) _mm512_storeu_ps(c + r * ldc + 16 * j, s[r][j]);                                      \
    }
PRODUCT(1)
PRODUCT(2)
PRODUCT(3)
PRODUCT(4)

static void product_strip(const cell *x, int64_t rs, int64_t ps, const uint32_t *y, int64_t ldb, int64_t pairs, float *z,
                          int64_t ldc, int64_t left, int add) {
    if (left >= 64) product4(x, rs, ps, y, ldb, pairs, z, ldc, add);
    else if (left == 48) product3(x, rs, ps, y, ldb, pairs, z, ldc, add);
    else if (left == 32) product2(x, rs, ps, y, ldb, pairs, z, ldc, add);
    else product1(x, rs, ps, y, ldb, pairs, z, ldc, add);
}

/* The same for any number of rows (a multiple of 4) and columns (a multiple of 16). */
static void product(const uint32_t *a, int64_t rs, int64_t ps, const uint32_t *b, int64_t ldb, int64_t pairs, float *c,
                    int64_t ldc, int64_t rows, int64_t columns, int add) {
#if BF16_PRODUCTS
    for (int64_t j = 0; j < columns; j += 64)
        for (int64_t r = 0; r < rows; r += TILE)
            product_strip(a + r * rs, rs, ps, b + j, ldb, pairs, c + r * ldc + j, ldc, columns - j, add);
#else
    /* Four rows are widened once, and multiplied by all columns. */
    float wide[2 * DEPTH * TILE];
    for (int64_t r = 0; r < rows; r += TILE)
        for (int64_t from = 0; from < pairs; from += DEPTH) {
            int64_t some = pairs - from < DEPTH ? pairs - from : DEPTH, wrs = ps == 1 ? DEPTH : 1, wps = ps == 1 ? 1 : TILE;
            for (int64_t i = 0; i < TILE; i++) {
                const uint32_t *x = a + (r + i) * rs + from * ps;
                int64_t p = 0;
                for (; ps == 1 && p + 16 <= some; p += 16) {
                    __m512i both = _mm512_loadu_si512(x + p);
                    _mm512_storeu_ps(wide + i * DEPTH + p, even_of(both));
                    _mm512_storeu_ps(wide + i * DEPTH + p + DEPTH * TILE, odd_of(both));
                }
                for (; p < some; p++) {
                    wide[i * wrs + p * wps] = up((bf16)x[p * ps]);
                    wide[i * wrs + p * wps + DEPTH * TILE] = up((bf16)(x[p * ps] >> 16));
                }
            }
            for (int64_t j = 0; j < columns; j += 64)
                product_strip(wide, wrs, wps, b + from * ldb + j, ldb, some, c + r * ldc + j, ldc, columns - j, add || from);
        }
#endif
}

/* n rows of x -> panels of 64 rows, each (D / 2, 64) pairs along d, zero past n and d. For products
   over d. In the last panel, only the columns that `product` reads, a multiple of 16, are written. */
static void pack_columns(const bf16 *x, int64_t ld, int64_t n, int64_t d, int64_t D, uint32_t *out) {
    for (int64_t at = 0; at < n; at += PANEL) {
        uint32_t *panel = out + at * (D / 2);
        int64_t real = n - at < PANEL ? n - at : PANEL, wide = padded_to(real, 16);
        for (int64_t p = 0; p < D / 2; p++) {
            int64_t i = 0;
            if (2 * p < d)
                for (; i < real; i++) memcpy(panel + p * PANEL + i, x + (at + i) * ld + 2 * p, 4);
            for (; i < wide; i++) panel[p * PANEL + i] = 0;
        }
    }
}

/* n rows of x -> (padded / 2, D) pairs along n, zero past n and d; `padded` is even. For products over rows. */
static void pack_rows(const bf16 *x, int64_t ld, int64_t n, int64_t padded, int64_t d, int64_t D, uint32_t *out) {
    for (int64_t i = 0; i < padded; i += 2) {
        const bf16 *a = x + i * ld, *b = a + ld;
        uint32_t *o = out + i / 2 * D;
        int64_t j = 0;
        if (i + 1 < n)
            for (; j < d; j++) o[j] = (uint32_t)a[j] | (uint32_t)b[j] << 16;
        else if (i < n)
            for (; j < d; j++) o[j] = a[j];
        for (; j < D; j++) o[j] = 0;
    }
}

static void hide(float *s, int64_t rows, int64_t ld, int64_t from, int64_t to) { /* columns without a key */
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = from; j < to; j++) s[r * ld + j] = -__builtin_inff();
}

static void rows_of(const bf16 *x, int64_t ld, int64_t n, int64_t padded, int64_t d, int64_t D, bf16 *out) {
    for (int64_t r = 0; r < padded; r++) { /* zero past n and d */
        int64_t real = r < n ? d : 0;
        memcpy(out + r * D, x + r * ld, real * sizeof(bf16));
        memset(out + r * D + real, 0, (D - real) * sizeof(bf16));
    }
}

static void rows_to(const float *x, int64_t D, float by, int64_t n, int64_t d, bf16 *out, int64_t ld) {
    for (int64_t r = 0; r < n; r++)
#pragma omp simd
        for (int64_t j = 0; j < d; j++) out[r * ld + j] = down(x[r * D + j] * by);
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* q (n, S, heads, d), k, v (n, T, heads, d) -> out like q, lse (n, heads, S) float32 */
int attend(const bf16 *q, const bf16 *k, const bf16 *v, bf16 *out, float *lse, const int64_t *at, int64_t n, int64_t heads,
            int64_t S, int64_t T, int64_t d, float scale, int threads) {
    int64_t D = padded_to(d, 16), P = padded_to(T, PANEL);
    int failed = DONE;
#pragma omp parallel num_threads(threads)
    {
        uint32_t *kd = room(P * D * 2), *vk = room(P * D * 2);
        bf16 *rows = room(ROWS * D * 2), *p = room(ROWS * KEYS * 2);
        float *s = room(ROWS * KEYS * 4), *o = room(ROWS * D * 4), top[ROWS], sum[ROWS];
        int there = all_there(kd && vk && rows && p && s && o, &failed);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n * heads; i++) {
            if (!there) continue;
            int64_t b = i / heads, h = i % heads;
            const bf16 *qh = q + b * at[0] + h * at[2], *kh = k + b * at[3] + h * at[5], *vh = v + b * at[6] + h * at[8];
            bf16 *oh = out + b * at[9] + h * at[11];
            pack_columns(kh, at[4], T, d, D, kd);
            pack_rows(vh, at[7], T, padded_to(T, 16), d, D, vk);
            for (int64_t first = 0; first < S; first += ROWS) {
                int64_t real = least(ROWS, S - first), padded = padded_to(real, TILE);
                rows_of(qh + first * at[1], at[1], real, padded, d, D, rows);
                memset(o, 0, padded * D * 4);
                for (int r = 0; r < padded; r++) top[r] = -__builtin_inff(), sum[r] = 0.0f;
                for (int64_t key = 0; key < T; key += KEYS) {
                    int64_t keys = least(KEYS, T - key), wide = padded_to(keys, 16);
                    for (int64_t j = 0; j < wide; j += PANEL)
                        product((const uint32_t *)rows, D / 2, 1, kd + (key + j) * (D / 2), PANEL, D / 2, s + j, KEYS, padded,
                                least(PANEL, wide - j), 0);
                    hide(s, padded, KEYS, keys, wide);
                    for (int r = 0; r < padded; r++) {
                        float *x = s + r * KEYS;
                        __m512 most = _mm512_set1_ps(-__builtin_inff());
                        for (int64_t j = 0; j < wide; j += 16) most = _mm512_max_ps(most, _mm512_loadu_ps(x + j));
                        float high = _mm512_reduce_max_ps(most) * scale * LOG2E;
                        float was = top[r], now = high > was ? high : was;
                        __m512 shift = _mm512_set1_ps(now), by = _mm512_set1_ps(scale * LOG2E), total = _mm512_setzero_ps();
                        for (int64_t j = 0; j < wide; j += 16) {
                            __m512 e = exp2_near(_mm512_fmsub_ps(_mm512_loadu_ps(x + j), by, shift));
                            total = _mm512_add_ps(total, e);
                            _mm256_storeu_si256((__m256i *)(p + r * KEYS + j), narrow16(e));
                        }
                        float less = was == now ? 1.0f : exp32((was - now) / LOG2E);
                        sum[r] = sum[r] * less + _mm512_reduce_add_ps(total);
                        top[r] = now;
                        if (less != 1.0f && key > 0)
                            for (int64_t j = 0; j < D; j++) o[r * D + j] *= less;
                    }
                    product((const uint32_t *)p, KEYS / 2, 1, vk + key / 2 * D, D, wide / 2, o, D, padded, D, 1);
                }
                for (int64_t r = 0; r < real; r++) {
                    rows_to(o + r * D, D, 1.0f / sum[r], 1, d, oh + (first + r) * at[10], 0);
                    lse[i * S + first + r] = top[r] / LOG2E + __builtin_logf(sum[r]);
                }
            }
        }
        free(kd), free(vk), free(rows), free(p), free(s), free(o);
    }
    return failed;
}

/* With g the gradient of out: dv = p^T g, ds = scale p (g v^T - sum over d of g out), dq = ds k, dk = ds^T q. */
int attend_backward(const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *out, const bf16 *g, bf16 *dq, bf16 *dk, bf16 *dv,
                     const float *lse, const int64_t *at, int64_t n, int64_t heads, int64_t S, int64_t T, int64_t d, float scale,
                     int threads) {
    int64_t D = padded_to(d, 16), P = padded_to(T, PANEL), Q = padded_to(S, TILE);
    int failed = DONE;
#pragma omp parallel num_threads(threads)
    {
        uint32_t *kd = room(P * D * 2), *vd = room(P * D * 2), *kk = room(P * D * 2), *qq = room(Q * D * 2), *gg = room(Q * D * 2);
        uint32_t *pt = room(ROWS * KEYS * 2), *st = room(ROWS * KEYS * 2);
        bf16 *x = room(ROWS * D * 2), *y = room(ROWS * D * 2), *ds = room(ROWS * KEYS * 2);
        float *s = room(TILE * PANEL * 4), *t = room(TILE * PANEL * 4), *dot = room(Q * 4);
        float *sq = room(Q * D * 4), *sk = room(KEYS * D * 4), *sv = room(KEYS * D * 4);
        int there = kd && vd && kk && qq && gg && pt && st && x && y && ds && s && t && dot && sq && sk && sv;
        all_there(there, &failed);
        uint16_t order[32]; /* the order of narrow_two's output, as pairs */
        for (int e = 0; e < 32; e++) order[e] = (uint16_t)(e / 2 + e % 2 * 16);
        __m512i pairs = _mm512_loadu_si512(order);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n * heads; i++) {
            if (!there) continue;
            int64_t b = i / heads, h = i % heads;
            const bf16 *qh = q + b * at[0] + h * at[2], *kh = k + b * at[3] + h * at[5], *vh = v + b * at[6] + h * at[8];
            const bf16 *oh = out + b * at[9] + h * at[11], *gh = g + b * at[12] + h * at[14];
            pack_columns(kh, at[4], T, d, D, kd);
            pack_columns(vh, at[7], T, d, D, vd);
            pack_rows(kh, at[4], T, padded_to(T, 16), d, D, kk);
            pack_rows(qh, at[1], S, Q, d, D, qq);
            pack_rows(gh, at[13], S, Q, d, D, gg);
            for (int64_t r = 0; r < S; r++) {
                const bf16 *a = gh + r * at[13], *c = oh + r * at[10];
                float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
                for (int64_t j = 0; j < d; j++) sum += up(a[j]) * up(c[j]);
                dot[r] = sum;
            }
            memset(sq, 0, Q * D * 4);
            for (int64_t key = 0; key < T; key += KEYS) {
                int64_t keys = least(KEYS, T - key), wide = padded_to(keys, 16);
                memset(sk, 0, wide * D * 4);
                memset(sv, 0, wide * D * 4);
                for (int64_t first = 0; first < S; first += ROWS) {
                    int64_t real = least(ROWS, S - first), padded = padded_to(real, TILE);
                    rows_of(qh + first * at[1], at[1], real, padded, d, D, x);
                    rows_of(gh + first * at[13], at[13], real, padded, d, D, y);
                    __m512 by = _mm512_set1_ps(scale * LOG2E);
                    for (int64_t from = 0; from < wide; from += PANEL) {
                        int64_t panel = (key + from) * (D / 2), some = least(PANEL, wide - from);
                        for (int r = 0; r < padded; r += TILE) {
                            const uint32_t *xr = (const uint32_t *)(x + r * D), *yr = (const uint32_t *)(y + r * D);
                            product(xr, D / 2, 1, kd + panel, PANEL, D / 2, s, PANEL, TILE, some, 0);
                            product(yr, D / 2, 1, vd + panel, PANEL, D / 2, t, PANEL, TILE, some, 0);
                            hide(s, TILE, PANEL, least(PANEL, keys - from), some);
                            for (int two = 0; two < TILE; two += 2) {
                                __m512 shift[2], mean[2];
                                for (int e = 0; e < 2; e++) { /* a row past the last has probability 0 */
                                    int64_t at = r + two + e, real_row = at < real;
                                    shift[e] = _mm512_set1_ps(real_row ? lse[i * S + first + at] * LOG2E : __builtin_inff());
                                    mean[e] = _mm512_set1_ps(real_row ? dot[first + at] : 0.0f);
                                }
                                int64_t row = (r + two) * KEYS + from, pair = (r + two) / 2 * KEYS + from;
                                for (int64_t j = 0; j < some; j += 16) {
                                    __m512 pr[2], dr[2];
                                    for (int e = 0; e < 2; e++) {
                                        int64_t c = (two + e) * PANEL + j;
                                        pr[e] = exp2_near(_mm512_fmsub_ps(_mm512_load_ps(s + c), by, shift[e]));
                                        dr[e] = _mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(t + c), mean[e]), pr[e]);
                                    }
                                    __m512i both = narrow_two(dr[0], dr[1]);
                                    _mm256_storeu_si256((__m256i *)(ds + row + j), _mm512_castsi512_si256(both));
                                    _mm256_storeu_si256((__m256i *)(ds + row + KEYS + j), _mm512_extracti64x4_epi64(both, 1));
                                    _mm512_storeu_si512(st + pair + j, _mm512_permutexvar_epi16(pairs, both));
                                    both = _mm512_permutexvar_epi16(pairs, narrow_two(pr[0], pr[1]));
                                    _mm512_storeu_si512(pt + pair + j, both);
                                }
                            }
                        }
                    }
                    product(pt, 1, KEYS, gg + first / 2 * D, D, padded / 2, sv, D, wide, D, 1);
                    product(st, 1, KEYS, qq + first / 2 * D, D, padded / 2, sk, D, wide, D, 1);
                    product((const uint32_t *)ds, KEYS / 2, 1, kk + key / 2 * D, D, wide / 2, sq + first * D, D, padded, D, 1);
                }
                rows_to(sk, D, scale, keys, d, dk + b * at[18] + key * at[19] + h * at[20], at[19]);
                rows_to(sv, D, 1.0f, keys, d, dv + b * at[21] + key * at[22] + h * at[23], at[22]);
            }
            rows_to(sq, D, scale, S, d, dq + b * at[15] + h * at[17], at[16]);
        }
        free(kd), free(vd), free(kk), free(qq), free(gg), free(pt), free(st), free(x), free(y), free(ds);
        free(s), free(t), free(dot), free(sq), free(sk), free(sv);
    }
    return failed;
}

/* Low-rank products of joined projections. Each pair has its own columns first ... last - 1 of the
   output, all multiples of 16; ranks in u and du are padded to 16, pair after pair, R in total. A
   (rank, in) and B (last - first, rank) are float32: they are rounded to bf16 when packed, B after
   scaling. */
typedef struct {
    const float *A, *B;
    int64_t first, last, rank;
    float scale;
} pair;

static inline uint32_t two(float a, float b) { return (uint32_t)down(a) | (uint32_t)down(b) << 16; }

static int64_t padded_ranks(const pair *pairs, int count) {
    int64_t R = 0;
    for (int i = 0; i < count; i++) R += padded_to(pairs[i].rank, 16);
    return R;
}

/* x (rows, columns) float32 -> (columns / 2, ld) pairs along the columns, x's rows adjacent; zero up to
   `padded` rows */
static void pack_down(const float *x, int64_t rows, int64_t padded, int64_t columns, int64_t odd, float by, uint32_t *out,
                      int64_t ld) {
    for (int64_t r = 0; r < padded; r++)
        for (int64_t p = 0; p < odd / 2; p++) {
            float a = r < rows && 2 * p < columns ? x[r * columns + 2 * p] : 0.0f;
            float b = r < rows && 2 * p + 1 < columns ? x[r * columns + 2 * p + 1] : 0.0f;
            out[p * ld + r] = two(a * by, b * by);
        }
}

/* x (rows, columns) float32 -> (padded / 2, ld) pairs along the rows; zero up to `padded` rows and
   `wide` columns */
static void pack_along(const float *x, int64_t rows, int64_t padded, int64_t columns, int64_t wide, float by, uint32_t *out,
                       int64_t ld) {
    for (int64_t r = 0; r < padded; r += 2)
        for (int64_t j = 0; j < wide; j++) {
            float a = r < rows && j < columns ? x[r * columns + j] : 0.0f;
            float b = r + 1 < rows && j < columns ? x[(r + 1) * columns + j] : 0.0f;
            out[r / 2 * ld + j] = two(a * by, b * by);
        }
}

/* y[r][.] += c[r][.] */
static void add_rows(const float *c, int64_t rows, int64_t columns, bf16 *y, int64_t ld) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < columns; j += 16) {
            __m256i *to = (__m256i *)(y + r * ld + j);
            __m512i was = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(to)), 16);
            __m512 sum = _mm512_add_ps(_mm512_castsi512_ps(was), _mm512_loadu_ps(c + r * columns + j));
            _mm256_storeu_si256(to, narrow16(sum));
        }
}

/* Rows first ... of x (n, ld) for `product`: x itself, or a copy if fewer than a tile remain. */
static const uint32_t *tile_rows(const bf16 *x, int64_t first, int64_t real, int64_t padded, int64_t ld, bf16 *copy) {
    if (real == padded) return (const uint32_t *)(x + first * ld);
    rows_of(x + first * ld, ld, real, padded, ld, ld, copy);
    return (const uint32_t *)copy;
}

/* u = x A^T, and y += s u B^T on each pair's columns. x (n, in), y (n, out), u (n, R). */
int lora_forward(const pair *pairs, int count, const bf16 *x, bf16 *y, bf16 *u, int64_t n, int64_t in, int64_t out, int threads) {
    int64_t R = padded_ranks(pairs, count), at = 0, cells = 0;
    /* more than B needs if pairs have separate columns */
    uint32_t *A = room(in * R * 2), *B = room(R * out * 2);
    int failed = DONE;
    if (!all_there(A && B, &failed)) return free(A), free(B), failed;
    for (int i = 0; i < count; i++) {
        const pair *p = pairs + i;
        int64_t padded = padded_to(p->rank, 16), wide = p->last - p->first;
        pack_down(p->A, p->rank, padded, in, in, 1.0f, A + at, R);
        pack_down(p->B, wide, wide, p->rank, padded, p->scale, B + cells, wide);
        at += padded, cells += padded / 2 * wide;
    }
#pragma omp parallel num_threads(threads)
    {
        bf16 *copy = room(TILE * in * 2), *thin = room(ROWS * R * 2);
        float *c = room(ROWS * (R > KEYS ? R : KEYS) * 4);
        int there = all_there(copy && thin && c, &failed);
#pragma omp for schedule(static)
        for (int64_t first = 0; first < n; first += ROWS) {
            if (!there) continue;
            int64_t real = least(ROWS, n - first), whole = real / TILE * TILE, padded = padded_to(real, TILE);
            product((const uint32_t *)(x + first * in), in / 2, 1, A, R, in / 2, c, R, whole, R, 0);
            if (whole < real) {
                const uint32_t *last = tile_rows(x, first + whole, real - whole, TILE, in, copy);
                product(last, in / 2, 1, A, R, in / 2, c + whole * R, R, TILE, R, 0);
            }
            narrow_to(c, thin, padded * R);
            memcpy(u + first * R, thin, real * R * sizeof(bf16));
            const uint32_t *b = B;
            int64_t start = 0;
            for (int i = 0; i < count; i++) {
                int64_t rank = padded_to(pairs[i].rank, 16), wide = pairs[i].last - pairs[i].first;
                for (int64_t j = 0; j < wide; j += KEYS) {
                    int64_t some = least(KEYS, wide - j);
                    product((const uint32_t *)(thin + start), R / 2, 1, b + j, wide, rank / 2, c, some, padded, some, 0);
                    add_rows(c, real, some, y + first * out + pairs[i].first + j, out);
                }
                start += rank, b += rank / 2 * wide;
            }
        }
        free(copy), free(thin), free(c);
    }
    free(A), free(B);
    return failed;
}

/* du = s g B, and dx += du A unless dx is NULL. g (n, out), du (n, R), dx (n, in). */
int lora_backward(const pair *pairs, int count, const bf16 *g, bf16 *du, bf16 *dx, int64_t n, int64_t in, int64_t out,
                  int threads) {
    int64_t R = padded_ranks(pairs, count), at = 0, cells = 0;
    uint32_t *A = room(in * R * 2), *B = room(R * out * 2);
    int failed = DONE;
    if (!all_there(A && B, &failed)) return free(A), free(B), failed;
    for (int i = 0; i < count; i++) {
        const pair *p = pairs + i;
        int64_t padded = padded_to(p->rank, 16), wide = p->last - p->first;
        pack_along(p->A, p->rank, padded, in, in, 1.0f, A + at / 2 * in, in);
        pack_along(p->B, wide, wide, p->rank, padded, p->scale, B + cells, padded);
        at += padded, cells += padded * wide / 2;
    }
#pragma omp parallel num_threads(threads)
    {
        bf16 *copy = room(ROWS * out * 2), *thin = room(ROWS * R * 2);
        float *c = room(ROWS * (R > KEYS ? R : KEYS) * 4);
        int there = all_there(copy && thin && c, &failed);
#pragma omp for schedule(static)
        for (int64_t first = 0; first < n; first += ROWS) {
            if (!there) continue;
            int64_t real = least(ROWS, n - first), padded = padded_to(real, TILE), start = 0;
            const uint32_t *rows = tile_rows(g, first, real, padded, out, copy), *b = B;
            for (int i = 0; i < count; i++) {
                int64_t rank = padded_to(pairs[i].rank, 16), wide = pairs[i].last - pairs[i].first;
                product(rows + pairs[i].first / 2, out / 2, 1, b, rank, wide / 2, c + start, R, padded, rank, 0);
                start += rank, b += rank * wide / 2;
            }
            narrow_to(c, thin, padded * R);
            memcpy(du + first * R, thin, real * R * sizeof(bf16));
            for (int64_t j = 0; dx && j < in; j += KEYS) {
                int64_t some = least(KEYS, in - j);
                product((const uint32_t *)thin, R / 2, 1, A + j, in, R / 2, c, some, padded, some, 0);
                add_rows(c, real, some, dx + first * in + j, in);
            }
        }
        free(copy), free(thin), free(c);
    }
    free(A), free(B);
    return failed;
}

/* dA[i] = du^T x and dB[i] = s g^T u on each pair's rows and columns, float32. Divided by columns of x
   and g, so that no sum depends on the number of threads. */
int lora_weight_gradients(const pair *pairs, int count, const bf16 *g, const bf16 *x, const bf16 *u, const bf16 *du, float **dA,
                    float **dB, int64_t n, int64_t in, int64_t out, int threads) {
    enum { DEEP = 128 };
    int64_t R = padded_ranks(pairs, count), even = padded_to(n, 2), of_x = padded_to(in, PANEL) / PANEL, panels = of_x;
    uint32_t *pu = room(even * R * 2), *pdu = room(even * R * 2);
    int failed = DONE;
    if (!all_there(pu && pdu, &failed)) return free(pu), free(pdu), failed;
    pack_rows(u, R, n, even, R, R, pu);
    pack_rows(du, R, n, even, R, R, pdu);
    for (int i = 0; i < count; i++) panels += padded_to(pairs[i].last - pairs[i].first, PANEL) / PANEL;
#pragma omp parallel num_threads(threads)
    {
        uint32_t *packed = room(DEEP / 2 * PANEL * 4);
        float *c = room((R > PANEL ? R : PANEL) * PANEL * 4);
        int there = all_there(packed && c, &failed);
#pragma omp for schedule(static)
        for (int64_t item = 0; item < panels; item++) {
            if (!there) continue;
            int i = 0;
            int64_t start = 0, panel = item - of_x;
            if (item >= of_x) /* the pair that has these columns of g, and where its rank starts in u */
                for (; panel >= padded_to(pairs[i].last - pairs[i].first, PANEL) / PANEL; i++) {
                    panel -= padded_to(pairs[i].last - pairs[i].first, PANEL) / PANEL;
                    start += padded_to(pairs[i].rank, 16);
                }
            int of_g = item >= of_x;
            int64_t j = (of_g ? panel : item) * PANEL, ld = of_g ? out : in;
            int64_t some = least(PANEL, (of_g ? pairs[i].last - pairs[i].first : in) - j);
            int64_t rows = of_g ? padded_to(pairs[i].rank, 16) : R;
            const bf16 *from = of_g ? g + pairs[i].first + j : x + j;
            const uint32_t *a = of_g ? pu + start : pdu;
            for (int64_t at = 0; at < n; at += DEEP) {
                int64_t real = least(DEEP, n - at), padded = padded_to(real, 2);
                pack_rows(from + at * ld, ld, real, padded, some, some, packed);
                product(a + at / 2 * R, 1, R, packed, some, padded / 2, c, PANEL, rows, some, at > 0);
            }
            if (of_g) {
                for (int64_t col = 0; col < some; col++)
                    for (int64_t r = 0; r < pairs[i].rank; r++)
                        dB[i][(j + col) * pairs[i].rank + r] = c[r * PANEL + col] * pairs[i].scale;
            } else {
                for (int64_t k = 0; k < count; start += padded_to(pairs[k++].rank, 16))
                    for (int64_t r = 0; r < pairs[k].rank; r++)
                        memcpy(dA[k] + r * in + j, c + (start + r) * PANEL, some * sizeof(float));
            }
        }
        free(packed), free(c);
    }
    free(pu), free(pdu);
    return failed;
}
#else
const int has_products = 0;
#endif
