// The innermost products: a tile of sums in registers, of rows of a and of columns of b as they lie.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

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
constexpr int64_t LOW = 4 * ROWS;  // strips of fewer rows are not worth packing for
static_assert(STRIP % ROWS == 0 && STRIP >= 2 * LOW);

inline int64_t up(int64_t n, int64_t of) { return (n + of - 1) / of; }
inline int64_t padded(int64_t n) { return WIDTH * up(n, WIDTH); }

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
        lines = (across ? M : N) * sizeof(float) / 64 + 1;  // a row seldom begins with a line
        each = rows * lines / tiles + 1;
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

}  // namespace
