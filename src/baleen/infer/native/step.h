// What Python hands over: mirrored field by field in library.py, sizes compared when the library is loaded.
#pragma once

#include "matmul.h"

struct Shape {
    int32_t hidden, vocab, trunk_layers, layers;  // layers: trunk and MTP
    int32_t heads, q_rank, rank, nope, rope, value;  // q_rank 0: queries straight from the hidden state
    int32_t experts, top_k, groups, top_groups, expert_width;
    int32_t normalise_gates, interleave;
    float gate_scale, softmax_scale, norm_eps, latent_norm_eps;
};

// Stacks: q_b, w_uk, w_uv one a head; gate_up, down one a routed expert. gate_up alternates panels of gate and of up.
struct Layer {
    const float *input_norm, *post_norm, *q_norm, *latent_norm;
    Matrix qkv_a, q_b, w_uk, w_uv, o;
    Matrix router;  // out 0: a dense layer
    const float* correction;
    Matrix shared_gate_up, shared_down, gate_up, down;  // a dense layer's MLP is `shared`; out 0: none
    const float *embed_norm, *hidden_norm, *head_norm;  // MTP layers only
    Matrix join;
};

struct Model {
    Shape shape;
    const Layer* layers;
    const float* embedding;  // [vocab, hidden]
    const float* norm;
    Matrix head;
    const float *cos, *sin;  // [positions, rope / 2]
};

// N new tokens of B sequences, one sequence after the other: baleen.model.cache.Batch, flattened. Or no tokens, and
// hidden states of which logits are asked for.
struct Step {
    int32_t tokens, sequences, outputs, threads;
    int32_t mtp_depth, page_size;  // mtp_depth: -1 for the trunk, else which MTP layer
    const int64_t* ids;            // [tokens]
    const int64_t *starts, *counts;  // [sequences] first position and number of new tokens
    const int64_t *tables, *table_at;  // pages of all sequences; [sequences] where each one's begin
    int64_t layer_step;                // floats of `pages` from layer to layer
    float* pages;                      // [layers, pages, page_size, rank + rope]
    const float* hidden_in;            // [tokens, hidden], for MTP; without tokens: [outputs, hidden], for logits
    float* hidden;                     // [tokens, hidden] after the last norm
    float* logits;                     // [outputs, vocab padded to 16]
    int64_t* routes;                   // [layers with experts, tokens, top_k], or null
};
