// A whole forward of a DeepSeek-V3 network over a few tokens of each of several sequences, in one parallel region.
//
// Its twin is baleen.model: the same function, operator by operator. What differs is how: all threads walk through the
// layers together, and every matrix is read once, by panels.

#include "attention.h"
#include "moe.h"
#include "pack.h"
#include "step.h"
#include "team.h"

#include <omp.h>
#include <sys/mman.h>
#include <vector>

namespace {

// x normalised to root mean square 1, times weight, over n values; y is zero from n to the next multiple of 16.
void rms_norm(const float* x, const float* weight, float* y, int n, float eps) {
    vf squares{};
    int i = 0;
    for (; i + LANES <= n; i += LANES) squares += load(x + i) * load(x + i);
    float total = sum(squares);
    for (int j = i; j < n; j++) total += x[j] * x[j];
    const float scale = 1.0f / std::sqrt(total / n + eps);
    for (i = 0; i + LANES <= n; i += LANES) store(y + i, load(x + i) * scale * load(weight + i));
    for (; i < n; i++) y[i] = x[i] * scale * weight[i];
    for (; i < padded(n); i++) y[i] = 0;
}

void rotate(const float* x, float* y, const float* cos, const float* sin, int dim, bool interleave) {
    const int half = dim / 2;
    for (int j = 0; j < half; j++) {
        const float a = x[interleave ? 2 * j : j], b = x[interleave ? 2 * j + 1 : j + half];
        y[j] = a * cos[j] - b * sin[j];
        y[j + half] = b * cos[j] + a * sin[j];
    }
}

// Memory that grows and is never cleared; 64-byte aligned.
template <class T> class Buffer {
  public:
    ~Buffer() { free(data_); }
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    T* room(size_t count) {
        if (count > count_) {
            free(data_);
            data_ = (T*)aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64);
            count_ = count;
        }
        return data_;
    }

  private:
    T* data_ = nullptr;
    size_t count_ = 0;
};

struct Scratch {  // of one thread
    Buffer<float> head, more, scores, product;
};

class Forward {
  public:
    Forward(const Model& model) : model_(model), s_(model.shape) {}

    void run(const Step& step) {
        prepare(step);
#pragma omp parallel num_threads(step.threads)
        {
#pragma omp single
            {
                team_.size = omp_get_num_threads();
                if ((int)scratch_.size() < team_.size) scratch_ = std::vector<Scratch>(team_.size);
            }
            Worker worker{team_, omp_get_thread_num()};
            if (step.tokens) whole(step, worker, scratch_[worker.me]);
            if (step.outputs) project(step, worker);
        }
    }

  private:
    const Model model_;
    const Shape s_;
    Team team_;
    std::vector<Scratch> scratch_;
    Sequences sequences_;
    Plan plan_;
    Buffer<float> x_, h_, qkv_, q_latent_, query_, partial_, values_, act_, rows_, scores_;
    int N_ = 0, d_ = 0, few_ = 0;

    void prepare(const Step& step) {
        N_ = std::max(step.tokens, step.outputs);
        d_ = padded(s_.hidden);
        few_ = N_ <= 4;
        sequences_.find(step, s_);
        x_.room((size_t)N_ * d_);
        h_.room((size_t)N_ * d_ * 2);
        qkv_.room((size_t)N_ * padded(s_.q_rank + s_.rank + s_.rope));
        q_latent_.room((size_t)N_ * padded(std::max(1, s_.q_rank)));
        query_.room((size_t)N_ * s_.heads * (s_.rank + s_.rope));
        partial_.room(sequences_.partial_floats());
        values_.room((size_t)N_ * padded(s_.heads * s_.value));
        plan_.reserve(N_, s_.experts, s_.top_k);
    }

    void whole(const Step& step, const Worker& w, Scratch& scratch) {
        const bool trunk = step.mtp_depth < 0;
        float *x = x_.room(0), *h = h_.room(0);
        const int first = trunk ? 0 : s_.trunk_layers + step.mtp_depth;
        const int last = trunk ? s_.trunk_layers : first + 1;
        const Layer& layer = model_.layers[first];
        if (trunk) {
            w.each(N_, few_, [&](int n) { embed(step.ids[n], x + (size_t)n * d_); });
        } else {
            w.each(N_, few_, [&](int n) {
                float* joined = h + (size_t)n * 2 * s_.hidden;
                embed(step.ids[n], x + (size_t)n * d_);
                // In two steps: the norm pads its result.
                float* normed = scratch.head.room(2 * d_);
                rms_norm(x + (size_t)n * d_, layer.embed_norm, normed, s_.hidden, s_.norm_eps);
                memcpy(joined, normed, s_.hidden * 4);
                rms_norm(step.hidden_in + (size_t)n * s_.hidden, layer.hidden_norm, normed, s_.hidden, s_.norm_eps);
                memcpy(joined + s_.hidden, normed, s_.hidden * 4);
            });
            linear(layer.join, h, 2 * s_.hidden, N_, {x, d_}, w);
            w.team.sync();
        }
        int routed = 0;
        for (int i = first; i < last; i++) {
            attend(model_.layers[i], step, step.pages + step.layer_step * i, w, scratch);
            feed_forward(model_.layers[i], step.routes ? step.routes + (size_t)routed * N_ * s_.top_k : nullptr, w, scratch);
            routed += model_.layers[i].router.out > 0;
        }
        const float* norm = trunk ? model_.norm : layer.head_norm;
        w.each(N_, few_, [&](int n) {
            rms_norm(x + (size_t)n * d_, norm, h + (size_t)n * d_, s_.hidden, s_.norm_eps);
            memcpy(step.hidden + (size_t)n * s_.hidden, h + (size_t)n * d_, s_.hidden * 4);
        });
    }

