// Absorbed latent attention over pages. The queries of one sequence, T tokens times H heads, are lanes in groups of
// 16: packed like a panel, so that scores and weighted sums are products of the same kernel as everything else.
//
// Keys are taken in parts of 256 positions, whatever the batch and the number of threads: results depend on neither.
#pragma once

#include "step.h"

#include <vector>

constexpr int PART = 256;
constexpr float MASKED = -1e30f;

class Sequences {
  public:
    struct Group {  // 16 lanes of one sequence
        int first_token, first_lane, lanes, parts;
        int item;  // of its first part
    };
    struct Item {
        int group, part;
    };
    struct Token {
        int position, first, group;  // first token and first group of its sequence
        const int64_t* table;
    };

    void find(const Step& step, const Shape& s) {
        groups_.clear(), items_.clear(), tokens_.clear();
        heads_ = s.heads, rank_ = s.rank, channels_ = s.rank + s.rope;
        for (int b = 0, first = 0; b < step.sequences; first += (int)step.counts[b++]) {
            const int start = (int)step.starts[b], count = (int)step.counts[b];
            for (int i = 0; i < count; i++) tokens_.push_back({start + i, first, (int)groups_.size(), step.tables + step.table_at[b]});
            for (int lane = 0; lane < count * heads_; lane += PANEL) {
                const int lanes = std::min(PANEL, count * heads_ - lane);
                const int parts = (start + (lane + lanes - 1) / heads_) / PART + 1;
                groups_.push_back({first, lane, lanes, parts, (int)items_.size()});
                for (int part = 0; part < parts; part++) items_.push_back({(int)groups_.size() - 1, part});
            }
        }
    }

    int position(int token) const { return tokens_[token].position; }
    const int64_t* table(int token) const { return tokens_[token].table; }
    int items() const { return (int)items_.size(); }
    const Item& item(int i) const { return items_[i]; }
    const Group& group(int g) const { return groups_[g]; }
    // The group and lane of one head of one token.
    const Group& group_of(int token, int head, int& lane) const {
        const int index = (token - tokens_[token].first) * heads_ + head;
        lane = index % PANEL;
        return groups_[tokens_[token].group + index / PANEL];
    }

    // Of each item: the greatest score and the sum of exponentials a lane, then [rank][16] weighted latents.
    size_t part_floats() const { return (size_t)(rank_ + 2) * PANEL; }
    size_t partial_floats() const { return part_floats() * items_.size(); }
    size_t score_floats() const { return (size_t)(PART + channels_) * PANEL; }

  private:
    int heads_ = 0, rank_ = 0, channels_ = 0;
    std::vector<Group> groups_;
    std::vector<Item> items_;
    std::vector<Token> tokens_;
};

// query: [tokens, heads, C], scaled. pages: of this layer. scratch: score_floats().
inline void attend_part(const Sequences& sequences, int index, const Step& step, const Shape& s, const float* query,
                        const float* pages, float* partial, float* scratch) {
    const auto [g, part] = sequences.item(index);
    const auto& group = sequences.group(g);
    const int C = s.rank + s.rope;
    float *packed = scratch, *scores = scratch + (size_t)C * PANEL;
    alignas(64) int32_t see[PANEL] = {};  // last position a lane sees
    for (int lane = 0; lane < PANEL; lane++) {
        const int i = group.first_lane + std::min(lane, group.lanes - 1), token = group.first_token + i / s.heads;
        const float* q = query + ((size_t)token * s.heads + i % s.heads) * C;
        see[lane] = sequences.position(token);
        for (int c = 0; c < C; c++) packed[c * PANEL + lane] = q[c];
    }
    const int32_t least = *std::min_element(see, see + PANEL), most = *std::max_element(see, see + PANEL);
    const int begin = part * PART, end = std::min(begin + PART, most + 1);
    const int64_t* table = sequences.table(group.first_token);

    // Calls work(first, count, latents) for every run of positions that lie side by side.
    auto runs = [&](auto work) {
        const int size = step.page_size;
        for (int at = begin; at < end;) {
            const int64_t page = table[at / size];
            int next = std::min((at / size + 1) * size, end);
            while (next < end && table[next / size] == page + next / size - at / size) next = std::min(next + size, end);
            work(at - begin, next - at, pages + (page * size + at % size) * C);
            at = next;
        }
    };
    runs([&](int first, int count, const float* latents) {
        multiply({(const char*)packed, nullptr, C, PANEL, F32, 0}, 0, 1, latents, C, 1, count, {scores + first * PANEL, PANEL});
    });
    float* out = partial + sequences.part_floats() * index;
    memset(out, 0, sequences.part_floats() * sizeof(float));
    for (int v = 0; v < VECS; v++) {
        const vi sees = *(const vi*)(see + v * LANES);
        vf top = splat(MASKED), total{};
        for (int i = 0; i < end - begin; i++) {
            float* at = scores + i * PANEL + v * LANES;
            if (begin + i > least) store(at, (vi{} + (begin + i)) <= sees ? load(at) : splat(MASKED));
            top = maximum(top, load(at));
        }
        for (int i = 0; i < end - begin; i++) {
            float* at = scores + i * PANEL + v * LANES;
            const vf p = exp(load(at) - top);
            store(at, p);
            total += p;
        }
        store(out + v * LANES, top);
        store(out + PANEL + v * LANES, total);
    }
    runs([&](int first, int count, const float* latents) {
        multiply({(const char*)(scores + first * PANEL), nullptr, count, PANEL, F32, 0}, 0, 1, latents, 1, C, s.rank,
                 {out + 2 * PANEL, PANEL, true});
    });
}

// The parts of one head of one token, weighted against each other: mixed[rank].
inline void join_parts(const Sequences& sequences, int token, int head, const Shape& s, const float* partial, float* mixed) {
    int lane;
    const auto& group = sequences.group_of(token, head, lane);
    const float* first = partial + sequences.part_floats() * group.item + lane;
    float top = MASKED, total = 0;
    for (int part = 0; part < group.parts; part++) top = std::max(top, first[sequences.part_floats() * part]);
    std::fill_n(mixed, s.rank, 0.0f);
    for (int part = 0; part < group.parts; part++) {
        const float* from = first + sequences.part_floats() * part;
        const float weight = exp(splat(from[0] - top))[0];
        total += weight * from[PANEL];
        for (int c = 0; c < s.rank; c++) mixed[c] += weight * from[(2 + c) * PANEL];
    }
    for (int c = 0; c < s.rank; c++) mixed[c] /= total;
}
