// A whole forward of a DeepSeek-V3 network over a few tokens of each of several sequences, in one parallel region.
//
// Its twin is baleen.model: the same function, operator by operator. What differs is how: all threads walk through the
// layers together, and every matrix is read once, by panels.

#include "attention.h"
#include "buffers.h"
#include "draw.h"
#include "moe.h"
#include "pack.h"
#include "step.h"
#include "team.h"

#include <omp.h>
#include <sys/mman.h>
#include <vector>

namespace {

// x [n] normalised to root mean square 1, times weight.
void rms_norm(const float* x, const float* weight, float* y, int n, float eps) {
    vf squares{};
    int i = 0;
    for (; i + LANES <= n; i += LANES) squares += load(x + i) * load(x + i);
    float total = sum(squares);
    for (int j = i; j < n; j++) total += x[j] * x[j];
    const float scale = 1.0f / std::sqrt(total / n + eps);
    for (i = 0; i + LANES <= n; i += LANES) store(y + i, load(x + i) * scale * load(weight + i));
    for (; i < n; i++) y[i] = x[i] * scale * weight[i];
}

void rotate(const float* x, float* y, const float* cos, const float* sin, int dim, bool interleave) {
    const int half = dim / 2;
    for (int j = 0; j < half; j++) {
        const float a = x[interleave ? 2 * j : j], b = x[interleave ? 2 * j + 1 : j + half];
        y[j] = a * cos[j] - b * sin[j];
        y[j + half] = b * cos[j] + a * sin[j];
    }
}

struct Scratch {  // of one thread
    Activations query, mixed;
    Buffer<float> product, folded, attention, partial;
};

class Forward {
  public:
    explicit Forward(const Model& model) : model_(model), s_(model.shape), rounds_(is_integer(model.head.format)) {}

    void run(const Step& step) {
        prepare(step);
#pragma omp parallel num_threads(step.threads)
        {
#pragma omp single
            {
                team_.size = omp_get_num_threads();
                if ((int)scratch_.size() < team_.size) scratch_ = std::vector<Scratch>(team_.size);
            }
            const Worker worker{team_, omp_get_thread_num()};
            if (step.tokens) tokens(step, worker, scratch_[worker.me]);
            else project(step, worker);
        }
    }

  private:
    const Model model_;
    const Shape s_;
    const bool rounds_;  // whether matrices are of integers
    Team team_;
    std::vector<Scratch> scratch_;
    Sequences sequences_;
    Plan plan_;
    Activations h_, joined_, q_latent_, values_, gathered_, act_, shared_act_;
    Buffer<float> x_, qkv_, query_, partial_, attended_;
    int N_ = 0, d_ = 0;  // d_: from row to row of the residual stream, x_
    bool few_ = false;

    float* x(int n) const { return x_.data() + (size_t)n * d_; }

    void prepare(const Step& step) {
        N_ = step.tokens ? step.tokens : step.outputs;
        d_ = padded(s_.hidden);
        few_ = N_ <= 4;
        h_.shape(N_, s_.hidden, rounds_);
        if (!step.tokens) return;
        sequences_.find(step, s_);
        x_.room((size_t)N_ * d_);
        joined_.shape(step.mtp_depth < 0 ? 0 : N_, 2 * s_.hidden, rounds_);
        qkv_.room((size_t)N_ * padded(s_.q_rank + s_.rank + s_.rope));
        q_latent_.shape(N_, s_.q_rank, rounds_);
        query_.room((size_t)N_ * s_.heads * (s_.rank + s_.rope));
        if (sequences_.is_shared()) partial_.room(part_floats(s_) * sequences_.parts_at_once());
        attended_.room((size_t)sequences_.groups() * s_.rank * PANEL);
        values_.shape(N_, s_.heads * s_.value, rounds_);
        plan_.reserve(N_, s_.experts, s_.top_k);
    }

