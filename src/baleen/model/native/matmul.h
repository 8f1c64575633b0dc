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
#include <utility>
#include <vector>

#include <omp.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "common.h"

namespace {

#ifdef __AVX512F__
constexpr int64_t WIDTH = 16, ROWS = 8, STRIP = 256;  // floats in a vector; rows of a tile, whose sums fit the registers
#else
constexpr int64_t WIDTH = 8, ROWS = 6, STRIP = 228;
#endif
typedef float vec __attribute__((vector_size(WIDTH * sizeof(float)), aligned(4), may_alias));
constexpr int64_t PANEL = 2 * WIDTH, PANELS = 4, WIDE = 16 * PANEL, DEPTH = 256;
static_assert(STRIP % ROWS == 0);

inline int64_t padded(int64_t n) { return (n + WIDTH - 1) / WIDTH * WIDTH; }

// A step of the innermost loop multiplies by one float, or by two bf16 that are neighbours in a sum.
inline vec plus_product(vec sum, const float *a, vec b) { return sum + *a * b; }
#ifdef __AVX512BF16__
struct __attribute__((aligned(2), may_alias)) pair {
    bf16 even, odd;
};
inline vec plus_product(vec sum, const pair *a, vec b) {
    float both;
    std::memcpy(&both, a, 4);
    // Around the intrinsic GCC 12 moves the sums through the stack: 250 GFLOP/s instead of 370.
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(_mm512_set1_ps(both)), "v"(b));
    return sum;
}
#endif

// For Zen 3 GCC 12 reads b again for every row of a tile: 60 GFLOP/s of a core's 95 instead of 90.
inline vec in_register(vec b) {
#if defined(__AVX__) && !defined(__AVX512F__)
    asm("" : "+x"(b));
#endif
    return b;
}

// c[R, C * WIDTH] = or += a[R, K] b[K, C * WIDTH], of floats or of pairs. Not inlined: every stride has its register.
template <int64_t R, int64_t C, class E>
[[gnu::noinline]] void tile(const E *a, int64_t a_row, int64_t a_col, const E *b, int64_t b_row, float *c, int64_t c_row,
                            int64_t K, bool add) {
    vec sums[R][C];
    for (int64_t r = 0; r < R; r++)
        for (int64_t j = 0; j < C; j++) sums[r][j] = add ? *(const vec *)(c + r * c_row + j * WIDTH) : vec{};
    for (int64_t k = 0; k < K; k++) {
        vec bk[C];
        for (int64_t j = 0; j < C; j++) bk[j] = in_register(*(const vec *)(b + k * b_row + j * WIDTH));
        for (int64_t r = 0; r < R; r++)
            for (int64_t j = 0; j < C; j++) sums[r][j] = plus_product(sums[r][j], a + r * a_row + k * a_col, bk[j]);
    }
    for (int64_t r = 0; r < R; r++)
        for (int64_t j = 0; j < C; j++) *(vec *)(c + r * c_row + j * WIDTH) = sums[r][j];
}

template <int64_t C, class E, int64_t... LESS>
inline void last_rows(int64_t R, const E *a, int64_t a_row, int64_t a_col, const E *b, int64_t b_row, float *c, int64_t c_row,
                      int64_t K, bool add, std::integer_sequence<int64_t, LESS...>) {
    ((R == LESS + 1 ? tile<LESS + 1, C>(a, a_row, a_col, b, b_row, c, c_row, K, add) : (void)0), ...);
}

template <class T> struct Matrix {
    const T *data;
    int64_t row, col;  // how far its rows and its columns are apart
    const T *at(int64_t i, int64_t j) const { return data + i * row + j * col; }
    Matrix from(int64_t i, int64_t j) const { return {at(i, j), row, col}; }
};

// Memory that is packed next, called into the second cache a few lines before each tile: or packing would wait for it.
struct Ahead {
    const char *at = nullptr;
    int64_t row = 0, lines = 0, rows = 0, line = 0, each = 0;  // bytes between rows; lines of a row; the next; of a tile

