// Gumbel-max over a vocabulary: argmax of logit / temperature + noise, the noise hashed from a key and the token's id.
// Its twin is baleen.infer.sampler.gumbel. Logarithms, which are slow, are taken only where the noise could win.
#pragma once

#include "simd.h"

#include <cmath>
#include <vector>

typedef uint32_t vu __attribute__((vector_size(LANES * 4)));

struct Key {
    uint32_t low, high;
};

template <class U> inline U hashed(U id, Key key) {
    U x = id * 0x9E3779B9u + key.low;
    x ^= x >> 16;
    x *= 0x7FEB352Du;
    x ^= x >> 15;
    x ^= key.high;
    x *= 0x846CA68Bu;
    x ^= x >> 16;
    return x & 0x7FFFFFFFu;
}

inline float gumbel(uint32_t hash) {
    const float share = std::fmin(((float)hash + 0.5f) * 0x1p-31f, 1 - 0x1p-24f);
    return -std::log(-std::log1p(-share));
}

// `bounds`: room for vocab floats. -ln(1 - u) >= u, so the noise is at most -ln u, and that ln 2 times what u's exponent
// says; a little more for rounding.
inline int64_t draw(const float* logits, int vocab, float temperature, Key key, float* bounds) {
    constexpr float ln2 = 0.693147182f, slack = 1e-4f;
    vu ids;
    for (int i = 0; i < LANES; i++) ids[i] = i;
    int z = 0;
    for (; z + LANES <= vocab; z += LANES, ids += LANES) {
        const vf wide = __builtin_convertvector((vi)hashed(ids, key), vf) + 0.5f;
        const vi zeros = 31 + 127 - ((vi)wide >> 23);
        store(bounds + z, load(logits + z) / temperature + (__builtin_convertvector(zeros, vf) * ln2 + slack));
    }
    for (; z < vocab; z++) bounds[z] = INFINITY;
    float best = -INFINITY;
    int64_t token = 0;
    for (int i = 0; i < vocab; i++) {
        if (bounds[i] <= best) continue;  // never so of what is no number, which is drawn at once, as argmax does
        const float score = gumbel(hashed((uint32_t)i, key)) + logits[i] / temperature;
        if (score != score) return i;
        if (score > best) best = score, token = i;
    }
    return token;
}
