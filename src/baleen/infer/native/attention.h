// Absorbed latent attention over pages. The queries of one sequence, T tokens times H heads, are lanes in groups of
// 16: packed like a panel, so that scores and weighted sums are products of the same kernel as everything else.
//
// Keys are taken in parts of 64 positions, whatever the batch and the number of threads: results depend on neither.
#pragma once

#include "matmul.h"
#include "step.h"

#include <vector>

constexpr int PART = 64;
constexpr float MASKED = -1e30f;

// What the groups of a step are, and who works on which.
class Sequences {
  public:
    struct Group {  // 16 lanes of one sequence; lane i is head i % H of token i / H
        int first_token, first_lane, lanes, parts, item;
        int done;  // parts, of those that are taken one by one
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
        heads_ = s.heads, longest_ = 0;
        for (int b = 0, first = 0; b < step.sequences; first += (int)step.counts[b++]) {
            const int start = (int)step.starts[b], count = (int)step.counts[b], group = (int)groups_.size();
            for (int i = 0; i < count; i++) tokens_.push_back({start + i, first, group, step.tables + step.table_at[b]});
            for (int lane = 0; lane < count * heads_; lane += PANEL) {
                const int lanes = std::min(PANEL, count * heads_ - lane);
                const int parts = (start + (lane + lanes - 1) / heads_) / PART + 1;
                groups_.push_back({first, lane, lanes, parts, (int)items_.size(), 0});
                for (int part = 0; part < parts; part++) items_.push_back({(int)groups_.size() - 1, part});
                longest_ = std::max(longest_, parts);
            }
        }
        // With much to do each thread takes whole groups, and only their parts are kept at once.
        is_shared_ = (int)groups_.size() < 4 * step.threads;
    }

    bool is_shared() const { return is_shared_; }
    int work() const { return (int)(is_shared_ ? items_.size() : groups_.size()); }
    int parts_at_once() const { return is_shared_ ? (int)items_.size() : longest_; }
    int groups() const { return (int)groups_.size(); }
    Item item(int i) const { return items_[i]; }
    Group& group(int g) { return groups_[g]; }
    const Token& token(int n) const { return tokens_[n]; }

    // The group of one head of one token, and its lane there.
    std::pair<int, int> place(int n, int head) const {
        const int index = (n - tokens_[n].first) * heads_ + head;
        return {tokens_[n].group + index / PANEL, index % PANEL};
    }

  private:
    int heads_ = 0, longest_ = 0;
    bool is_shared_ = true;
    std::vector<Group> groups_;
    std::vector<Item> items_;
    std::vector<Token> tokens_;
};

// Products by a panel of which only the first `lanes` outputs are wanted: half a register where that will do. A lane's
// sum is the same whichever is taken, and goes on from what is there: into how many calls it is cut, by pages that lie
// apart, can't be told from it.
template <class V, int ROWS>
inline void lane_tile(const float* w, const Rows& rows, int in, float* out, bool add) {
    typedef V V_any __attribute__((aligned(4), may_alias));
    V acc[ROWS];
    for (int r = 0; r < ROWS; r++) acc[r] = add ? *(const V_any*)(out + r * PANEL) : V{};
    const float* x = rows.x;
    for (int k = 0; k < in; k++, x += rows.in_step) {
        const V at = *(const V_any*)(w + k * PANEL);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++) acc[r] += at * x[r * rows.row_step];
    }
    for (int r = 0; r < ROWS; r++) *(V_any*)(out + r * PANEL) = acc[r];
}

template <class V, int... LESS>
inline void lane_tiles(const float* w, const Rows& x, int count, int in, float* out, bool add, std::integer_sequence<int, LESS...>) {
    constexpr int MOST = sizeof...(LESS);
    for (int row = 0, rows; row < count; row += rows) {
        rows = std::min(MOST, count - row);
        ((rows == LESS + 1 ? lane_tile<V, LESS + 1>(w, x.from(row), in, out + row * PANEL, add) : (void)0), ...);
    }
}

// out [count][16] = x times w [in][16], or added.
inline void lane_products(int lanes, const float* w, const Rows& x, int count, int in, float* out, bool add) {
    typedef float half __attribute__((vector_size(LANES * 2)));
    constexpr auto tiles = std::make_integer_sequence<int, 12>();
    for (int lane = 0; lane < lanes; lane += LANES)
        if (lanes - lane <= LANES / 2) lane_tiles<half>(w + lane, x, count, in, out + lane, add, tiles);
        else lane_tiles<vf>(w + lane, x, count, in, out + lane, add, tiles);
}