    Ahead() = default;
    Ahead(const Matrix<float> &x, int64_t M, int64_t N, int64_t tiles) : at((const char *)x.data) {
        bool across = x.row == 1;
        row = (across ? x.col : x.row) * sizeof(float), rows = across ? N : M;
        lines = ((across ? M : N) * sizeof(float) + 63) / 64, each = rows * lines / std::max<int64_t>(tiles, 1) + 1;
    }

    void some() {
        for (int64_t i = 0; i < each && rows > 0; i++) {
            __builtin_prefetch(at + line * 64, 0, 2);
            if (++line == lines) line = 0, rows--, at += row;
        }
    }
};

// Tiles of ROWS rows, those of a `a_tile` apart, and what is left. Where a tile is written, its lines are asked for before.
template <int64_t C, class E>
inline void columns(int64_t M, const E *a, int64_t a_tile, int64_t a_row, int64_t a_col, const E *b, int64_t b_row, float *c,
                    int64_t c_row, int64_t K, bool add, Ahead *ahead_a = nullptr, Ahead *ahead_b = nullptr) {
    for (; M >= ROWS; M -= ROWS, a += a_tile, c += ROWS * c_row) {
        if (ahead_a) ahead_a->some(), ahead_b->some();
        for (int64_t r = ROWS; r < std::min(M, 2 * ROWS); r++) __builtin_prefetch(c + r * c_row, 1);
        tile<ROWS, C>(a, a_row, a_col, b, b_row, c, c_row, K, add);
    }
    last_rows<C>(M, a, a_row, a_col, b, b_row, c, c_row, K, add, std::make_integer_sequence<int64_t, ROWS - 1>());
}

// c[M, N] = or += a[M, K] b[K, N] as they lie, for what is in the caches anyway; N is a multiple of WIDTH.
void multiply(int64_t M, int64_t N, int64_t K, const float *a, int64_t a_row, int64_t a_col, const float *b, int64_t b_row,
              float *c, int64_t c_row, bool add) {
    int64_t n = 0;
    for (; n + PANEL <= N; n += PANEL) columns<2>(M, a, ROWS * a_row, a_row, a_col, b + n, b_row, c + n, c_row, K, add);
    for (; n < N; n += WIDTH) columns<1>(M, a, ROWS * a_row, a_row, a_col, b + n, b_row, c + n, c_row, K, add);
}

// c[M, N] = or += a[M, K] b[K, N]; the columns of c are neighbours.
template <class T> struct Product {
    Matrix<T> a, b;
    T *c;
    int64_t c_row, M, N, K;
};

// Rows of a square of vectors become its columns.
template <int64_t S, int64_t... J> inline void exchange(vec &x, vec &y, std::integer_sequence<int64_t, J...>) {
#ifdef __clang__
    vec low = __builtin_shufflevector(x, y, (J & S ? WIDTH + J - S : J)...);
    y = __builtin_shufflevector(x, y, (J & S ? WIDTH + J : J + S)...);
#else
    typedef int32_t lanes __attribute__((vector_size(WIDTH * sizeof(float))));
    vec low = __builtin_shuffle(x, y, lanes{int32_t(J & S ? WIDTH + J - S : J)...});
    y = __builtin_shuffle(x, y, lanes{int32_t(J & S ? WIDTH + J : J + S)...});
#endif
    x = low;
}

template <int64_t S = WIDTH / 2> inline void transpose(vec *square) {
    for (int64_t i = 0; i < WIDTH; i++)
        if (!(i & S)) exchange<S>(square[i], square[i + S], std::make_integer_sequence<int64_t, WIDTH>());
    if constexpr (S > 1) transpose<S / 2>(square);
}

