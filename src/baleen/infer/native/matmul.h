// Packed matrices in four formats, and the one kernel that multiplies by them.
//
// A matrix [out, in] is cut into panels of 16 outputs; in a panel the 16 weights of one input lie side by side. So a
// register holds 16 outputs, each summed in the order of its inputs by one chain of fused multiply-adds: the result
// does not depend on how many rows (tokens) are multiplied at once, nor on the number of threads.
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

// Bytes of one panel's block of 32 inputs: the scales (bfloat16) stand before the weights.
constexpr int BLOCK_BYTES[] = {BLOCK * PANEL * 4, BLOCK * PANEL * 2, PANEL * 2 + BLOCK * PANEL, PANEL * 4 + BLOCK * PANEL / 2};

inline size_t panel_bytes(int format, int in) {
    if (format == F32) return (size_t)in * PANEL * 4;
    if (format == BF16) return (size_t)in * PANEL * 2;
    return (size_t)ceil_div(in, BLOCK) * BLOCK_BYTES[format];
}

inline size_t matrix_bytes(const Matrix& m) { return panel_bytes(m.format, m.in) * ceil_div(m.out, PANEL); }

inline Matrix nth(Matrix m, int i) {
    m.data += matrix_bytes(m) * i;
    return m;
}

// Each format reads, of one panel's block, the weights of input k (`one`) or of k and k + 1, k even (`pair`).
template <int FORMAT> struct Block;

template <> struct Block<F32> {
    const float* weights;
    void open(const char* block) { weights = (const float*)block; }
    vf one(int k, int v) const { return load(weights + k * PANEL + v * LANES); }
    void pair(int k, int v, vf& a, vf& b) const { a = one(k, v), b = one(k + 1, v); }
};

template <> struct Block<BF16> {
    const uint16_t* weights;
    void open(const char* block) { weights = (const uint16_t*)block; }
    vf one(int k, int v) const { return from_bf16(weights + k * PANEL + v * LANES); }
    void pair(int k, int v, vf& a, vf& b) const { a = one(k, v), b = one(k + 1, v); }
};

template <> struct Block<INT8> {
    const int8_t* weights;
    vf scale[VECS];
    void open(const char* block) {
        weights = (const int8_t*)block + PANEL * 2;
        for (int v = 0; v < VECS; v++) scale[v] = from_bf16((const uint16_t*)block + v * LANES);
    }
    vf one(int k, int v) const {
        const vi q = __builtin_convertvector(*(const vb_any*)(weights + k * PANEL + v * LANES), vi);
        return __builtin_convertvector(q, vf) * scale[v];
    }
    void pair(int k, int v, vf& a, vf& b) const { a = one(k, v), b = one(k + 1, v); }
};

// A byte holds input k in its low half and k + 1 in its high half; weight = scale * q + least.
template <> struct Block<INT4> {
    const uint8_t* weights;
    vf scale[VECS], least[VECS];
    void open(const char* block) {
        weights = (const uint8_t*)block + PANEL * 4;
        for (int v = 0; v < VECS; v++) {
            scale[v] = from_bf16((const uint16_t*)block + v * LANES);
            least[v] = from_bf16((const uint16_t*)block + PANEL + v * LANES);
        }
    }
    void pair(int k, int v, vf& a, vf& b) const {
        const vi q = __builtin_convertvector(*(const vub_any*)(weights + k / 2 * PANEL + v * LANES), vi);
        a = __builtin_convertvector(q & 15, vf) * scale[v] + least[v];
        b = __builtin_convertvector(q >> 4, vf) * scale[v] + least[v];
    }
    vf one(int k, int v) const {
        vf a, b;
        pair(k, v, a, b);
        return a;
    }
};

// Panels multiplied at a time by so many rows: what the registers hold, at most four (streams from memory).
constexpr int panels_at_once(int rows) { return std::clamp(ACCUMULATORS / (rows * VECS), 1, 4); }