    void tokens(const Step& step, const Worker& w, Scratch& scratch) {
        const bool trunk = step.mtp_depth < 0;
        const int first = trunk ? 0 : s_.trunk_layers + step.mtp_depth, last = trunk ? s_.trunk_layers : first + 1;
        const Layer& head = model_.layers[first];
        w.each(N_, few_, [&](int n) {
            memcpy(x(n), model_.embedding + step.ids[n] * s_.hidden, s_.hidden * 4);
            std::fill(x(n) + s_.hidden, x(n) + d_, 0.0f);
            if (trunk) return;
            rms_norm(x(n), head.embed_norm, joined_.row(n), s_.hidden, s_.norm_eps);
            rms_norm(step.hidden_in + (size_t)n * s_.hidden, head.hidden_norm, joined_.row(n) + s_.hidden, s_.hidden, s_.norm_eps);
            joined_.finish(n);
        });
        if (!trunk) linear(head.join, joined_.rows(), N_, {x(0), d_}, w);
        for (int i = first, routed = 0; i < last; i++) {
            const Layer& layer = model_.layers[i];
            attend(layer, step, step.pages + step.layer_step * i, w, scratch);
            feed_forward(layer, step.routes ? step.routes + (size_t)routed * N_ * s_.top_k : nullptr, w, scratch);
            routed += layer.router.out > 0;
        }
        const float* norm = trunk ? model_.norm : head.head_norm;
        w.each(N_, few_, [&](int n) { rms_norm(x(n), norm, step.hidden + (size_t)n * s_.hidden, s_.hidden, s_.norm_eps); });
    }

    // Logits of the rows of hidden_in.
    void project(const Step& step, const Worker& w) {
        w.each(N_, few_, [&](int n) {
            memcpy(h_.row(n), step.hidden_in + (size_t)n * s_.hidden, s_.hidden * 4);
            h_.finish(n);
        });
        linear(model_.head, h_.rows(), N_, {step.logits, padded(s_.vocab)}, w);
    }

    // This thread's panels of a product: nobody else writes them, and nobody may read them before the next sync.
    void linear(const Matrix& m, const Rows& rows, int count, Result out, const Worker& w) const {
        out.bias = m.bias;
        const int panels = ceil_div(m.out, PANEL);
        multiply(m, w.begin(panels), w.end(panels), rows, count, out);
    }

    void normalised(const float* weight, const Worker& w) {  // x_ -> h_
        w.each(N_, few_, [&](int n) {
            rms_norm(x(n), weight, h_.row(n), s_.hidden, s_.norm_eps);
            h_.finish(n);
        });
    }

    void attend(const Layer& layer, const Step& step, float* pages, const Worker& w, Scratch& scratch) {
        const int C = s_.rank + s_.rope, qkv_step = padded(s_.q_rank + C);
        normalised(layer.input_norm, w);
        linear(layer.qkv_a, h_.rows(), N_, {qkv_.data(), qkv_step}, w);
        w.each(N_, few_, [&](int n) {
            const float* from = qkv_.data() + (size_t)n * qkv_step;
            if (s_.q_rank) {
                rms_norm(from, layer.q_norm, q_latent_.row(n), s_.q_rank, s_.latent_norm_eps);
                q_latent_.finish(n);
            }
            const auto& token = sequences_.token(n);
            const int64_t page = token.table[token.position / step.page_size];
            float* latent = pages + (page * step.page_size + token.position % step.page_size) * C;
            rms_norm(from + s_.q_rank, layer.latent_norm, latent, s_.rank, s_.latent_norm_eps);
            turn(from + s_.q_rank + s_.rank, latent + s_.rank, token.position);
        });
        for (int head = w.begin(s_.heads); head < w.end(s_.heads); head++)
            absorb(layer, head, (s_.q_rank ? q_latent_ : h_).rows(), scratch);
        w.team.sync();
        float* partial = sequences_.is_shared() ? partial_.data() : scratch.partial.room(part_floats(s_) * sequences_.parts_at_once());
        float* room = scratch.attention.room(attention_scratch(s_));
        w.team.share(sequences_.work(), [&](int i) {
            attend_piece(sequences_, i, step.page_size, s_, query_.data(), pages, partial, attended_.data(), room);
        });
        w.team.sync();
        for (int head = w.begin(s_.heads); head < w.end(s_.heads); head++) expand(layer, head, scratch);
        w.each(N_, few_, [&](int n) { values_.finish(n); });
        linear(layer.o, values_.rows(), N_, {x(0), d_, true}, w);
    }

