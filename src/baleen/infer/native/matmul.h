// Packed matrices in four formats, and the kernels that multiply by them.
//
// A matrix [out, in] is cut into panels of 16 outputs; in a panel the 16 weights of one input (in int8 and int4: of a
// pair of inputs) lie side by side. So a register holds 16 outputs, each summed in the order of its inputs: the result
// does not depend on how many rows (tokens) are multiplied at once, nor on the number of threads.
//
// int8 and int4 multiply in integers, by activations rounded to 16 bits: of the largest of their block of 32 that is
// an error of 2^-16, a quarter of the work in decoding and half of it in prefill.
#pragma once

#include "simd.h"

#include <algorithm>
#include <cmath>
#include <utility>

enum Format : int32_t { F32 = 0, BF16 = 1, INT8 = 2, INT4 = 3 };

// One matrix, or the first of a stack of equal ones. `bias` may be null.
struct Matrix {
    const char* data;
    const float* bias;
    int32_t in, out, format, reserved;
};

constexpr int BLOCK = 32;  // inputs that share a scale

constexpr bool is_integer(int format) { return format >= INT8; }

// Bytes of one panel's block of 32 inputs; the scales (bfloat16) stand before the weights.
constexpr int block_bytes(int format) {
    constexpr int bytes[] = {BLOCK * PANEL * 4, BLOCK * PANEL * 2, PANEL * 2 + BLOCK * PANEL, PANEL * 4 + BLOCK * PANEL / 2};
    return bytes[format];
}

inline size_t panel_bytes(int format, int in) {
    if (is_integer(format)) return (size_t)ceil_div(in, BLOCK) * block_bytes(format);
    return (size_t)in * PANEL * (format == F32 ? 4 : 2);
}

inline size_t matrix_bytes(const Matrix& m) { return panel_bytes(m.format, m.in) * ceil_div(m.out, PANEL); }

inline Matrix nth(Matrix m, int i) {
    m.data += matrix_bytes(m) * i;
    return m;
}

// Activations: x[row][k] is at x + row * row_step + k * in_step. For matrices of integers also rounded: see `round_row`.
struct Rows {
    const float* x;
    long row_step, in_step = 1;
    const int16_t* rounded = nullptr;  // [rows, rounded_step]
    const float* scales = nullptr;     // [rows, rounded_step / 32, 2]: the step, and the sum of the block
    long rounded_step = 0;

    Rows from(int row) const {
        Rows out = *this;
        out.x += row * row_step;
        if (rounded) out.rounded += row * rounded_step, out.scales += row * rounded_step / BLOCK * 2;
        return out;
    }
};

// `in` values, with zeros to a whole block behind them, to 16 bits and, for each block, the step and the sum.
inline void round_row(const float* x, int in, int16_t* rounded, float* scales) {
    typedef int16_t vs __attribute__((vector_size(LANES * 2)));
    typedef int16_t vs_out __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
    for (int first = 0; first < in; first += BLOCK, x += BLOCK, rounded += BLOCK, scales += 2) {
        vf largest{};
        for (int k = 0; k < BLOCK; k += LANES) {
            const vf at = load(x + k);
            largest = maximum(largest, maximum(at, -at));
        }
        float top = 0;
        for (int i = 0; i < LANES; i++) top = std::max(top, largest[i]);
        const float inverse = top > 0 ? 32767 / top : 0;
        vi total{};
        for (int k = 0; k < BLOCK; k += LANES) {
            constexpr float NEAREST = 3 << 22;  // adding it leaves no digits behind the point
            const vi q = __builtin_convertvector(load(x + k) * inverse + NEAREST - NEAREST, vi);
            *(vs_out*)(rounded + k) = __builtin_convertvector(q, vs);
            total += q;
        }
        int32_t sum = 0;
        for (int i = 0; i < LANES; i++) sum += total[i];
        scales[0] = top / 32767;
        scales[1] = scales[0] * sum;
    }
}

// Where a product goes: to row rows[r] (or r) of `data`, after bias and times gain[r], stored or added.
struct Result {
    float* data;
    long row_step;
    bool add = false;
    const float* bias = nullptr;
    const float* gain = nullptr;
    const int32_t* rows = nullptr;

    void put(int row, int output, vf x) const {
        float* at = data + (rows ? rows[row] : row) * row_step + output;
        if (bias) x += load(bias + output);
        if (gain) x *= gain[row];
        store(at, add ? load(at) + x : x);
    }
};

// Panels multiplied at a time by so many rows: what the registers hold, at most four (streams from memory).
constexpr int panels_at_once(int rows) { return std::clamp(ACCUMULATORS / (rows * VECS), 1, 4); }

template <int FORMAT> inline vf weight(const char* panel, int k, int v) {
    const size_t at = (size_t)k * PANEL + v * LANES;
    if constexpr (FORMAT == F32) return load((const float*)panel + at);
    else return from_bf16((const uint16_t*)panel + at);
}

// acc[row][panel][v] = x times PANELS panels from w on, `stride` bytes apart.
template <int FORMAT, int ROWS, int PANELS>
inline void float_tile(const char* w, size_t stride, const Rows& rows, int in, vf (&acc)[ROWS][PANELS][VECS]) {
    const float* x = rows.x;
    const long row_step = rows.row_step, in_step = rows.in_step;
#pragma GCC unroll 2
    for (int k = 0; k < in; k++, x += in_step) {
        vf at[PANELS][VECS];
#pragma GCC unroll 8
        for (int p = 0; p < PANELS; p++)
#pragma GCC unroll 8
            for (int v = 0; v < VECS; v++) at[p][v] = weight<FORMAT>(w + p * stride, k, v);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
            for (int p = 0; p < PANELS; p++)
#pragma GCC unroll 8
                for (int v = 0; v < VECS; v++) acc[r][p][v] += at[p][v] * x[r * row_step];
    }
}