// ROWS rows of x by PANELS panels from w on, `stride` bytes apart. x[row][k] is x[row * row_step + k * in_step].
// acc[row][panel][v] is added to.
template <int FORMAT, int ROWS, int PANELS>
inline void tile(const char* w, size_t stride, const float* x, long row_step, long in_step, int in,
                 vf (&acc)[ROWS][PANELS][VECS]) {
    auto multiply = [&](const vf(&weight)[PANELS][VECS], const float* at) {
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
            for (int p = 0; p < PANELS; p++)
#pragma GCC unroll 8
                for (int v = 0; v < VECS; v++) acc[r][p][v] += weight[p][v] * at[r * row_step];
    };
    for (int first = 0; first < in; first += BLOCK, w += BLOCK_BYTES[FORMAT]) {
        Block<FORMAT> block[PANELS];
        for (int p = 0; p < PANELS; p++) block[p].open(w + p * stride);
        const int count = std::min(BLOCK, in - first);
        int k = 0;
        for (; k + 1 < count; k += 2, x += 2 * in_step) {
            vf a[PANELS][VECS], b[PANELS][VECS];
#pragma GCC unroll 8
            for (int p = 0; p < PANELS; p++)
#pragma GCC unroll 8
                for (int v = 0; v < VECS; v++) block[p].pair(k, v, a[p][v], b[p][v]);
            multiply(a, x);
            multiply(b, x + in_step);
        }
        if (k < count) {
            vf a[PANELS][VECS];
#pragma GCC unroll 8
            for (int p = 0; p < PANELS; p++)
#pragma GCC unroll 8
                for (int v = 0; v < VECS; v++) a[p][v] = block[p].one(k, v);
            multiply(a, x);
            x += in_step;
        }
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

template <int FORMAT, int ROWS, int PANELS>
inline void tiles(const char* data, size_t bytes, int panel, int row, const float* x, long row_step, long in_step, int in,
                  const Result& out) {
    vf acc[ROWS][PANELS][VECS] = {};
    tile<FORMAT, ROWS, PANELS>(data + panel * bytes, bytes, x + row * row_step, row_step, in_step, in, acc);
    for (int r = 0; r < ROWS; r++)
        for (int p = 0; p < PANELS; p++)
            for (int v = 0; v < VECS; v++) out.put(row + r, (panel + p) * PANEL + v * LANES, acc[r][p][v]);
}

template <int FORMAT, int ROWS>
__attribute__((noinline)) void row_tile(const Matrix& m, int begin, int end, int row, const float* x, long row_step,
                                        long in_step, const Result& out) {
    constexpr int AT_ONCE = panels_at_once(ROWS);
    const size_t bytes = panel_bytes(FORMAT, m.in);
    int p = begin;
    for (; p + AT_ONCE <= end; p += AT_ONCE)
        tiles<FORMAT, ROWS, AT_ONCE>(m.data, bytes, p, row, x, row_step, in_step, m.in, out);
    for (; p < end; p++) tiles<FORMAT, ROWS, 1>(m.data, bytes, p, row, x, row_step, in_step, m.in, out);
}

template <int FORMAT, int... ROWS>
void any_rows(int rows, const Matrix& m, int begin, int end, int row, const float* x, long row_step, long in_step,
              const Result& out, std::integer_sequence<int, ROWS...>) {
    ((rows == ROWS + 1 ? row_tile<FORMAT, ROWS + 1>(m, begin, end, row, x, row_step, in_step, out) : (void)0), ...);
}

template <int FORMAT>
void multiply_as(const Matrix& m, int begin, int end, const float* x, long row_step, long in_step, int rows,
                 const Result& out) {
    constexpr size_t NEAR = 256 << 10;  // bytes of weights that stay in the second-level cache for all rows
    const int many = std::max(12, (int)(NEAR / std::max<size_t>(1, panel_bytes(FORMAT, m.in))) / 12 * 12);
    const int parts = ceil_div(rows, MAX_ROWS);
    for (; begin < end; begin += many)
        for (int i = 0; i < parts; i++) {
            const int row = (int)((int64_t)rows * i / parts), next = (int)((int64_t)rows * (i + 1) / parts);
            any_rows<FORMAT>(next - row, m, begin, std::min(end, begin + many), row, x, row_step, in_step, out,
                             std::make_integer_sequence<int, MAX_ROWS>());
        }
}

// Panels [begin, end) of a matrix times `rows` rows of x.
inline void multiply(const Matrix& m, int begin, int end, const float* x, long row_step, long in_step, int rows,
                     const Result& out) {
    switch (m.format) {
    case F32: return multiply_as<F32>(m, begin, end, x, row_step, in_step, rows, out);
    case BF16: return multiply_as<BF16>(m, begin, end, x, row_step, in_step, rows, out);
    case INT8: return multiply_as<INT8>(m, begin, end, x, row_step, in_step, rows, out);
    case INT4: return multiply_as<INT4>(m, begin, end, x, row_step, in_step, rows, out);
    }
}
