// Row-major float matrices into panels, and back. Rounding is to nearest, ties to even, as PyTorch does it.
#pragma once

#include "matmul.h"

inline uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float bf16(uint16_t x) {
    const uint32_t bits = (uint32_t)x << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}

// Up, so that a scale of few digits still reaches the largest weight. x >= 0.
inline uint16_t to_bf16_up(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (uint16_t)((bits + 0xffff) >> 16);
}

// `count` weights of one output that share a scale -> column `lane` of a block.
inline void pack_block(int format, const float* w, int count, int lane, char* block) {
    switch (format) {
    case F32:
        for (int k = 0; k < count; k++) ((float*)block)[k * PANEL + lane] = w[k];
        return;
    case BF16:
        for (int k = 0; k < count; k++) ((uint16_t*)block)[k * PANEL + lane] = to_bf16(w[k]);
        return;
    case INT8: {
        float largest = 0;
        for (int k = 0; k < count; k++) largest = std::max(largest, std::fabs(w[k]));
        const uint16_t scale = to_bf16_up(largest / 127);
        ((uint16_t*)block)[lane] = scale;
        const float inverse = bf16(scale) > 0 ? 1 / bf16(scale) : 0;
        for (int k = 0; k < count; k++)
            ((int8_t*)block)[PANEL * 2 + k * PANEL + lane] = (int8_t)std::nearbyint(w[k] * inverse);
        return;
    }
    case INT4: {
        const auto [low, high] = std::minmax_element(w, w + count);
        const uint16_t least = to_bf16(*low);
        const uint16_t scale = to_bf16_up(std::max(0.0f, *high - bf16(least)) / 15);
        ((uint16_t*)block)[lane] = scale;
        ((uint16_t*)block)[PANEL + lane] = least;
        const float inverse = bf16(scale) > 0 ? 1 / bf16(scale) : 0;
        for (int k = 0; k < count; k++) {
            const int q = std::clamp((int)std::nearbyint((w[k] - bf16(least)) * inverse), 0, 15);
            ((uint8_t*)block)[PANEL * 4 + k / 2 * PANEL + lane] |= q << (k % 2 * 4);
        }
        return;
    }
    }
}

// Panel `panel` of a matrix whose output i is row rows[i] of `source` [*, in], or zero where rows[i] < 0.
inline void pack_panel(const float* source, const int32_t* rows, int panel, int in, int format, char* data) {
    char* block = data + panel_bytes(format, in) * panel;
    memset(block, 0, panel_bytes(format, in));
    for (int first = 0; first < in; first += BLOCK, block += BLOCK_BYTES[format])
        for (int lane = 0; lane < PANEL; lane++) {
            const int row = rows[panel * PANEL + lane];
            if (row >= 0) pack_block(format, source + (size_t)row * in + first, std::min(BLOCK, in - first), lane, block);
        }
}
