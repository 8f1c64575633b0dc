// Row-major float matrices into panels. Rounding is to nearest, ties to even, as PyTorch does it.
#pragma once

#include "matmul.h"

inline uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return x != x ? (uint16_t)(bits >> 16 | 0x40) : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Up, so that a scale of few digits still reaches the largest weight. x >= 0.
inline uint16_t to_bf16_up(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (uint16_t)((bits + 0xffff) >> 16);
}

inline float bf16(uint16_t x) {
    const uint32_t bits = (uint32_t)x << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}

// `count` weights of one output that share a scale -> column `lane` of a block of zeros.
inline void pack_block(int format, const float* w, int count, int lane, char* block) {
    uint16_t* head = (uint16_t*)block + lane;
    if (format == INT8) {
        float largest = 0;
        for (int k = 0; k < count; k++) largest = std::max(largest, std::fabs(w[k]));
        *head = to_bf16_up(largest / 127);
        const float inverse = bf16(*head) > 0 ? 1 / bf16(*head) : 0;
        int8_t* weights = (int8_t*)block + PANEL * 2 + lane * 2;
        for (int k = 0; k < count; k++) weights[k / 2 * PANEL * 2 + k % 2] = (int8_t)std::nearbyint(w[k] * inverse);
    } else {
        const auto [low, high] = std::minmax_element(w, w + count);
        const float least = bf16(head[PANEL] = to_bf16(*low));
        *head = to_bf16_up(std::max(0.0f, *high - least) / 15);
        const float inverse = bf16(*head) > 0 ? 1 / bf16(*head) : 0;
        uint8_t* weights = (uint8_t*)block + PANEL * 4 + lane;
        for (int k = 0; k < count; k++)
            weights[k / 2 * PANEL] |= std::clamp((int)std::nearbyint((w[k] - least) * inverse), 0, 15) << (k % 2 * 4);
    }
}

// Panel `panel` of a matrix whose output i is row rows[i] of `source` [*, in], or zero where rows[i] < 0.
inline void pack_panel(const float* source, const int32_t* rows, int panel, int in, int format, char* data) {
    const size_t bytes = panel_bytes(format, in);
    data += bytes * panel, rows += panel * PANEL;
    memset(data, 0, bytes);
    if (is_integer(format)) {
        for (int first = 0; first < in; first += BLOCK, data += block_bytes(format))
            for (int lane = 0; lane < PANEL; lane++)
                if (rows[lane] >= 0)
                    pack_block(format, source + (size_t)rows[lane] * in + first, std::min(BLOCK, in - first), lane, data);
        return;
    }
    for (int k = 0; k < in; k++)
        for (int lane = 0; lane < PANEL; lane++) {
            if (rows[lane] < 0) continue;
            const float w = source[(size_t)rows[lane] * in + k];
            if (format == F32) ((float*)data)[k * PANEL + lane] = w;
            else ((uint16_t*)data)[k * PANEL + lane] = to_bf16(w);
        }
}