// 16-bit pairs of weights, inputs 2i and 2i + 1 of a block, for each output of register v.
template <int FORMAT> inline vi weight_pair(const char* block, int i, int v) {
    if constexpr (FORMAT == INT8) return int8_pairs((const int8_t*)block + PANEL * 2 + (i * PANEL + v * LANES) * 2);
    else {
        const vi both = from_uint8((const uint8_t*)block + PANEL * 4 + i * PANEL + v * LANES);
        return (both | both << 12) & 0x000f000f;
    }
}

template <int FORMAT, int ROWS, int PANELS>
inline void integer_tile(const char* w, size_t stride, const Rows& rows, int in, vf (&acc)[ROWS][PANELS][VECS]) {
    const long step = rows.rounded_step;
    const int blocks = ceil_div(in, BLOCK);
    for (int b = 0; b < blocks; b++, w += block_bytes(FORMAT)) {
        const int16_t* x = rows.rounded + b * BLOCK;
        vi total[ROWS][PANELS][VECS] = {};
#pragma GCC unroll 2
        for (int i = 0; i < BLOCK / 2; i++) {
            vi at[PANELS][VECS];
#pragma GCC unroll 8
            for (int p = 0; p < PANELS; p++)
#pragma GCC unroll 8
                for (int v = 0; v < VECS; v++) at[p][v] = weight_pair<FORMAT>(w + p * stride, i, v);
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; r++) {
                int32_t pair;
                memcpy(&pair, x + r * step + 2 * i, 4);
#pragma GCC unroll 8
                for (int p = 0; p < PANELS; p++)
#pragma GCC unroll 8
                    for (int v = 0; v < VECS; v++) total[r][p][v] = add_products(total[r][p][v], at[p][v], pair);
            }
        }
#pragma GCC unroll 8
        for (int p = 0; p < PANELS; p++)
#pragma GCC unroll 8
            for (int v = 0; v < VECS; v++) {
                const uint16_t* head = (const uint16_t*)(w + p * stride) + v * LANES;
                const vf scale = from_bf16(head);
#pragma GCC unroll 16
                for (int r = 0; r < ROWS; r++) {
                    const float* own = rows.scales + (r * step / BLOCK + b) * 2;
                    acc[r][p][v] += __builtin_convertvector(total[r][p][v], vf) * (scale * own[0]);
                    if constexpr (FORMAT == INT4) acc[r][p][v] += from_bf16(head + PANEL) * own[1];
                }
            }
    }
}

template <int FORMAT, int ROWS, int PANELS>
inline void tile(const Matrix& m, size_t bytes, int panel, int row, const Rows& x, const Result& out) {
    vf acc[ROWS][PANELS][VECS] = {};
    if constexpr (is_integer(FORMAT)) integer_tile<FORMAT, ROWS, PANELS>(m.data + panel * bytes, bytes, x, m.in, acc);
    else float_tile<FORMAT, ROWS, PANELS>(m.data + panel * bytes, bytes, x, m.in, acc);
    for (int r = 0; r < ROWS; r++)
        for (int p = 0; p < PANELS; p++)
            for (int v = 0; v < VECS; v++) out.put(row + r, (panel + p) * PANEL + v * LANES, acc[r][p][v]);
}

template <int FORMAT, int ROWS>
__attribute__((noinline)) void row_tile(const Matrix& m, int begin, int end, int row, const Rows& x, const Result& out) {
    constexpr int AT_ONCE = panels_at_once(ROWS);
    const size_t bytes = panel_bytes(FORMAT, m.in);
    int p = begin;
    for (; p + AT_ONCE <= end; p += AT_ONCE) tile<FORMAT, ROWS, AT_ONCE>(m, bytes, p, row, x, out);
    for (; p < end; p++) tile<FORMAT, ROWS, 1>(m, bytes, p, row, x, out);
}

template <int FORMAT, int... LESS>
void any_rows(int rows, const Matrix& m, int begin, int end, int row, const Rows& x, const Result& out,
              std::integer_sequence<int, LESS...>) {
    ((rows == LESS + 1 ? row_tile<FORMAT, LESS + 1>(m, begin, end, row, x, out) : (void)0), ...);
}

template <int FORMAT> void multiply_as(const Matrix& m, int begin, int end, const Rows& x, int rows, const Result& out) {
    constexpr size_t NEAR = 256 << 10;  // bytes of weights that stay in the second-level cache for all rows
    const int many = std::max(12, (int)(NEAR / panel_bytes(FORMAT, m.in)) / 12 * 12);
    const int parts = ceil_div(rows, MAX_ROWS);
    for (; begin < end; begin += many)
        for (int i = 0; i < parts; i++) {
            const int row = (int)((int64_t)rows * i / parts), next = (int)((int64_t)rows * (i + 1) / parts);
            any_rows<FORMAT>(next - row, m, begin, std::min(end, begin + many), row, x.from(row), out,
                             std::make_integer_sequence<int, MAX_ROWS>());
        }
}

// Panels [begin, end) of a matrix times `rows` rows of x.
inline void multiply(const Matrix& m, int begin, int end, const Rows& x, int rows, const Result& out) {
    switch (m.format) {
    case F32: return multiply_as<F32>(m, begin, end, x, rows, out);
    case BF16: return multiply_as<BF16>(m, begin, end, x, rows, out);
    case INT8: return multiply_as<INT8>(m, begin, end, x, rows, out);
    case INT4: return multiply_as<INT4>(m, begin, end, x, rows, out);
    }
}