    // Logits of the rows of hidden_in.
    void project(const Step& step, const Worker& w) {
        float* x = x_.room(0);
        w.each(step.outputs, few_, [&](int n) {
            memcpy(x + (size_t)n * d_, step.hidden_in + (size_t)n * s_.hidden, s_.hidden * 4);
            memset(x + (size_t)n * d_ + s_.hidden, 0, (d_ - s_.hidden) * 4);
        });
        linear(model_.head, x, d_, step.outputs, {step.logits, padded(s_.vocab)}, w);
    }

    void embed(int64_t id, float* x) const {
        memcpy(x, model_.embedding + id * s_.hidden, s_.hidden * 4);
        memset(x + s_.hidden, 0, (d_ - s_.hidden) * 4);
    }

    // This thread's panels of a product; nobody else writes them.
    void linear(const Matrix& m, const float* x, long row_step, int rows, Result out, const Worker& w) const {
        out.bias = m.bias;
        const int panels = ceil_div(m.out, PANEL);
        multiply(m, w.begin(panels), w.end(panels), x, row_step, 1, rows, out);
    }

    void attend(const Layer& layer, const Step& step, float* pages, const Worker& w, Scratch& scratch) {
        const int C = s_.rank + s_.rope, qkv_step = padded(s_.q_rank + C), q_step = padded(std::max(1, s_.q_rank));
        float *x = x_.room(0), *h = h_.room(0), *qkv = qkv_.room(0), *q_latent = q_latent_.room(0);
        float *query = query_.room(0), *values = values_.room(0);
        w.each(N_, few_, [&](int n) { rms_norm(x + (size_t)n * d_, layer.input_norm, h + (size_t)n * d_, s_.hidden, s_.norm_eps); });
        linear(layer.qkv_a, h, d_, N_, {qkv, qkv_step}, w);
        w.each(N_, few_, [&](int n) {
            const float* from = qkv + (size_t)n * qkv_step;
            if (s_.q_rank) rms_norm(from, layer.q_norm, q_latent + (size_t)n * q_step, s_.q_rank, s_.latent_norm_eps);
            const int at = sequences_.position(n);
            const int64_t page = sequences_.table(n)[at / step.page_size];
            float* latent = pages + (page * step.page_size + at % step.page_size) * C;
            float* normed = scratch.head.room(padded(s_.rank));
            rms_norm(from + s_.q_rank, layer.latent_norm, normed, s_.rank, s_.latent_norm_eps);
            memcpy(latent, normed, s_.rank * 4);
            turn(from + s_.q_rank + s_.rank, latent + s_.rank, at);
        });
        for (int head = w.begin(s_.heads); head < w.end(s_.heads); head++) {
            if (s_.q_rank) absorb(layer, head, q_latent, q_step, query, scratch);
            else absorb(layer, head, h, d_, query, scratch);
        }
        w.team.sync();
        w.team.share(sequences_.items(), [&](int i) {
            attend_part(sequences_, i, step, s_, query, pages, partial_.room(0), scratch.scores.room(sequences_.score_floats()));
        });
        w.team.sync();
        for (int head = w.begin(s_.heads); head < w.end(s_.heads); head++) {
            float* mixed = scratch.head.room((size_t)N_ * s_.rank);
            float* value = scratch.more.room((size_t)N_ * padded(s_.value));
            for (int n = 0; n < N_; n++) join_parts(sequences_, n, head, s_, partial_.room(0), mixed + (size_t)n * s_.rank);
            const int step_v = padded(s_.value);
            multiply(nth(layer.w_uv, head), 0, step_v / PANEL, mixed, s_.rank, 1, N_, {value, step_v});
            for (int n = 0; n < N_; n++)
                memcpy(values + (size_t)n * s_.heads * s_.value + head * s_.value, value + (size_t)n * step_v, s_.value * 4);
        }
        w.team.sync();
        linear(layer.o, values, s_.heads * s_.value, N_, {x, d_, true}, w);
    }

    void turn(const float* x, float* y, int at) const {
        const size_t row = (size_t)at * (s_.rope / 2);
        rotate(x, y, model_.cos + row, model_.sin + row, s_.rope, s_.interleave);
    }

