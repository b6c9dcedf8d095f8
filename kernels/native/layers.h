// Whole layers in one call: what a step of a small model costs beside its products is the calls.
#pragma once

#include "attention.h"
#include "layer.h"
#include "linear.h"
#include "tiles.h"

// Of a linear layer, as panels_of has it; scale null: panels of T, else of 8-bit integers.
struct Matrix {
    const void *panels;
    const float *scale, *bias;
    Index size, outputs;

    template <class T>
    void multiply(const T *x, Index rows, T *out) const {
        if (scale)
            linear<T, int8_t>(x, static_cast<const int8_t *>(panels), scale, bias, rows, size, outputs, out);
        else if constexpr (std::is_same_v<T, float>)
            linear<float, float>(x, static_cast<const float *>(panels), nullptr, bias, rows, size, outputs, out);
        else
            tile_linear(x, static_cast<const Bfloat16 *>(panels), nullptr, bias, rows, size, outputs, out);
    }
};

// input_norm: of what qkv reads; norm: of what gate_up reads; window 0: none.
struct Layer {
    const void *input_norm;
    Matrix qkv, o;
    const void *norm;
    Matrix gate_up, down;
    Index window;
};

// What the layers of a pass over ``rows`` rows share; ``parts``: layouts whose rows begin at ``firsts``.
template <class T>
struct Pass {
    Index rows, hidden, heads, kv_heads, size;
    float scale, eps;
    const T *cos, *sin;
    const Index *slots;
    const bool *live;
    const Layout *parts;
    const Index *firsts;
    Index part_count;
};

template <class T>
std::unique_ptr<T[]> room(Index count) { return std::unique_ptr<T[]>(new T[count]); }

// x: what qkv reads; residual gets what attention adds, and delta what is to be added to it then.
template <class T>
void run_layer(const Layer &own, const Pass<T> &pass, const T *x, T *residual, T *k_cache, T *v_cache, T *delta) {
    const Index rows = pass.rows, all = (pass.heads + 2 * pass.kv_heads) * pass.size, width = pass.heads * pass.size;
    auto qkv = room<T>(rows * all), q = room<T>(rows * width), attended = room<T>(rows * width), normed = room<T>(rows * pass.hidden);
    auto gate_up = room<T>(rows * own.gate_up.outputs), gated = room<T>(rows * own.down.size);
    own.qkv.multiply(x, rows, qkv.get());
    rope_store(
        qkv.get(), all, qkv.get() + width + pass.kv_heads * pass.size, all, pass.cos, pass.sin, pass.slots, pass.live, rows, pass.heads,
        pass.kv_heads, pass.size, k_cache, v_cache, q.get());
    for (Index part = 0; part < pass.part_count; part++)
        tree_attention(
            q.get() + pass.firsts[part] * width, pass.parts[part].rows * width, width, pass.size, k_cache, v_cache, pass.parts + part,
            own.window, pass.heads, pass.kv_heads, pass.size, pass.scale, attended.get() + pass.firsts[part] * width);
    own.o.multiply(attended.get(), rows, delta);
    add_rms_norm(residual, delta, static_cast<const T *>(own.norm), pass.eps, rows, pass.hidden, residual, normed.get());
    own.gate_up.multiply(normed.get(), rows, gate_up.get());
    gated_silu(gate_up.get(), rows, own.down.size, gated.get());
    own.down.multiply(gated.get(), rows, delta);
}

// hidden [rows, hidden] goes through ``count`` layers; what the last one adds comes to delta. What the layers ``taps`` read
// comes to tapped [taps, rows, hidden]. A layer's caches begin ``cache_layer`` elements after those before it.
template <class T>
void decoder_layers(
    const Layer *layers, Index count, const Layout *parts, const Index *firsts, Index part_count, const T *cos, const T *sin,
    const Index *slots, const bool *live, T *k_cache, T *v_cache, Index cache_layer, const Index *taps, Index tap_count, Index rows,
    Index hidden_size, Index heads, Index kv_heads, Index size, float scale, float eps, T *hidden, T *delta, T *tapped) {
    const Pass<T> pass{rows, hidden_size, heads, kv_heads, size, scale, eps, cos, sin, slots, live, parts, firsts, part_count};
    auto normed = room<T>(rows * hidden_size);
    for (Index i = 0; i < count; i++) {
        add_rms_norm(
            hidden, i ? delta : nullptr, static_cast<const T *>(layers[i].input_norm), eps, rows, hidden_size, hidden, normed.get());
        for (Index tap = 0; tap < tap_count; tap++)
            if (taps[tap] == i) std::memcpy(tapped + tap * rows * hidden_size, hidden, rows * hidden_size * sizeof(T));
        run_layer(layers[i], pass, normed.get(), hidden, k_cache + i * cache_layer, v_cache + i * cache_layer, delta);
    }
}

