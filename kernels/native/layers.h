// Whole passes in one call: what a step of a small model costs beside its products is the calls.
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

// A model's, or a draft head's.
struct Shape {
    Index hidden, heads, kv_heads, size;
    float scale, eps;
};

template <class T>
std::unique_ptr<T[]> room(Index count) { return std::unique_ptr<T[]>(new T[count]); }

// What a pass over ``rows`` rows computes in between.
template <class T>
struct Room {
    std::unique_ptr<T[]> qkv, q, attended, normed, gate_up, gated;

    Room(const Layer &layer, const Shape &shape, Index rows)
        : qkv(room<T>(rows * layer.qkv.outputs)), q(room<T>(rows * layer.o.size)), attended(room<T>(rows * layer.o.size)),
          normed(room<T>(rows * shape.hidden)), gate_up(room<T>(rows * layer.gate_up.outputs)), gated(room<T>(rows * layer.down.size)) {}
};

// What the layers of a pass over ``rows`` rows share; cos, sin and places as rope_store has them; ``parts``: layouts whose rows begin at
// ``firsts``.
template <class T>
struct Pass {
    Index rows;
    const T *cos, *sin;
    const Index *places, *slots;
    const Layout *parts;
    const Index *firsts;
    Index part_count;
};

// x: what qkv reads; residual gets what attention adds, and delta what is to be added to it then.
template <class T>
void run_layer(
    const Layer &own, const Shape &shape, const Pass<T> &pass, const Room<T> &room, const T *x, T *residual, T *k_cache, T *v_cache, T *delta) {
    const Index rows = pass.rows, all = own.qkv.outputs, width = own.o.size;
    own.qkv.multiply(x, rows, room.qkv.get());
    rope_store<T>(
        room.qkv.get(), all, room.qkv.get() + width + shape.kv_heads * shape.size, all, pass.cos, pass.sin, pass.places, pass.slots,
        nullptr, rows, shape.heads, shape.kv_heads, shape.size, k_cache, v_cache, room.q.get());
    for (Index part = 0; part < pass.part_count; part++) {
        const Index first = pass.firsts[part] * width;
        tree_attention(
            room.q.get() + first, pass.parts[part].rows * width, width, shape.size, k_cache, v_cache, pass.parts + part, own.window,
            shape.heads, shape.kv_heads, shape.size, shape.scale, room.attended.get() + first);
    }
    own.o.multiply(room.attended.get(), rows, delta);
    add_rms_norm(residual, delta, static_cast<const T *>(own.norm), shape.eps, rows, shape.hidden, residual, room.normed.get());
    own.gate_up.multiply(room.normed.get(), rows, room.gate_up.get());
    gated_silu(room.gate_up.get(), rows, own.down.size, room.gated.get());
    own.down.multiply(room.gated.get(), rows, delta);
}

// A model; table: its embeddings; cos, sin [angles, size].
struct Decoder {
    const void *table, *cos, *sin, *norm;
    Matrix lm_head;
    const Layer *layers;
    Index count, angles;
};

// Of a layout the tokens of all its nodes, the ``kept`` flat nodes whose logits are wanted, ascending, null: of all rows; and where what
// the tapped layers read comes to, [nodes, taps * hidden].
struct Part {
    const Index *tokens, *keep;
    Index kept;
    void *features;
};

// Where the rows of a pass come from and go to.
struct Places {
    std::unique_ptr<Index[]> firsts, parts, nodes, angles, slots, kept;
    Index rows = 0, kept_rows = 0;