    // One head's queries of all tokens, W^UK folded in: query[n][head] = softmax_scale * [W^UK q^C ; q^R], C floats.
    void absorb(const Layer& layer, int head, const float* from, int from_step, float* query,
                Scratch& scratch) const {
        const int dim = padded(s_.nope + s_.rope), rank = padded(s_.rank), C = s_.rank + s_.rope;
        float* q = scratch.head.room((size_t)N_ * dim);
        float* folded = scratch.more.room((size_t)N_ * rank);
        multiply(nth(layer.q_b, head), 0, dim / PANEL, from, from_step, 1, N_, {q, dim});
        multiply(nth(layer.w_uk, head), 0, rank / PANEL, q, dim, 1, N_, {folded, rank});
        for (int n = 0; n < N_; n++) {
            float* out = query + ((size_t)n * s_.heads + head) * C;
            turn(q + (size_t)n * dim + s_.nope, out + s_.rank, sequences_.position(n));
            for (int c = 0; c < s_.rank; c++) out[c] = folded[(size_t)n * rank + c] * s_.softmax_scale;
            for (int c = s_.rank; c < C; c++) out[c] *= s_.softmax_scale;
        }
    }

    void feed_forward(const Layer& layer, int64_t* routes, const Worker& w, Scratch& scratch) {
        const int E = layer.router.out, score_step = padded(std::max(1, E));
        float *x = x_.room(0), *h = h_.room(0), *scores = nullptr;
        w.each(N_, few_, [&](int n) { rms_norm(x + (size_t)n * d_, layer.post_norm, h + (size_t)n * d_, s_.hidden, s_.norm_eps); });
        if (E) {
            scores = plan_.scores();
            linear(layer.router, h, d_, N_, {scores, score_step}, w);
            w.each(N_, few_, [&](int n) {
                choose(s_, scores + (size_t)n * score_step, layer.correction, plan_.chosen(n), plan_.gates(n));
                if (routes) std::copy_n(plan_.chosen(n), s_.top_k, routes + (size_t)n * s_.top_k);
            });
        }
        const int shared_width = layer.shared_down.out ? layer.shared_down.in : 0;
        w.team.sync([&] {
            plan_.group(N_, E ? s_.experts : 0);
            act_.room((size_t)plan_.rows() * padded(s_.expert_width) + (size_t)N_ * padded(std::max(1, shared_width)));
            rows_.room((size_t)plan_.rows() * d_);
        });
        float *act = act_.room(0), *shared_act = act + (size_t)plan_.rows() * padded(s_.expert_width);
        const float* rows = h;
        if (N_ > 1 && E) {  // an expert's tokens side by side
            float* gathered = rows_.room(0);
            for (int m = w.begin(plan_.rows()); m < w.end(plan_.rows()); m++)
                memcpy(gathered + (size_t)m * d_, h + (size_t)plan_.token(m) * d_, d_ * 4);
            rows = gathered;
            w.team.sync();
        }
        // Up: pieces of two panels of gate and two of up, first the shared experts', then the routed ones'.
        const int shared_pieces = ceil_div(ceil_div(shared_width, PANEL), 2), pieces = ceil_div(ceil_div(s_.expert_width, PANEL), 2);
        w.team.share(shared_pieces + plan_.used() * pieces, [&](int i) {
            if (i < shared_pieces) {
                swiglu(layer.shared_gate_up, i, h, N_, shared_act, padded(shared_width), scratch);
                return;
            }
            const int u = (i - shared_pieces) / pieces, m = plan_.first(u);
            swiglu(nth(layer.gate_up, plan_.expert(u)), (i - shared_pieces) % pieces, N_ > 1 ? rows + (size_t)m * d_ : rows,
                   plan_.count(u), act + (size_t)m * padded(s_.expert_width), padded(s_.expert_width), scratch);
        });
        w.team.sync();
        // Down, onto the residual: each thread has its own outputs of every expert.
        const int panels = d_ / PANEL, begin = w.begin(panels), end = w.end(panels);
        for (int u = 0; u < plan_.used(); u++) {
            const int m = plan_.first(u), width = padded(s_.expert_width);
            multiply(nth(layer.down, plan_.expert(u)), begin, end, act + (size_t)m * width, width, 1, plan_.count(u),
                     {x, d_, true, nullptr, plan_.gain() + m, plan_.tokens() + m});
        }
        if (shared_width)
            multiply(layer.shared_down, begin, end, shared_act, padded(shared_width), 1, N_, {x, d_, true});
    }

    // Piece i of silu(gate(h)) * up(h): act[row][output].
    void swiglu(const Matrix& gate_up, int i, const float* h, int rows, float* act, int act_step, Scratch& scratch) const {
        const int begin = 4 * i, end = std::min(begin + 4, ceil_div(gate_up.out, PANEL));
        float* both = scratch.product.room((size_t)rows * 4 * PANEL);
        multiply(gate_up, begin, end, h, d_, 1, rows, {both - begin * PANEL, 4 * PANEL});
        for (int r = 0; r < rows; r++)
            for (int p = begin; p < end; p += 2)
                for (int v = 0; v < PANEL; v += LANES) {
                    const float* gate = both + (size_t)r * 4 * PANEL + (p - begin) * PANEL + v;
                    const vf g = load(gate);
                    store(act + (size_t)r * act_step + p / 2 * PANEL + v, g * sigmoid(g) * load(gate + PANEL));
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
}
