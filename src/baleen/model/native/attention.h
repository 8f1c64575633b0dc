// Causal attention of MLA's naive form, forward and backward, for training on CPUs.
//
// Shapes: B sequences, T tokens, H heads, N = qk_nope_head_dim, P = qk_rope_head_dim, D = N + P, V = v_head_dim.
// One (sequence, head) pair is one task: its operands are packed in fp32, rows padded to whole vectors (of transposes to
// one more, for rows a power of two apart would share a few sets of the first cache), and a block of queries at a time
// attends to the keys up to its own end, so that half of the square is never computed. Rows of scores are worked on in
// whole vectors; what is behind the last key a query sees becomes zero. What rope has
// turned is fp32 whatever the rest is.

#pragma once

#include <cmath>
#include <cstring>
#include <vector>

#include "common.h"
#include "matmul.h"

namespace {

constexpr int64_t BLOCK = 4 * ROWS;  // queries at a time

struct Strides {
    int64_t sequence, token, head;
    int64_t at(int64_t b, int64_t t, int64_t h) const { return b * sequence + t * token + h * head; }
};

// to[C, R] = from[R, C] transposed; R and C are multiples of WIDTH.
inline void transpose(const float *from, int64_t from_row, float *to, int64_t to_row, int64_t R, int64_t C) {
    for (int64_t r = 0; r < R; r += WIDTH)
        for (int64_t c = 0; c < C; c += WIDTH) {
            vec square[WIDTH];
            for (int64_t i = 0; i < WIDTH; i++) square[i] = *(const vec *)(from + (r + i) * from_row + c);
            transpose(square);
            for (int64_t i = 0; i < WIDTH; i++) *(vec *)(to + (c + i) * to_row + r) = square[i];
        }
}

// What one task reads, packed: rows of queries (scaled), keys and values; behind their ends zeros.
struct Packed {
    int64_t T, N, P, V, D, Tp, Dp, Vp;
    std::vector<float> q, k, v, kt, vt;

    Packed(int64_t T, int64_t N, int64_t P, int64_t V)
        : T(T), N(N), P(P), V(V), D(N + P), Tp(padded(T) + WIDTH), Dp(padded(N + P)), Vp(padded(V)), q(T * Dp),
          k(padded(T) * Dp), v(padded(T) * Vp), kt(Dp * Tp), vt(Vp * Tp) {}

    template <class X>
    void fill(const X *qn, const float *qr, const X *kv, const float *kr, const Strides *s, int64_t b, int64_t h, float scale) {
        for (int64_t t = 0; t < T; t++) {
            const X *query = qn + s[0].at(b, t, h), *pair = kv + s[2].at(b, t, h);
            const float *turned = qr + s[1].at(b, t, h), *key = kr + s[3].at(b, t, 0);
            for (int64_t i = 0; i < N; i++) q[t * Dp + i] = scale * widen(query[i]);
            for (int64_t i = 0; i < P; i++) q[t * Dp + N + i] = scale * turned[i];
            for (int64_t i = 0; i < N; i++) k[t * Dp + i] = widen(pair[i]);
            for (int64_t i = 0; i < P; i++) k[t * Dp + N + i] = key[i];
            for (int64_t i = 0; i < V; i++) v[t * Vp + i] = widen(pair[N + i]);
        }
        transpose(k.data(), Dp, kt.data(), Tp, padded(T), Dp);
    }