// to[K, PANEL] = b[K, N]; behind a last column within a vector zeros.
void pack_panel(const Matrix<float> &b, int64_t K, int64_t N, float *to) {
    int64_t k = 0;
    if (N % WIDTH == 0 && b.row == 1)
        for (; k + WIDTH <= K; k += WIDTH)
            for (int64_t n = 0; n < N; n += WIDTH) {
                vec square[WIDTH];
                for (int64_t i = 0; i < WIDTH; i++) square[i] = *(const vec *)b.at(k, n + i);
                transpose(square);
                for (int64_t i = 0; i < WIDTH; i++) *(vec *)(to + (k + i) * PANEL + n) = square[i];
            }
    for (; k < K; k++)
        if (N == WIDTH && b.col == 1) std::memcpy(to + k * PANEL, b.at(k, 0), WIDTH * sizeof(float));
        else
            for (int64_t n = 0; n < PANEL; n++) to[k * PANEL + n] = n < N ? *b.at(k, n) : 0;
}

// Panels of K * PANEL, one behind the other. Whole lines are read row by row: what is far apart waits for memory.
void pack_panels(const Matrix<float> &b, int64_t K, int64_t N, float *to) {
    int64_t whole = b.col == 1 ? N / PANEL * PANEL : 0;
    for (int64_t k = 0; k < K; k++)
        for (int64_t n = 0; n < whole; n += PANEL) std::memcpy(to + n * K + k * PANEL, b.at(k, n), PANEL * sizeof(float));
    for (int64_t n = whole; n < N; n += PANEL) pack_panel({b.at(0, n), b.row, b.col}, K, std::min(PANEL, N - n), to + n * K);
}

// Rows of a, transposed as it lies, by tiles: to[M / ROWS, K, ROWS].
void pack_strip(const Matrix<float> &a, int64_t M, int64_t K, float *to) {
    constexpr int64_t NEAR = 16;  // of k at a time, so that the lines read are still there for the next tile
    for (int64_t first = 0; first < K; first += NEAR)
        for (int64_t m = 0; m < M; m += ROWS)
            for (int64_t k = first; k < std::min(first + NEAR, K); k++) {
                float *row = to + m * K + k * ROWS;
                if (M - m >= ROWS) std::memcpy(row, a.at(m, k), ROWS * sizeof(float));
                else std::memcpy(row, a.at(m, k), (M - m) * sizeof(float));
            }
}

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
                int64_t tiles = M / ROWS * (now.width(j) / PANEL), then = j + PANELS * PANEL;
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
            else if (width == WIDTH) columns<1>(M, a.data, a_tile, a.row, a.col, panel, PANEL, c, p.c_row, K, adds);
            else
                for (int64_t i = 0; i < M; i += ROWS) {  // by way of a tile that is wide enough
                    float sums[ROWS * PANEL] = {};
                    int64_t rows = std::min(ROWS, M - i);
                    for (int64_t r = 0; adds && r < rows; r++)
                        std::memcpy(sums + r * PANEL, c + (i + r) * p.c_row, width * sizeof(float));
                    columns<2>(rows, a.data + i / ROWS * a_tile, a_tile, a.row, a.col, panel, PANEL, sums, PANEL, K, adds);
                    for (int64_t r = 0; r < rows; r++)
                        std::memcpy(c + (i + r) * p.c_row, sums + r * PANEL, width * sizeof(float));
                }
        }
    }
}

#ifdef __AVX512BF16__
// Neighbours in the sum: b[k, n] and b[k + 1, n], or 0 behind its end; `next` is how far they are apart.
inline pair joined(const bf16 *first, int64_t next, bool last) { return {*first, last ? bf16{0} : first[next]}; }

// Eight pairs of two rows.
static_assert(ROWS == 8 && PANEL % 8 == 0);
inline void zip(const bf16 *even, const bf16 *odd, pair *to) {
    __m128i e = _mm_loadu_si128((const __m128i *)even), o = _mm_loadu_si128((const __m128i *)odd);
    _mm_storeu_si128((__m128i *)to, _mm_unpacklo_epi16(e, o));
    _mm_storeu_si128((__m128i *)(to + 4), _mm_unpackhi_epi16(e, o));
}