// A draft head: what its layer reads is the norm of embeddings beside that of the states before. Flags as in Eagle3Config.
struct Head {
    Layer layer;
    const void *hidden_norm, *norm;
    Matrix lm_head;
    Index norm_before_residual, norm_output;
};

// As Eagle3Head.logits has it; states [batch * rows, hidden], sharpness [batch], null: none.
template <class T>
void head_output(const Head &head, const T *states, const T *sharpness, Index batch, Index rows, Index hidden_size, float eps, T *logits) {
    const Index all = batch * rows;
    auto output = room<T>(all * hidden_size);
    if (head.norm_output)
        std::memcpy(output.get(), states, all * hidden_size * sizeof(T));
    else
        add_rms_norm<T>(states, nullptr, static_cast<const T *>(head.norm), eps, all, hidden_size, nullptr, output.get());
    for (Index i = 0; sharpness && i < all * hidden_size; i++) write(output.get() + i, read(output[i]) * read(sharpness[i / hidden_size / rows]));
    head.lm_head.multiply(output.get(), all, logits);
}

// As Eagle3Head.forward and .logits have it, of ``rows`` rows for each request; table: embeddings; shift [batch, hidden] and sharpness
// [batch] of a request, null: none; logits null: not wanted. hidden [batch * rows, hidden]: the states before, and then those of these rows.
template <class T>
void head_rows(
    const Head *head, const Layout *layout, const T *table, const Index *tokens, const T *cos, const T *sin, const Index *slots,
    const T *shift, const T *sharpness, T *k_cache, T *v_cache, Index batch, Index rows, Index hidden_size, Index heads, Index kv_heads,
    Index size, float scale, float eps, T *hidden, T *logits) {
    const Index all = batch * rows, first = 0;
    const Pass<T> pass{all, hidden_size, heads, kv_heads, size, scale, eps, cos, sin, slots, nullptr, layout, &first, 1};
    auto residual = room<T>(all * hidden_size), normed = room<T>(all * hidden_size), x = room<T>(2 * all * hidden_size);
    auto norm = [&](const T *from, const T *more, const void *weight, T *total) {
        add_rms_norm(from, more, static_cast<const T *>(weight), eps, all, hidden_size, total, normed.get());
    };
    auto beside = [&](Index half) {
        for (Index row = 0; row < all; row++)
            std::memcpy(x.get() + (2 * row + half) * hidden_size, normed.get() + row * hidden_size, hidden_size * sizeof(T));
    };
    for (Index row = 0; row < all; row++)
        std::memcpy(residual.get() + row * hidden_size, table + tokens[row] * hidden_size, hidden_size * sizeof(T));
    norm(residual.get(), nullptr, head->layer.input_norm, nullptr), beside(0);
    norm(hidden, nullptr, head->hidden_norm, nullptr), beside(1);
    std::memcpy(residual.get(), head->norm_before_residual ? normed.get() : hidden, all * hidden_size * sizeof(T));
    for (Index i = 0; shift && i < all * hidden_size; i++)
        write(residual.get() + i, read(residual[i]) + read(shift[i / hidden_size / rows * hidden_size + i % hidden_size]));
    run_layer(head->layer, pass, x.get(), residual.get(), k_cache, v_cache, hidden);  // hidden: what is to be added
    norm(residual.get(), hidden, head->norm, residual.get());
    std::memcpy(hidden, head->norm_output ? normed.get() : residual.get(), all * hidden_size * sizeof(T));
    if (logits) head_output(*head, hidden, sharpness, batch, rows, hidden_size, eps, logits);
}