    void turn_values() { transpose(v.data(), Vp, vt.data(), Tp, padded(T), Vp); }
};

// strides: of q_nope, q_rope, kv, k_rope (whose heads are one). out [B, T, H, V]; lse [B, H, T]: log sum exp of scores.
template <class X>
void attention(int threads, const X *qn, const float *qr, const X *kv, const float *kr, const Strides *strides, X *out,
               float *lse, int64_t B, int64_t H, int64_t T, int64_t N, int64_t P, int64_t V, float scale) {
#pragma omp parallel num_threads(threads)
    if (Rows tasks = share(B * H); tasks.first < tasks.last) {
        Packed in(T, N, P, V);
        std::vector<float> scores(BLOCK * in.Tp), sums(BLOCK * in.Vp);
        for (int64_t task = tasks.first; task < tasks.last; task++) {
            int64_t b = task / H, h = task % H;
            in.fill(qn, qr, kv, kr, strides, b, h, scale);
            for (int64_t first = 0; first < T; first += BLOCK) {
                int64_t M = T - first < BLOCK ? T - first : BLOCK, keys = first + M;
                multiply(M, padded(keys), in.D, &in.q[first * in.Dp], in.Dp, 1, in.kt.data(), in.Tp, scores.data(), in.Tp,
                       false);
                for (int64_t m = 0; m < M; m++) {
                    float *s = &scores[m * in.Tp], top = -INFINITY, sum = 0;
                    int64_t seen = first + m + 1, whole = padded(seen);
                    for (int64_t j = seen; j < whole; j++) s[j] = -INFINITY;
#pragma omp simd reduction(max : top)
                    for (int64_t j = 0; j < whole; j++) top = s[j] > top ? s[j] : top;
#pragma omp simd reduction(+ : sum)
                    for (int64_t j = 0; j < whole; j++) sum += s[j] = fast_exp(s[j] - top);
                    float share = 1.0f / sum;
#pragma omp simd
                    for (int64_t j = 0; j < whole; j++) s[j] *= share;
                    for (int64_t j = seen; j < keys; j++) s[j] = 0;
                    lse[task * T + first + m] = top + std::log(sum);
                }
                multiply(M, in.Vp, keys, scores.data(), in.Tp, 1, in.v.data(), in.Vp, sums.data(), in.Vp, false);
                for (int64_t m = 0; m < M; m++)
                    for (int64_t i = 0; i < V; i++)
                        narrow(sums[m * in.Vp + i], out[((b * T + first + m) * H + h) * V + i]);
            }
        }
    }
}

// Gradients in the layouts [B, T, H, N], [B, T, H, P], [B, T, H, N + V] and [B, T, H, P]: the last is summed over the
// heads by the caller.
template <class X>
void attention_backward(int threads, const X *qn, const float *qr, const X *kv, const float *kr, const Strides *strides,
                        const X *out, const float *lse, const X *dout, X *dqn, float *dqr, X *dkv, float *dkr, int64_t B,
                        int64_t H, int64_t T, int64_t N, int64_t P, int64_t V, float scale) {
#pragma omp parallel num_threads(threads)
    if (Rows tasks = share(B * H); tasks.first < tasks.last) {
        Packed in(T, N, P, V);
        int64_t Tp = in.Tp, Dp = in.Dp, Vp = in.Vp;
        std::vector<float> probs(BLOCK * Tp), grads(BLOCK * Tp), go(T * Vp), dq(BLOCK * Dp), dk(T * Dp), dv(T * Vp);
        for (int64_t task = tasks.first; task < tasks.last; task++) {
            int64_t b = task / H, h = task % H;
            in.fill(qn, qr, kv, kr, strides, b, h, scale);
            in.turn_values();
            std::memset(dk.data(), 0, dk.size() * sizeof(float));
            std::memset(dv.data(), 0, dv.size() * sizeof(float));
            for (int64_t t = 0; t < T; t++)
                for (int64_t i = 0; i < V; i++) go[t * Vp + i] = widen(dout[((b * T + t) * H + h) * V + i]);
            for (int64_t first = 0; first < T; first += BLOCK) {
                int64_t M = T - first < BLOCK ? T - first : BLOCK, keys = first + M, wide = padded(keys);
                multiply(M, wide, in.D, &in.q[first * Dp], Dp, 1, in.kt.data(), Tp, probs.data(), Tp, false);
                multiply(M, wide, V, &go[first * Vp], Vp, 1, in.vt.data(), Tp, grads.data(), Tp, false);
                for (int64_t m = 0; m < M; m++) {
                    float *p = &probs[m * Tp], *g = &grads[m * Tp], l = lse[task * T + first + m], delta = 0;
                    const X *o = out + ((b * T + first + m) * H + h) * V;
#pragma omp simd reduction(+ : delta)
                    for (int64_t i = 0; i < V; i++) delta += widen(o[i]) * go[(first + m) * Vp + i];
                    int64_t seen = first + m + 1, whole = padded(seen);
#pragma omp simd
                    for (int64_t j = 0; j < whole; j++) {
                        p[j] = fast_exp(p[j] - l);
                        g[j] = p[j] * (g[j] - delta);
                    }
                    for (int64_t j = seen; j < keys; j++) p[j] = g[j] = 0;
                }
                multiply(keys, Vp, M, probs.data(), 1, Tp, &go[first * Vp], Vp, dv.data(), Vp, true);
                multiply(keys, Dp, M, grads.data(), 1, Tp, &in.q[first * Dp], Dp, dk.data(), Dp, true);
                multiply(M, Dp, keys, grads.data(), Tp, 1, in.k.data(), Dp, dq.data(), Dp, false);
                for (int64_t m = 0; m < M; m++) {
                    int64_t row = (b * T + first + m) * H + h;
                    for (int64_t i = 0; i < N; i++) narrow(scale * dq[m * Dp + i], dqn[row * N + i]);
                    for (int64_t i = 0; i < P; i++) narrow(scale * dq[m * Dp + N + i], dqr[row * P + i]);
                }
            }
            for (int64_t t = 0; t < T; t++) {
                int64_t row = (b * T + t) * H + h;
                for (int64_t i = 0; i < N; i++) narrow(dk[t * Dp + i], dkv[row * (N + V) + i]);
                for (int64_t i = 0; i < P; i++) narrow(dk[t * Dp + N + i], dkr[row * P + i]);
                for (int64_t i = 0; i < V; i++) narrow(dv[t * Vp + i], dkv[row * (N + V) + N + i]);
            }
        }
    }
}

}  // namespace