    Places(const Layout *layouts, const Part *given, Index part_count, Index angle_count) : firsts(room<Index>(part_count)) {
        for (Index part = 0; part < part_count; part++) {
            firsts[part] = rows;
            for (Index b = 0; b < layouts[part].batch; b++) rows += layouts[part].row_count(b);
            kept_rows += given[part].keep ? given[part].kept : rows - firsts[part];
        }
        for (auto *own : {&parts, &nodes, &angles, &slots}) *own = room<Index>(rows);
        kept = room<Index>(kept_rows);
        for (Index part = 0, row = 0, k = 0; part < part_count; part++) {
            const Layout &layout = layouts[part];
            const Index *keep = given[part].keep, *end = keep + given[part].kept;
            for (Index b = 0; b < layout.batch; b++)
                for (Index i = 0; i < layout.row_count(b); i++, row++) {
                    Index node = layout.node(b, i), flat = b * layout.rows + node, slot;
                    parts[row] = part, nodes[row] = flat;
                    angles[row] = std::min(layout.lengths[b] + layout.depth[b * layout.depth_row + node], angle_count - 1);
                    layout.find<1>(b, layout.lengths[b] + layout.first_column + node, &slot), slots[row] = slot;
                    if (!given[part].keep || (keep < end && *keep == flat)) kept[k++] = row, keep++;
                }
        }
    }
};

// A forward pass over the rows of all parts, one after the other, to the logits of kept rows. A layer's caches begin ``cache_layer``
// elements after those before it; ``taps``: layers whose input is wanted.
template <class T>
void decode(
    const Decoder *model, const Layout *layouts, const Part *given, Index part_count, T *k_cache, T *v_cache, Index cache_layer,
    const Index *taps, Index tap_count, Index hidden_size, Index heads, Index kv_heads, Index size, float scale, float eps, T *logits) {
    const Shape shape{hidden_size, heads, kv_heads, size, scale, eps};
    const Places at(layouts, given, part_count, model->angles);
    const Pass<T> pass{
        at.rows, static_cast<const T *>(model->cos), static_cast<const T *>(model->sin), at.angles.get(), at.slots.get(), layouts,
        at.firsts.get(), part_count};
    const Room<T> space(model->layers[0], shape, at.rows);
    auto hidden = room<T>(at.rows * hidden_size), delta = room<T>(at.rows * hidden_size), normed = room<T>(at.rows * hidden_size);
#pragma omp parallel
    {
        for (Index i = 0; i < model->count; i++) {
            const Layer &layer = model->layers[i];
#pragma omp for
            for (Index row = 0; row < at.rows; row++) {
                const Part &part = given[at.parts[row]];
                T *own = hidden.get() + row * hidden_size, *added = i ? delta.get() + row * hidden_size : nullptr;
                if (!added) std::memcpy(own, static_cast<const T *>(model->table) + part.tokens[at.nodes[row]] * hidden_size, hidden_size * sizeof(T));
                add_rms_norm_of<T>(
                    own, added, static_cast<const T *>(layer.input_norm), eps, hidden_size, own, normed.get() + row * hidden_size);
                for (Index tap = 0; tap < tap_count; tap++)
                    if (taps[tap] == i)
                        std::memcpy(
                            static_cast<T *>(part.features) + (at.nodes[row] * tap_count + tap) * hidden_size, own, hidden_size * sizeof(T));
            }
            run_layer(
                layer, shape, pass, space, normed.get(), hidden.get(), k_cache + i * cache_layer, v_cache + i * cache_layer, delta.get());
        }
#pragma omp for
        for (Index i = 0; i < at.kept_rows; i++) {
            T *own = hidden.get() + at.kept[i] * hidden_size;
            add_rms_norm_of<T>(
                own, delta.get() + at.kept[i] * hidden_size, static_cast<const T *>(model->norm), eps, hidden_size, own,
                normed.get() + i * hidden_size);
        }
        model->lm_head.multiply(normed.get(), at.kept_rows, logits);
    }
}

// A draft head: what its layer reads is the norm of embeddings beside that of the states before. Flags as in Eagle3Config.
struct Head {
    Layer layer;
    const void *hidden_norm, *norm;
    Matrix lm_head;
    Index norm_before_residual, norm_output;
};

template <class T>
struct HeadRoom {
    Room<T> layer;
    std::unique_ptr<T[]> residual, normed, x, delta;