    void turn(const float* from, float* to, int position) const {
        const size_t at = (size_t)position * (s_.rope / 2);
        rotate(from, to, model_.cos + at, model_.sin + at, s_.rope, s_.interleave);
    }

    // One head's queries of all tokens, W^UK folded in: query_[n][head] = softmax_scale * [W^UK q^C ; q^R], C floats.
    void absorb(const Layer& layer, int head, const Rows& from, Scratch& scratch) const {
        const int dim = padded(s_.nope + s_.rope), rank = padded(s_.rank), C = s_.rank + s_.rope;
        float* q = scratch.product.room((size_t)N_ * dim);
        float* folded = scratch.folded.room((size_t)N_ * rank);
        multiply(nth(layer.q_b, head), 0, dim / PANEL, from, N_, {q, dim});
        scratch.query.shape(N_, s_.nope, rounds_);
        for (int n = 0; n < N_; n++) {
            std::copy_n(q + (size_t)n * dim, s_.nope, scratch.query.row(n));
            scratch.query.finish(n);
        }
        multiply(nth(layer.w_uk, head), 0, rank / PANEL, scratch.query.rows(), N_, {folded, rank});
        for (int n = 0; n < N_; n++) {
            float* out = query_.data() + ((size_t)n * s_.heads + head) * C;
            turn(q + (size_t)n * dim + s_.nope, out + s_.rank, sequences_.token(n).position);
            for (int c = 0; c < s_.rank; c++) out[c] = folded[(size_t)n * rank + c] * s_.softmax_scale;
            for (int c = s_.rank; c < C; c++) out[c] *= s_.softmax_scale;
        }
    }

    // W^UV on one head's weighted latents of all tokens: values_[n][head].
    void expand(const Layer& layer, int head, Scratch& scratch) const {
        const int width = padded(s_.value);
        float* value = scratch.product.room((size_t)N_ * width);
        scratch.mixed.shape(N_, s_.rank, rounds_);
        for (int n = 0; n < N_; n++) {
            const auto [group, lane] = sequences_.place(n, head);
            const float* from = attended_.data() + (size_t)group * s_.rank * PANEL + lane;
            for (int c = 0; c < s_.rank; c++) scratch.mixed.row(n)[c] = from[c * PANEL];
            scratch.mixed.finish(n);
        }
        multiply(nth(layer.w_uv, head), 0, width / PANEL, scratch.mixed.rows(), N_, {value, width});
        for (int n = 0; n < N_; n++) std::copy_n(value + (size_t)n * width, s_.value, values_.row(n) + head * s_.value);
    }

