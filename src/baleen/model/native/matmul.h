// Matmuls at the rate of the machine, for training on CPUs. In fp32: MKL, which PyTorch multiplies by, takes the widest
// registers of one maker's processors alone, and knows nothing of groups. In bf16, summed in fp32, on processors that
// multiply its pairs: oneDNN makes a kernel for every number of rows.
//
// A strip of rows by a few panels of columns is one task, whichever thread takes it. A panel of b is packed so that the
// innermost loop reads whole vectors, and is cut in depth so that it stays in the first cache, the strip of a in the
// second. Every element is summed by one thread in the order of k: nothing depends on the number of threads.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <vector>

#include <omp.h>

#include "common.h"
#include "pack.h"
#include "tile.h"

namespace {

// c[M, N] = or += a[M, K] b[K, N]; the columns of c are neighbours.
template <class T> struct Product {
    Matrix<T> a, b;
    T *c;
    int64_t c_row, M, N, K;
};

// What a thread packs into, and where it adds up what is not fp32 in the end.
struct Room {
    float *panels, *strip, *sums;
    explicit Room(bool adds_up) {
        constexpr int64_t packed = PANELS * PANEL * DEPTH;
        panels = (float *)std::aligned_alloc(64, (packed + STRIP * DEPTH + adds_up * STRIP * WIDE) * sizeof(float));
        strip = panels + packed, sums = strip + STRIP * DEPTH;
        if (!panels) std::abort();  // out of memory
    }
    Room(const Room &) = delete;
    ~Room() { std::free(panels); }
};

// Rows [m, m + M) and columns [n, n + N) of a product.
template <class T> struct Task {
    const Product<T> *product;
    int64_t m, M, n, N;
};

// What a task multiplies at depth k.
struct Slice {
    Matrix<float> a, b;
    int64_t M, N, K;
    Slice(const Task<float> &t, int64_t k)
        : a(t.product->a.from(t.m, k)), b(t.product->b.from(k, t.n)), M(t.M), N(t.N), K(std::min(DEPTH, t.product->K - k)) {}
    bool packs_a() const { return a.row == 1 && a.col != 1; }
    int64_t width(int64_t j) const { return std::min(PANELS * PANEL, N - j); }  // of the panels from column j on
};

void work(const Task<float> &task, const Task<float> *next, bool add, const Room &room) {
    const Product<float> &p = *task.product;
    float *corner = p.c + task.m * p.c_row + task.n;
    if (p.K == 0 && !add)
        for (int64_t i = 0; i < task.M; i++) std::memset(corner + i * p.c_row, 0, task.N * sizeof(float));
    for (int64_t k = 0; k < p.K; k += DEPTH) {
        Slice now(task, k);
        Matrix<float> a = now.a;
        int64_t M = now.M, K = now.K, a_tile = ROWS * a.row;
        bool adds = add || k > 0;
        if (now.packs_a()) {
            pack_strip(a, M, K, room.strip);
            a = {room.strip, 1, ROWS};
            a_tile = ROWS * K;
        }
        Ahead ahead_a, ahead_b;
        for (int64_t j = 0; j < now.N; j += PANEL) {
            if (j % (PANELS * PANEL) == 0) {
                pack_panels(now.b.from(0, j), K, now.width(j), room.panels);
                int64_t tiles = (M / ROWS + 1) * up(now.width(j), PANEL), then = j + PANELS * PANEL;
                ahead_b = Ahead();
                if (then < now.N) ahead_b = Ahead(now.b.from(0, then), K, now.width(then), tiles);
                else if (k + DEPTH < p.K || next) {
                    Slice following = k + DEPTH < p.K ? Slice(task, k + DEPTH) : Slice(*next, 0);
                    ahead_b = Ahead(following.b, following.K, following.width(0), tiles);
                    if (following.packs_a()) ahead_a = Ahead(following.a, following.M, following.K, tiles);
                }
            }
            const float *panel = room.panels + j % (PANELS * PANEL) * K;
            int64_t width = std::min(PANEL, now.N - j);
            float *c = corner + j;
            if (width == PANEL)
                columns<2>(M, a.data, a_tile, a.row, a.col, panel, PANEL, c, p.c_row, K, adds, &ahead_a, &ahead_b);
            else if (width == WIDTH)
                columns<1>(M, a.data, a_tile, a.row, a.col, panel, PANEL, c, p.c_row, K, adds, &ahead_a, &ahead_b);
            else
                for (int64_t i = 0; i < M; i += ROWS) {  // by way of a tile that is wide enough
                    float sums[ROWS * PANEL] = {};
                    int64_t rows = std::min(ROWS, M - i);
                    for (int64_t r = 0; adds && r < rows; r++)
                        std::memcpy(sums + r * PANEL, c + (i + r) * p.c_row, width * sizeof(float));
                    columns<2>(rows, a.data + i / ROWS * a_tile, a_tile, a.row, a.col, panel, PANEL, sums, PANEL, K, adds,
                               &ahead_a, &ahead_b);
                    for (int64_t r = 0; r < rows; r++)
                        std::memcpy(c + (i + r) * p.c_row, sums + r * PANEL, width * sizeof(float));
                }
        }
    }
}

#ifdef __AVX512BF16__
void work(const Task<bf16> &task, const Task<bf16> *, bool add, const Room &room) {
    const Product<bf16> &p = *task.product;
    const auto &[_, m, M, n, N] = task;
    pair *panel = (pair *)room.panels, *strip = (pair *)room.strip;
    int64_t row = PANEL * up(N, PANEL);
    if (p.K == 0) std::memset(room.sums, 0, M * row * sizeof(float));
    for (int64_t k = 0; k < p.K; k += 2 * DEPTH) {
        int64_t K = std::min(2 * DEPTH, p.K - k), pairs = (K + 1) / 2;
        Matrix<bf16> a = {p.a.at(m, k), p.a.row, p.a.col};
        Matrix<pair> in_pairs = {(const pair *)a.data, a.row / 2, 1};  // as it lies, where pairs lie in it
        int64_t a_tile = ROWS * in_pairs.row;
        if (a.col != 1 || a.row % 2 || K % 2) {
            pack_strip(a, M, K, strip);
            in_pairs = a.row == 1 ? Matrix<pair>{strip, 1, ROWS} : Matrix<pair>{strip, pairs, 1};
            a_tile = ROWS * pairs;
        }
        for (int64_t j = 0; j < N; j += PANEL) {
            int64_t width = std::min(PANEL, N - j);
            pack_panel({p.b.at(k, n + j), p.b.row, p.b.col}, K, width, panel);
            float *c = room.sums + j;
            if (width > WIDTH)
                columns<2>(M, in_pairs.data, a_tile, in_pairs.row, in_pairs.col, panel, PANEL, c, row, pairs, k > 0);
            else columns<1>(M, in_pairs.data, a_tile, in_pairs.row, in_pairs.col, panel, PANEL, c, row, pairs, k > 0);
        }
    }
    for (int64_t i = 0; i < M; i++) {
        const float *sums = room.sums + i * row;
        bf16 *c = p.c + (m + i) * p.c_row + n;
        if (add)
#pragma omp simd
            for (int64_t j = 0; j < N; j++) narrow(widen(c[j]) + sums[j], c[j]);
        else
#pragma omp simd
            for (int64_t j = 0; j < N; j++) narrow(sums[j], c[j]);
    }
}
#endif

template <class T> void multiply_packed(int threads, const std::vector<Product<T>> &products, bool add) {
    // One product alone has as many parts for each thread: strips, or of few rows columns, as every strip packs them anew.
    bool alone = products.size() == 1;
    int64_t high = STRIP, wide = WIDE, team = alone ? threads : 1;
    auto parts = [&](int64_t of, int64_t most, int64_t least) {
        return std::max<int64_t>(1, std::min(team * up(of, team * most), of / least));
    };
    std::vector<Task<T>> tasks;
    auto cut = [&] {
        tasks.clear();
        for (const Product<T> &p : products) {
            int64_t strips = p.M > high ? parts(p.M, high, LOW) : 1;
            int64_t rows = ROWS * up(p.M, ROWS * strips);
            int64_t columns = PANEL * up(p.N, PANEL * (strips > 1 ? up(p.N, wide) : parts(p.N, wide, PANEL)));
            for (int64_t m = 0; m < p.M; m += rows)
                for (int64_t n = 0; n < p.N; n += columns)
                    tasks.push_back({&p, m, std::min(rows, p.M - m), n, std::min(columns, p.N - n)});
        }
        return (int64_t)tasks.size() >= (alone ? 1 : 2) * threads;  // enough for all to be busy
    };
    while (!cut() && high > LOW) (wide > PANEL ? wide : high) /= 2;
#pragma omp parallel num_threads(threads)
    {
        Room room(!std::is_same<T, float>::value);
#pragma omp for schedule(dynamic, 1)
        for (size_t t = 0; t < tasks.size(); t++) {
            work(tasks[t], t + threads < tasks.size() ? &tasks[t + threads] : nullptr, add, room);
        }
    }
}

// Rows of group e, x[counts[e], I], are multiplied by w[e], [O, I], transposed: y[counts[e], O].
template <class T>
void grouped_linear(int threads, const T *x, int64_t x_row, const T *w, T *y, const int64_t *counts, int64_t E,
                    int64_t I, int64_t O) {
    std::vector<Product<T>> products;
    for (int64_t e = 0, m = 0; e < E; m += counts[e++])
        products.push_back({{x + m * x_row, x_row, 1}, {w + e * O * I, 1, I}, y + m * O, O, counts[e], O, I});
    multiply_packed(threads, products, false);
}

// dx[counts[e], I] = dy[counts[e], O] w[e]
template <class T>
void grouped_linear_dx(int threads, const T *dy, const T *w, T *dx, const int64_t *counts, int64_t E, int64_t I,
                       int64_t O) {
    std::vector<Product<T>> products;
    for (int64_t e = 0, m = 0; e < E; m += counts[e++])
        products.push_back({{dy + m * O, O, 1}, {w + e * O * I, I, 1}, dx + m * I, I, counts[e], I, O});
    multiply_packed(threads, products, false);
}

// dw[e], [O, I] = or += dy[counts[e], O] transposed x[counts[e], I]
template <class T>
void grouped_linear_dw(int threads, const T *dy, const T *x, int64_t x_row, T *dw, const int64_t *counts,
                       int64_t add, int64_t E, int64_t I, int64_t O) {
    std::vector<Product<T>> products;
    for (int64_t e = 0, m = 0; e < E; m += counts[e++])
        products.push_back({{dy + m * O, 1, O}, {x + m * x_row, x_row, 1}, dw + e * O * I, I, O, I, counts[e]});
    multiply_packed(threads, products, add);
}

}  // namespace
