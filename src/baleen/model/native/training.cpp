// The memory-bound parts of a training step, each in one pass over its rows where PyTorch's operators take many; and
// causal attention (attention.h) and matmuls (matmul.h).
//
// Shapes: N rows, d their width, Z = vocab_size. Rows are contiguous inside and `stride` elements apart.
// Every one of `threads` takes one contiguous block of rows (of matmuls, tasks as they come), so that sums are added in
// the same order in every run.

#include <cmath>
#include <cstring>

#include "attention.h"
#include "common.h"
#include "matmul.h"

namespace {

constexpr int64_t TILE = 256;

template <class X, class Y>
void rms_norm(int threads, const X *x, int64_t stride, const float *w, Y *y, float *scale, int64_t N, int64_t d, float eps) {
#pragma omp parallel num_threads(threads)
    {
        Rows rows = share(N);
        for (int64_t n = rows.first; n < rows.last; n++) {
            const X *xn = x + n * stride;
            Y *yn = y + n * d;
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < d; i++) sum += widen(xn[i]) * widen(xn[i]);
            float s = scale[n] = 1.0f / std::sqrt(sum / float(d) + eps);
#pragma omp simd
            for (int64_t i = 0; i < d; i++) narrow(widen(xn[i]) * s * w[i], yn[i]);
        }
    }
}

// parts: [threads, d], zeros: the threads' shares of the weight's gradient, added up by the caller.
template <class X, class Y>
void rms_norm_backward(int threads, const Y *dy, const X *x, int64_t stride, const float *w, const float *scale, X *dx, float *parts,
                       int64_t N, int64_t d) {
#pragma omp parallel num_threads(threads)
    {
        Rows rows = share(N);
        float *dw = parts + omp_get_thread_num() * d;
        for (int64_t n = rows.first; n < rows.last; n++) {
            const X *xn = x + n * stride;
            const Y *gn = dy + n * d;
            X *on = dx + n * d;
            float s = scale[n], dot = 0;
#pragma omp simd reduction(+ : dot)
            for (int64_t i = 0; i < d; i++) {
                float gx = widen(gn[i]) * widen(xn[i]);
                dw[i] += gx * s;
                dot += gx * w[i];
            }
            float c = dot * s * s * s / float(d);
#pragma omp simd
            for (int64_t i = 0; i < d; i++) narrow(widen(gn[i]) * w[i] * s - widen(xn[i]) * c, on[i]);
        }
    }
}

template <class T>
void swiglu(int threads, const T *gate, const T *up, int64_t stride, T *out, int64_t N, int64_t d) {
#pragma omp parallel num_threads(threads)
    {
        Rows rows = share(N);
        for (int64_t n = rows.first; n < rows.last; n++) {
            const T *g = gate + n * stride, *u = up + n * stride;
            T *o = out + n * d;
#pragma omp simd
            for (int64_t i = 0; i < d; i++) {
                float v = widen(g[i]);
                narrow(v / (1.0f + fast_exp(-v)) * widen(u[i]), o[i]);
            }
        }
    }
}

template <class T>
void swiglu_backward(int threads, const T *dout, const T *gate, const T *up, int64_t stride, T *dgate, T *dup, int64_t dstride,
                     int64_t N, int64_t d) {
#pragma omp parallel num_threads(threads)
    {
        Rows rows = share(N);
        for (int64_t n = rows.first; n < rows.last; n++) {
            const T *o = dout + n * d, *g = gate + n * stride, *u = up + n * stride;
            T *dg = dgate + n * dstride, *du = dup + n * dstride;
#pragma omp simd
            for (int64_t i = 0; i < d; i++) {
                float v = widen(g[i]), grad = widen(o[i]), s = 1.0f / (1.0f + fast_exp(-v));
                narrow(grad * widen(u[i]) * s * (1.0f + v * (1.0f - s)), dg[i]);
                narrow(grad * v * s, du[i]);
            }
        }
    }
}

// loss[n] = log sum exp(logits[n]) - logits[n, target]; then, if `learns`, logits become weight * their own gradient.
// A row whose target is negative counts for nothing. room: [threads, Z].
template <class T>
void cross_entropy(int threads, T *logits, const int64_t *targets, float weight, float *loss, float *room, int learns, int64_t N,
                   int64_t Z) {
#pragma omp parallel num_threads(threads)
    {
        Rows rows = share(N);
        float *e = room + omp_get_thread_num() * Z;
        for (int64_t n = rows.first; n < rows.last; n++) {
            T *z = logits + n * Z;
            int64_t target = targets[n];
            if (target < 0) {
                loss[n] = 0;
                if (learns) std::memset(z, 0, Z * sizeof(T));
                continue;
            }
            float top = -INFINITY, sum = 0;
#pragma omp simd reduction(max : top)
            for (int64_t i = 0; i < Z; i++) top = widen(z[i]) > top ? widen(z[i]) : top;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < Z; i++) sum += e[i] = fast_exp(widen(z[i]) - top);
            loss[n] = std::log(sum) + top - widen(z[target]);
            if (!learns) continue;
            float factor = weight / sum;
            e[target] -= sum;
#pragma omp simd
            for (int64_t i = 0; i < Z; i++) narrow(e[i] * factor, z[i]);
        }
    }
}

