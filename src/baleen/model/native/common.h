// What the kernels of training share: bf16, a vectorisable exp, and the rows that a thread takes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <omp.h>

namespace {

struct bf16 {
    uint16_t bits;
};

inline float widen(float x) { return x; }
inline float widen(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline void narrow(float x, float &out) { out = x; }
inline void narrow(float x, bf16 &out) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    out.bits = x != x ? uint16_t(bits >> 16 | 0x40) : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// exp(x) to 2 units in the last place: 2^n times a polynomial on [-ln2/2, ln2/2]. A library call would not vectorise.
inline float fast_exp(float x) {
    x = x < -87.3f ? -87.3f : (x > 88.0f ? 88.0f : x);
    float n = std::nearbyint(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691e-4f;
    p = p * r + 1.3981999e-3f;
    p = p * r + 8.3334519e-3f;
    p = p * r + 4.1665795e-2f;
    p = p * r + 1.6666665e-1f;
    p = p * r + 5.0000001e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = (int32_t(n) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return p * power;
}

struct Rows {
    int64_t first, last;
};

inline Rows share(int64_t N) {
    int64_t team = omp_get_num_threads(), id = omp_get_thread_num();
    return {N * id / team, N * (id + 1) / team};
}

}  // namespace