// Of one part: the greatest score and the sum of exponentials of each lane, then [rank][16] weighted latents.
inline size_t part_floats(const Shape& s) { return (size_t)(s.rank + 2) * PANEL; }
inline size_t attention_scratch(const Shape& s) { return (size_t)(PART + s.rank + s.rope) * PANEL; }

// query: [tokens, heads, C], scaled. pages: of this layer.
inline void attend_part(const Sequences& sequences, const Sequences::Group& group, int part, int page_size, const Shape& s,
                        const float* query, const float* pages, float* out, float* scratch) {
    const int C = s.rank + s.rope;
    float *packed = scratch, *scores = scratch + (size_t)C * PANEL;
    alignas(64) int32_t sees[PANEL] = {};  // the last position, of each lane
    memset(packed, 0, (size_t)C * PANEL * sizeof(float));
    int32_t least = INT32_MAX, most = 0;
    for (int lane = 0; lane < group.lanes; lane++) {
        const int i = group.first_lane + lane, token = group.first_token + i / s.heads;
        const float* q = query + ((size_t)token * s.heads + i % s.heads) * C;
        sees[lane] = sequences.token(token).position;
        least = std::min(least, sees[lane]), most = std::max(most, sees[lane]);
        for (int c = 0; c < C; c++) packed[c * PANEL + lane] = q[c];
    }
    const int begin = part * PART, end = std::min(begin + PART, most + 1);
    const int64_t* table = sequences.token(group.first_token).table;

    // Calls work(first, count, latents) for every run of positions that lie side by side.
    auto runs = [&](auto work) {
        for (int at = begin; at < end;) {
            const int64_t page = table[at / page_size];
            int next = std::min((at / page_size + 1) * page_size, end);
            while (next < end && table[next / page_size] == page + next / page_size - at / page_size)
                next = std::min(next + page_size, end);
            work(at - begin, next - at, pages + (page * page_size + at % page_size) * C);
            at = next;
        }
    };
    runs([&](int first, int count, const float* latents) {
        lane_products(group.lanes, packed, {latents, C}, count, C, scores + first * PANEL, false);
    });
    memset(out, 0, part_floats(s) * sizeof(float));
    for (int v = 0; v * LANES < group.lanes; v++) {
        const vi last = *(const vi*)(sees + v * LANES);
        vf top = splat(MASKED), total{};
        for (int i = 0; i < end - begin; i++) {
            float* at = scores + i * PANEL + v * LANES;
            if (begin + i > least) store(at, (vi{} + (begin + i)) <= last ? load(at) : splat(MASKED));
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
        lane_products(group.lanes, scores + first * PANEL, {latents, 1, C}, s.rank, count, out + 2 * PANEL, true);
    });
}

// The parts of a group, side by side, weighted against each other: out [rank][16].
inline void join_parts(const float* parts, int count, const Shape& s, float* out) {
    const size_t step = part_floats(s);
    for (int v = 0; v < PANEL; v += LANES) {
        vf top = splat(MASKED), total{};
        for (int part = 0; part < count; part++) top = maximum(top, load(parts + step * part + v));
        for (int part = 0; part < count; part++)
            total += exp(load(parts + step * part + v) - top) * load(parts + step * part + PANEL + v);
        for (int part = 0; part < count; part++) {
            const float* from = parts + step * part + v;
            const vf weight = exp(load(from) - top) / total;
            for (int c = 0; c < s.rank; c++) {
                const vf own = weight * load(from + (2 + c) * PANEL);
                store(out + c * PANEL + v, part ? load(out + c * PANEL + v) + own : own);
            }
        }
    }
}

// One piece of `sequences.work()`. partial: parts_at_once() parts, shared by all threads or this thread's own.
// joined: [groups][rank][16].
inline void attend_piece(Sequences& sequences, int i, int page_size, const Shape& s, const float* query, const float* pages,
                         float* partial, float* joined, float* scratch) {
    if (sequences.is_shared()) {
        const auto [g, part] = sequences.item(i);
        auto& group = sequences.group(g);
        attend_part(sequences, group, part, page_size, s, query, pages, partial + part_floats(s) * i, scratch);
        if (__atomic_add_fetch(&group.done, 1, __ATOMIC_ACQ_REL) < group.parts) return;
        group.done = 0;  // for the next layer
        join_parts(partial + part_floats(s) * group.item, group.parts, s, joined + (size_t)g * s.rank * PANEL);
    } else {
        const auto& group = sequences.group(i);
        for (int part = 0; part < group.parts; part++)
            attend_part(sequences, group, part, page_size, s, query, pages, partial + part_floats(s) * part, scratch);
        join_parts(partial, group.parts, s, joined + (size_t)i * s.rank * PANEL);
    }
}