// to[K / 2, PANEL] = b[K, N] in pairs
void pack_panel(const Matrix<bf16> &b, int64_t K, int64_t N, pair *to) {
    int64_t k = 0;
    if (N % WIDTH == 0 && b.row == 1)
        for (; k + 2 * WIDTH <= K; k += 2 * WIDTH)
            for (int64_t n = 0; n < N; n += WIDTH) {
                vec square[WIDTH];
                for (int64_t i = 0; i < WIDTH; i++) std::memcpy(square + i, b.at(k, n + i), sizeof(vec));
                transpose(square);
                for (int64_t i = 0; i < WIDTH; i++) *(vec *)(to + (k / 2 + i) * PANEL + n) = square[i];
            }
    for (; k < K; k += 2) {
        pair *row = to + k / 2 * PANEL;
        if (N == PANEL && b.col == 1 && k + 1 < K)
            for (int64_t n = 0; n < PANEL; n += 8) zip(b.at(k, n), b.at(k + 1, n), row + n);
        else
            for (int64_t n = 0; n < PANEL; n++) row[n] = n < N ? joined(b.at(k, n), b.row, k + 1 == K) : pair{};
    }
}

// Rows of a in pairs: to[M, K / 2], or, where a is transposed, by tiles: to[M / ROWS, K / 2, ROWS].
void pack_strip(const Matrix<bf16> &a, int64_t M, int64_t K, pair *to) {
    int64_t pairs = (K + 1) / 2;
    if (a.row != 1) {
        for (int64_t m = 0; m < M; m++)
            for (int64_t k = 0; k < K; k += 2) to[m * pairs + k / 2] = joined(a.at(m, k), a.col, k + 1 == K);
        return;
    }
    constexpr int64_t NEAR = 16;
    for (int64_t first = 0; first < K; first += NEAR)
        for (int64_t m = 0; m < M; m += ROWS)
            for (int64_t k = first; k < std::min(first + NEAR, K); k += 2) {
                pair *row = to + m * pairs + k / 2 * ROWS;
                if (M - m >= ROWS && k + 1 < K) zip(a.at(m, k), a.at(m, k + 1), row);
                else
                    for (int64_t r = 0; r < std::min(ROWS, M - m); r++) row[r] = joined(a.at(m + r, k), a.col, k + 1 == K);
            }
}

void work(const Task<bf16> &task, const Task<bf16> *, bool add, const Room &room) {
    const Product<bf16> &p = *task.product;
    const auto &[_, m, M, n, N] = task;
    pair *panel = (pair *)room.panels, *strip = (pair *)room.strip;
    int64_t row = (N + PANEL - 1) / PANEL * PANEL;
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
            auto multiply = width > WIDTH ? columns<2, pair> : columns<1, pair>;
            multiply(M, in_pairs.data, a_tile, in_pairs.row, in_pairs.col, panel, PANEL, room.sums + j, row, pairs, k > 0,
                     nullptr, nullptr);
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
    if (products.empty()) return;
    auto up = [](int64_t n, int64_t of) { return (n + of - 1) / of; };
    bool alone = products.size() == 1;
    int64_t high = STRIP, wide = PANEL * std::min(WIDE / PANEL, up(products[0].N, PANEL));  // N is one for all
    std::vector<Task<T>> tasks;
    auto cut = [&] {  // strips of one height, where there is but one product as many for each thread
        tasks.clear();
        for (const Product<T> &p : products) {
            int64_t team = alone && p.M > high ? threads : 1, strips = team * up(p.M, team * high);
            for (int64_t m = 0, rows; m < p.M; m += rows) {
                rows = std::min(ROWS * up(p.M, ROWS * strips), p.M - m);
                for (int64_t n = 0; n < p.N; n += wide) tasks.push_back({&p, m, rows, n, std::min(wide, p.N - n)});
            }
        }
        return (int64_t)tasks.size() >= (alone ? 1 : 2) * threads;  // enough for all to be busy
    };
    while (!cut() && high > 4 * ROWS)
        if (wide > PANEL) wide = PANEL * up(wide / PANEL, 2);
        else high /= 2;
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
