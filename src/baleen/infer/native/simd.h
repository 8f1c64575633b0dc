// Vectors as the machine has them, by GCC's and Clang's vector extensions, so x86 and ARM alike.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__)
constexpr int LANES = 16, MAX_ROWS = 12, ACCUMULATORS = 24;
#elif defined(__AVX__)
constexpr int LANES = 8, MAX_ROWS = 6, ACCUMULATORS = 12;
#elif defined(__aarch64__)
constexpr int LANES = 4, MAX_ROWS = 6, ACCUMULATORS = 24;
#else
constexpr int LANES = 4, MAX_ROWS = 3, ACCUMULATORS = 12;
#endif

// Outputs of a matmul come in panels of 16, one cache line of floats, whatever the width of a register.
constexpr int PANEL = 16;
constexpr int VECS = PANEL / LANES;

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef float vf_any __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
typedef int16_t vs_any __attribute__((vector_size(LANES * 4), aligned(2), may_alias));
typedef int8_t vb2_any __attribute__((vector_size(LANES * 2), aligned(1), may_alias));
typedef uint8_t vub_any __attribute__((vector_size(LANES), aligned(1), may_alias));

inline vf load(const float* p) { return *(const vf_any*)p; }
inline void store(float* p, vf x) { *(vf_any*)p = x; }
inline vf splat(float x) { return x - vf{}; }
inline vf as_float(vi x) { return (vf)x; }
inline vf from_bf16(const uint16_t* p) { return as_float(__builtin_convertvector(*(const vh_any*)p, vi) << 16); }
inline vf maximum(vf a, vf b) { return a > b ? a : b; }

// Integers by name where there is one: GCC 12 takes conversions of bytes apart into single ones.
#if defined(__AVX512F__) && defined(__AVX512BW__)
inline vi from_uint8(const uint8_t* p) { return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
inline vi int8_pairs(const int8_t* p) { return (vi)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p)); }
inline vi add_products(vi total, vi weights, int32_t pair) {
#if defined(__AVX512VNNI__)
    return (vi)_mm512_dpwssd_epi32((__m512i)total, (__m512i)weights, _mm512_set1_epi32(pair));
#else
    return total + (vi)_mm512_madd_epi16((__m512i)weights, _mm512_set1_epi32(pair));
#endif
}
#elif defined(__AVX2__)
inline vi from_uint8(const uint8_t* p) { return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
inline vi int8_pairs(const int8_t* p) { return (vi)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)); }
inline vi add_products(vi total, vi weights, int32_t pair) {
    return total + (vi)_mm256_madd_epi16((__m256i)weights, _mm256_set1_epi32(pair));
}
#else
inline vi from_uint8(const uint8_t* p) { return __builtin_convertvector(*(const vub_any*)p, vi); }
inline vi int8_pairs(const int8_t* p) { return (vi) __builtin_convertvector(*(const vb2_any*)p, vs_any); }
inline vi add_products(vi total, vi weights, int32_t pair) {
    return total + (weights << 16 >> 16) * (int32_t)(int16_t)pair + (weights >> 16) * (pair >> 16);
}
#endif

inline float sum(vf x) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
}

// e^x to 2 ulp for x <= 88; 0 below -87. Cody and Waite's reduction, then the Taylor polynomial on [-ln2/2, ln2/2].
inline vf exp(vf x) {
    const vf low = splat(-87.0f), high = splat(88.0f);
    vf clipped = x < low ? low : (x > high ? high : x);
    vf scaled = clipped * 1.44269504088896341f;
    vi n = __builtin_convertvector(scaled + (scaled < 0 ? splat(-0.5f) : splat(0.5f)), vi);
    vf k = __builtin_convertvector(n, vf);
    vf r = clipped - k * 0.693359375f + k * 2.12194440e-4f;
    vf p = splat(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    vf power = as_float((n + 127) << 23);
    return x < low ? vf{} : p * power;
}

inline vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }
inline int ceil_div(int a, int b) { return (a + b - 1) / b; }
inline int padded(int n) { return ceil_div(n, PANEL) * PANEL; }
inline int whole_blocks(int n) { return ceil_div(n, 32) * 32; }