    HeadRoom(const Head &head, const Shape &shape, Index rows)
        : layer(head.layer, shape, rows), residual(room<T>(rows * shape.hidden)), normed(room<T>(rows * shape.hidden)),
          x(room<T>(2 * rows * shape.hidden)), delta(room<T>(rows * shape.hidden)) {}
};

// As Eagle3Head.logits has it; states [batch * rows, hidden], sharpness [batch], null: none.
template <class T>
void head_output(
    const Head &head, const Shape &shape, const HeadRoom<T> &room, const T *states, const T *sharpness, Index batch, Index rows, T *logits) {
    const Index hidden = shape.hidden;
#pragma omp for
    for (Index row = 0; row < batch * rows; row++) {
        T *out = room.normed.get() + row * hidden;
        if (head.norm_output)
            std::memcpy(out, states + row * hidden, hidden * sizeof(T));
        else
            add_rms_norm_of<T>(states + row * hidden, nullptr, static_cast<const T *>(head.norm), shape.eps, hidden, nullptr, out);
        for (Index i = 0; sharpness && i < hidden; i++) write(out + i, read(out[i]) * read(sharpness[row / rows]));
    }
    head.lm_head.multiply(room.normed.get(), batch * rows, logits);
}

// As Eagle3Head.forward has it, of ``rows`` rows for each request; shift [batch, hidden], null: none. hidden [batch * rows, hidden]: the
// states before, and then those of these rows.
template <class T>
void head_states(
    const Head &head, const Shape &shape, const Pass<T> &pass, const HeadRoom<T> &room, const T *table, const Index *tokens, const T *shift,
    Index rows, T *k_cache, T *v_cache, T *hidden) {
    const Index size = shape.hidden;
#pragma omp for
    for (Index row = 0; row < pass.rows; row++) {
        T *residual = room.residual.get() + row * size, *x = room.x.get() + 2 * row * size, *before = hidden + row * size;
        add_rms_norm_of<T>(
            table + tokens[row] * size, nullptr, static_cast<const T *>(head.layer.input_norm), shape.eps, size, nullptr, x);
        add_rms_norm_of<T>(before, nullptr, static_cast<const T *>(head.hidden_norm), shape.eps, size, nullptr, x + size);
        std::memcpy(residual, head.norm_before_residual ? x + size : before, size * sizeof(T));
        for (Index i = 0; shift && i < size; i++) write(residual + i, read(residual[i]) + read(shift[row / rows * size + i]));
    }
    run_layer(head.layer, shape, pass, room.layer, room.x.get(), room.residual.get(), k_cache, v_cache, room.delta.get());
#pragma omp for
    for (Index row = 0; row < pass.rows; row++) {
        T *residual = room.residual.get() + row * size, *normed = room.normed.get() + row * size;
        add_rms_norm_of<T>(
            residual, room.delta.get() + row * size, static_cast<const T *>(head.norm), shape.eps, size, residual, normed);
        std::memcpy(hidden + row * size, head.norm_output ? normed : residual, size * sizeof(T));
    }
}

// As Eagle3Head.forward and .logits have it, of one row for each request; table: embeddings; logits null: not wanted.
template <class T>
void head_rows(
    const Head *head, const Layout *layout, const T *table, const Index *tokens, const T *cos, const T *sin, const Index *slots,
    const T *shift, const T *sharpness, T *k_cache, T *v_cache, Index batch, Index rows, Index hidden_size, Index heads, Index kv_heads,
    Index size, float scale, float eps, T *hidden, T *logits) {
    const Shape shape{hidden_size, heads, kv_heads, size, scale, eps};
    const Index first = 0;
    const Pass<T> pass{batch * rows, cos, sin, nullptr, slots, layout, &first, 1};
    const HeadRoom<T> space(*head, shape, batch * rows);
#pragma omp parallel
    {
        head_states(*head, shape, pass, space, table, tokens, shift, rows, k_cache, v_cache, hidden);
        if (logits) head_output(*head, shape, space, hidden, sharpness, batch, rows, logits);
    }
}