    void feed_forward(const Layer& layer, int64_t* routes, const Worker& w, Scratch& scratch) {
        const bool is_routed = layer.router.out > 0;
        normalised(layer.post_norm, w);
        if (is_routed) {
            const int step = padded(s_.experts);
            Rows plain = h_.rows();
            linear(layer.router, plain, N_, {plan_.scores(), step}, w);
            w.each(N_, few_, [&](int n) {
                choose(s_, plan_.scores() + (size_t)n * step, layer.correction, plan_.chosen(n), plan_.gates(n));
                if (routes) std::copy_n(plan_.chosen(n), s_.top_k, routes + (size_t)n * s_.top_k);
            });
        }
        const int shared_width = layer.shared_down.out ? layer.shared_down.in : 0;
        w.team.sync([&] {
            plan_.group(N_, is_routed ? s_.experts : 0);
            act_.shape(plan_.rows(), s_.expert_width, rounds_);
            shared_act_.shape(shared_width ? N_ : 0, shared_width, rounds_);
            gathered_.shape(N_ > 1 ? plan_.rows() : 0, s_.hidden, rounds_);
        });
        if (N_ > 1 && is_routed) {  // an expert's tokens side by side
            for (int m = w.begin(plan_.rows()); m < w.end(plan_.rows()); m++) gathered_.copy(m, h_, plan_.token(m));
            w.team.sync();
        }
        // Up, in pieces of 32 of an expert's inner width: first the shared experts, then the routed ones.
        const int shared_pieces = ceil_div(shared_width, BLOCK), pieces = ceil_div(s_.expert_width, BLOCK);
        w.team.share(shared_pieces + plan_.used() * pieces, [&](int i) {
            if (i < shared_pieces) return swiglu(layer.shared_gate_up, i, h_.rows(), N_, shared_act_, 0, scratch);
            const int u = (i - shared_pieces) / pieces, m = plan_.first(u);
            swiglu(nth(layer.gate_up, plan_.expert(u)), (i - shared_pieces) % pieces, N_ > 1 ? gathered_.rows(m) : h_.rows(),
                   plan_.count(u), act_, m, scratch);
        });
        w.team.sync();
        // Down, onto the residual: each thread has its own outputs of every expert.
        const int panels = d_ / PANEL, begin = w.begin(panels), end = w.end(panels);
        for (int u = 0; u < plan_.used(); u++) {
            const int m = plan_.first(u);
            multiply(nth(layer.down, plan_.expert(u)), begin, end, act_.rows(m), plan_.count(u),
                     {x(0), d_, true, nullptr, plan_.gain() + m, plan_.tokens() + m});
        }
        if (shared_width) multiply(layer.shared_down, begin, end, shared_act_.rows(), N_, {x(0), d_, true});
    }

    // Block i of silu(gate(rows)) * up(rows), to rows `first` and on of `act`.
    void swiglu(const Matrix& gate_up, int i, const Rows& rows, int count, const Activations& act, int first, Scratch& scratch) const {
        const int begin = 4 * i, end = std::min(begin + 4, ceil_div(gate_up.out, PANEL));
        float* both = scratch.product.room((size_t)count * 4 * PANEL);
        multiply(gate_up, begin, end, rows, count, {both - begin * PANEL, 4 * PANEL});
        for (int r = 0; r < count; r++) {
            for (int p = begin; p < end; p += 2)
                for (int v = 0; v < PANEL; v += LANES) {
                    const float* gate = both + (size_t)r * 4 * PANEL + (p - begin) * PANEL + v;
                    const vf g = load(gate);
                    store(act.row(first + r) + p / 2 * PANEL + v, g * sigmoid(g) * load(gate + PANEL));
                }
            act.finish_block(first + r, i);
        }
    }
};

}  // namespace

extern "C" {

int baleen_size(int what) { return what == 0 ? sizeof(Model) : what == 1 ? sizeof(Layer) : sizeof(Step); }

int64_t baleen_matrix_bytes(int in, int out, int format) { return panel_bytes(format, in) * ceil_div(out, PANEL); }

// rows: [out], a multiple of 16; output i is row rows[i] of source [*, in], or zero where rows[i] < 0.
void baleen_pack(const float* source, const int32_t* rows, int in, int out, int format, char* data, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int panel = 0; panel < out / PANEL; panel++) pack_panel(source, rows, panel, in, format, data);
}

// Asks for huge pages, where the system has them.
void baleen_advise(void* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    const uintptr_t page = 4096, begin = ((uintptr_t)data + page - 1) / page * page;
    const uintptr_t end = ((uintptr_t)data + bytes) / page * page;
    if (end > begin) madvise((void*)begin, end - begin, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

void* baleen_open(const Model* model) { return new Forward(*model); }

void baleen_step(void* forward, const Step* step) { ((Forward*)forward)->run(*step); }

void baleen_close(void* forward) { delete (Forward*)forward; }

// One token a row of logits: [rows] temperatures, keys and tokens; `step` floats from row to row.
void baleen_draw(const float* logits, int64_t step, int rows, int vocab, const float* temperatures, const Key* keys,
                 int64_t* tokens, int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> bounds(vocab);
#pragma omp for
        for (int r = 0; r < rows; r++)
            tokens[r] = draw(logits + r * step, vocab, temperatures[r], keys[r], bounds.data());
    }
}
}