// out[n] = sum over k of w[n, k] * y[slots[n, k]]; without w, of y[slots[n, k]].
template <class T>
void sum_rows(int threads, const T *y, const int64_t *slots, const float *w, T *out, int64_t N, int64_t K, int64_t d) {
#pragma omp parallel num_threads(threads)
    {
        Rows rows = share(N);
        float sum[TILE];
        for (int64_t n = rows.first; n < rows.last; n++)
            for (int64_t start = 0; start < d; start += TILE) {
                int64_t width = d - start < TILE ? d - start : TILE;
                for (int64_t i = 0; i < width; i++) sum[i] = 0;
                for (int64_t k = 0; k < K; k++) {
                    const T *row = y + slots[n * K + k] * d + start;
                    float weight = w ? w[n * K + k] : 1.0f;
#pragma omp simd
                    for (int64_t i = 0; i < width; i++) sum[i] += weight * widen(row[i]);
                }
#pragma omp simd
                for (int64_t i = 0; i < width; i++) narrow(sum[i], out[n * d + start + i]);
            }
    }
}

// The gradients of sum_rows with weights; rows of dy that are no slot stay as they are.
template <class T>
void sum_rows_backward(int threads, const T *dout, const T *y, const int64_t *slots, const float *w, T *dy, float *dw,
                       int64_t N, int64_t K, int64_t d) {
#pragma omp parallel num_threads(threads)
    {
        Rows rows = share(N);
        for (int64_t n = rows.first; n < rows.last; n++)
            for (int64_t k = 0; k < K; k++) {
                const T *grad = dout + n * d, *row = y + slots[n * K + k] * d;
                T *drow = dy + slots[n * K + k] * d;
                float weight = w[n * K + k], dot = 0;
#pragma omp simd reduction(+ : dot)
                for (int64_t i = 0; i < d; i++) {
                    dot += widen(grad[i]) * widen(row[i]);
                    narrow(weight * widen(grad[i]), drow[i]);
                }
                dw[n * K + k] = dot;
            }
    }
}

}  // namespace

// What Python finds: pointers to the kernels, by name and dtypes.
extern "C" {
auto *linear_float = grouped_linear<float>;
auto *linear_dx_float = grouped_linear_dx<float>;
auto *linear_dw_float = grouped_linear_dw<float>;
#ifdef __AVX512BF16__
auto *linear_bfloat16 = grouped_linear<bf16>;
auto *linear_dx_bfloat16 = grouped_linear_dx<bf16>;
auto *linear_dw_bfloat16 = grouped_linear_dw<bf16>;
#endif
auto *rms_norm_float_float = rms_norm<float, float>;
auto *rms_norm_float_bfloat16 = rms_norm<float, bf16>;
auto *rms_norm_bfloat16_bfloat16 = rms_norm<bf16, bf16>;
auto *rms_norm_backward_float_float = rms_norm_backward<float, float>;
auto *rms_norm_backward_float_bfloat16 = rms_norm_backward<float, bf16>;
auto *rms_norm_backward_bfloat16_bfloat16 = rms_norm_backward<bf16, bf16>;
auto *swiglu_float = swiglu<float>;
auto *swiglu_bfloat16 = swiglu<bf16>;
auto *swiglu_backward_float = swiglu_backward<float>;
auto *swiglu_backward_bfloat16 = swiglu_backward<bf16>;
auto *cross_entropy_float = cross_entropy<float>;
auto *cross_entropy_bfloat16 = cross_entropy<bf16>;
auto *sum_rows_float = sum_rows<float>;
auto *sum_rows_bfloat16 = sum_rows<bf16>;
auto *sum_rows_backward_float = sum_rows_backward<float>;
auto *sum_rows_backward_bfloat16 = sum_rows_backward<bf16>;
auto *attention_float = attention<float>;
auto *attention_bfloat16 = attention<bf16>;
auto *attention_backward_float = attention_backward<float>;
auto *attention_backward_bfloat16 = attention_backward<bf16>;
}
