// Operands of products, packed: panels of b, whose rows lie one behind the other, and strips of a by tiles.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "tile.h"

namespace {

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

#endif

}  // namespace
