// The gate, and which expert works on which tokens.
#pragma once

#include "step.h"

#include <algorithm>
#include <limits>
#include <vector>

// The `k` greatest of those that `count` and `value` name, greatest first; of equals the first.
template <class Value> inline void greatest(int count, int k, Value value, int32_t* out) {
    int found = 0;
    for (int i = 0; i < count; i++) {
        if (found == k && !(value(i) > value(out[k - 1]))) continue;
        int at = found < k ? found++ : k - 1;
        for (; at > 0 && value(i) > value(out[at - 1]); at--) out[at] = out[at - 1];
        out[at] = i;
    }
}

// Eq. 13-16: the top_k experts of one token and their gates. scores: router logits; turned into affinities in place.
inline void choose(const Shape& s, float* scores, const float* correction, int32_t* chosen, float* gates) {
    float choice[s.experts], group_score[s.groups];
    int32_t kept[s.top_groups];
    for (int e = 0; e < s.experts; e += LANES) store(scores + e, sigmoid(load(scores + e)));  // padded to whole panels
    for (int e = 0; e < s.experts; e++) choice[e] = scores[e] + correction[e];
    if (s.groups > 1) {
        const int per_group = s.experts / s.groups;
        for (int g = 0; g < s.groups; g++) {
            float best = -std::numeric_limits<float>::infinity(), second = best;
            for (int e = g * per_group; e < (g + 1) * per_group; e++) {
                second = std::max(second, std::min(best, choice[e]));
                best = std::max(best, choice[e]);
            }
            group_score[g] = best + second;
        }
        greatest(s.groups, s.top_groups, [&](int g) { return group_score[g]; }, kept);
        std::sort(kept, kept + s.top_groups);
        const auto expert = [&](int i) { return kept[i / per_group] * per_group + i % per_group; };
        greatest(s.top_groups * per_group, s.top_k, [&](int i) { return choice[expert(i)]; }, chosen);
        for (int k = 0; k < s.top_k; k++) chosen[k] = expert(chosen[k]);
    } else {
        greatest(s.experts, s.top_k, [&](int e) { return choice[e]; }, chosen);
    }
    float total = 0;
    for (int k = 0; k < s.top_k; k++) total += gates[k] = scores[chosen[k]];
    const float scale = s.normalise_gates ? s.gate_scale / (total + 1e-20f) : s.gate_scale;
    for (int k = 0; k < s.top_k; k++) gates[k] *= scale;
}

// The (token, expert) pairs of a layer sorted by expert: rows first(u) .. first(u) + count(u) belong to expert(u).
class Plan {
  public:
    void reserve(int tokens, int experts, int top_k) {
        top_k_ = top_k;
        scores_.resize((size_t)tokens * padded(experts) + PANEL);
        chosen_.resize((size_t)tokens * top_k), gates_.resize(chosen_.size());
        tokens_.resize(chosen_.size()), gain_.resize(chosen_.size());
    }

    void group(int tokens, int experts) {
        used_.clear(), rows_ = experts ? tokens * top_k_ : 0;
        counts_.assign(experts + 1, 0);
        for (int i = 0; i < rows_; i++) counts_[chosen_[i]]++;
        for (int e = 0, first = 0; e < experts; e++)
            if (const int count = counts_[e]) {
                used_.push_back({e, first, count});
                counts_[e] = first, first += count;
            }
        for (int i = 0; i < rows_; i++) {
            const int m = counts_[chosen_[i]]++;
            tokens_[m] = i / top_k_, gain_[m] = gates_[i];
        }
    }

    float* scores() { return scores_.data(); }
    int32_t* chosen(int n) { return chosen_.data() + (size_t)n * top_k_; }
    float* gates(int n) { return gates_.data() + (size_t)n * top_k_; }
    int rows() const { return rows_; }
    int used() const { return (int)used_.size(); }
    int expert(int u) const { return used_[u].expert; }
    int first(int u) const { return used_[u].first; }
    int count(int u) const { return used_[u].count; }
    int token(int m) const { return tokens_[m]; }
    const int32_t* tokens() const { return tokens_.data(); }
    const float* gain() const { return gain_.data(); }

  private:
    struct Used {
        int expert, first, count;
    };
    int top_k_ = 0, rows_ = 0;
    std::vector<float> scores_, gates_, gain_;
    std::vector<int32_t> chosen_, tokens_, counts_;
    std::vector<Used> used_;
};
