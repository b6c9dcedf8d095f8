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

// x: what qkv reads; keys and values come to the caches, queries to the room.
template <class T>
void project(const Layer &own, const Shape &shape, const Pass<T> &pass, const Room<T> &room, const T *x, T *k_cache, T *v_cache) {
    const Index all = own.qkv.outputs;
    own.qkv.multiply(x, pass.rows, room.qkv.get());
    rope_store<T>(
        room.qkv.get(), all, room.qkv.get() + own.o.size + shape.kv_heads * shape.size, all, pass.cos, pass.sin, pass.places, pass.slots,
        nullptr, pass.rows, shape.heads, shape.kv_heads, shape.size, k_cache, v_cache, room.q.get());
}

// From the queries of rows on: residual gets what attention adds, and delta what is to be added to it then.
template <class T>
void attend_and_gate(
    const Layer &own, const Shape &shape, const Layout *parts, const Index *firsts, Index part_count, Index rows, const Room<T> &room,
    T *residual, const T *k_cache, const T *v_cache, T *delta) {
    for (Index part = 0; part < part_count; part++) {
        const Index width = own.o.size, first = firsts[part] * width;
        tree_attention(
            room.q.get() + first, parts[part].rows * width, width, shape.size, k_cache, v_cache, parts + part, own.window, shape.heads,
            shape.kv_heads, shape.size, shape.scale, room.attended.get() + first);
    }
    own.o.multiply(room.attended.get(), rows, delta);
    add_rms_norm(residual, delta, static_cast<const T *>(own.norm), shape.eps, rows, shape.hidden, residual, room.normed.get());
    own.gate_up.multiply(room.normed.get(), rows, room.gate_up.get());
    gated_silu(room.gate_up.get(), rows, own.down.size, room.gated.get());
    own.down.multiply(room.gated.get(), rows, delta);
}

// Both.
template <class T>
void run_layer(
    const Layer &own, const Shape &shape, const Pass<T> &pass, const Room<T> &room, const T *x, T *residual, T *k_cache, T *v_cache, T *delta) {
    project(own, shape, pass, room, x, k_cache, v_cache);
    attend_and_gate(own, shape, pass.parts, pass.firsts, pass.part_count, pass.rows, room, residual, k_cache, v_cache, delta);
}

// A model; table: its embeddings; cos, sin [angles, size].
struct Decoder {
    const void *table, *cos, *sin, *norm;
    Matrix lm_head;
    const Layer *layers;
    Index count, angles;
};

// Of a layout the tokens of all its nodes, the ``kept`` flat nodes whose logits are wanted, ascending, -1: of all rows; and where what
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
            kept_rows += given[part].kept < 0 ? rows - firsts[part] : given[part].kept;
        }
        for (auto *own : {&parts, &nodes, &angles, &slots}) *own = room<Index>(rows);
        kept = room<Index>(kept_rows);
        for (Index part = 0, row = 0, k = 0; part < part_count; part++) {
            const Layout &layout = layouts[part];
            const Index *keep = given[part].keep, *end = keep + std::max<Index>(given[part].kept, 0);
            for (Index b = 0; b < layout.batch; b++)
                for (Index i = 0; i < layout.row_count(b); i++, row++) {
                    Index node = layout.node(b, i), flat = b * layout.rows + node, slot;
                    parts[row] = part, nodes[row] = flat;
                    angles[row] = std::min(layout.lengths[b] + layout.depth[b * layout.depth_row + node], angle_count - 1);
                    layout.find<1>(b, layout.lengths[b] + layout.first_column + node, &slot), slots[row] = slot;
                    if (given[part].kept < 0) kept[k++] = row;
                    for (; keep < end && *keep <= flat; keep++) kept[k++] = row;
                }
            for (; keep < end; keep++) kept[k++] = std::max<Index>(row - 1, 0);  // of an entry without live rows: whatever
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
    const Index most = std::max<Index>({1, at.rows, at.kept_rows}) * hidden_size;
    auto hidden = room<T>(most), delta = room<T>(most), normed = room<T>(most);
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
            T *out = normed.get() + i * hidden_size;
            const Index first = at.kept[i] * hidden_size;
            add_rms_norm_of<T>(hidden.get() + first, delta.get() + first, static_cast<const T *>(model->norm), eps, hidden_size, out, out);
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

// What a head's layer reads of a row: embeddings [hidden] and the states before, normed, side by side.
template <class T>
void beside(const Head &head, const Shape &shape, const T *embeddings, const T *before, T *x) {
    const Index size = shape.hidden;
    add_rms_norm_of<T>(embeddings, nullptr, static_cast<const T *>(head.layer.input_norm), shape.eps, size, nullptr, x);
    add_rms_norm_of<T>(before, nullptr, static_cast<const T *>(head.hidden_norm), shape.eps, size, nullptr, x + size);
}

// What attention adds to.
template <class T>
void begin_residual(const Head &head, const Shape &shape, const T *before, const T *x, const T *shift, T *residual) {
    const Index size = shape.hidden;
    std::memcpy(residual, head.norm_before_residual ? x + size : before, size * sizeof(T));
    for (Index i = 0; shift && i < size; i++) write(residual + i, read(residual[i]) + read(shift[i]));
}

// The state of a row, of what attention and the gate have left behind.
template <class T>
void end_state(const Head &head, const Shape &shape, T *residual, const T *delta, T *normed, T *state) {
    add_rms_norm_of<T>(residual, delta, static_cast<const T *>(head.norm), shape.eps, shape.hidden, residual, normed);
    std::memcpy(state, head.norm_output ? normed : residual, shape.hidden * sizeof(T));
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
        T *before = hidden + row * size, *x = room.x.get() + 2 * row * size;
        beside(head, shape, table + tokens[row] * size, before, x);
        begin_residual(head, shape, before, x, shift ? shift + row / rows * size : nullptr, room.residual.get() + row * size);
    }
    run_layer(head.layer, shape, pass, room.layer, room.x.get(), room.residual.get(), k_cache, v_cache, room.delta.get());
#pragma omp for
    for (Index row = 0; row < pass.rows; row++)
        end_state(
            head, shape, room.residual.get() + row * size, room.delta.get() + row * size, room.normed.get() + row * size, hidden + row * size);
}

// As Eagle3Head.forward and .logits have it, of ``rows`` rows for each request; table: embeddings.
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
        head_output(*head, shape, space, hidden, sharpness, batch, rows, logits);
    }
}

// Rows of the draft that follow what is committed: those of request b, which has row rows[b] of ``tables``, come to logical slots
// starts[b] .. ends[b], one request's after the other's. hidden [rows, hidden]: what the features combine to; tokens: the one after each.
// What the last row of each request returns, which alone goes beyond keys and values, comes to row 1 + rows[b] of ``state``.
template <class T>
void catch_up(
    const Head *head, const T *table, const T *angles, Index angle_count, const T *hidden, const Index *tokens, const Index *rows,
    const Index *starts, const Index *ends, const Index *tables, Index table_size, Index block_size, const T *shift, Index batch,
    Index hidden_size, Index heads, Index kv_heads, Index size, float scale, float eps, T *k_cache, T *v_cache, T *state) {
    const Shape shape{hidden_size, heads, kv_heads, size, scale, eps};
    const Index width = head->layer.o.size, first = 0;
    auto own_tables = room<Index>(batch * table_size), lengths = room<Index>(batch), last = room<Index>(batch);
    Index count = 0;
    for (Index b = 0; b < batch; b++) {
        std::memcpy(own_tables.get() + b * table_size, tables + rows[b] * table_size, table_size * sizeof(Index));
        lengths[b] = ends[b] - 1, count += ends[b] - starts[b], last[b] = count - 1;
    }
    const auto zeros = std::unique_ptr<Index[]>(new Index[batch]());
    const Layout layout{own_tables.get(), lengths.get(), zeros.get(), nullptr, nullptr, nullptr, nullptr, table_size, table_size, 1, 1, batch, 1,
                        block_size, 0, 0};
    auto slots = room<Index>(count), places = room<Index>(count);
    for (Index b = 0, row = 0; b < batch; b++)
        for (Index slot = starts[b]; slot < ends[b]; slot++, row++)
            layout.find<1>(b, slot, slots.get() + row), places[row] = std::min(slot, angle_count - 1);
    const Pass<T> pass{count, angles, angles + angle_count * size, places.get(), slots.get(), &layout, &first, 1};
    const HeadRoom<T> space(*head, shape, count);
#pragma omp parallel
    {
#pragma omp for
        for (Index row = 0; row < count; row++)
            beside(*head, shape, table + tokens[row] * hidden_size, hidden + row * hidden_size, space.x.get() + 2 * row * hidden_size);
        project(head->layer, shape, pass, space.layer, space.x.get(), k_cache, v_cache);
#pragma omp single
        for (Index b = 0; b < batch; b++) {  // of the queries the last ones alone, which come first
            begin_residual(
                *head, shape, hidden + last[b] * hidden_size, space.x.get() + 2 * last[b] * hidden_size,
                shift ? shift + b * hidden_size : nullptr, space.residual.get() + b * hidden_size);
            std::memmove(space.layer.q.get() + b * width, space.layer.q.get() + last[b] * width, width * sizeof(T));
        }
        attend_and_gate(
            head->layer, shape, &layout, &first, 1, batch, space.layer, space.residual.get(), k_cache, v_cache, space.delta.get());
#pragma omp for
        for (Index b = 0; b < batch; b++)
            end_state(
                *head, shape, space.residual.get() + b * hidden_size, space.delta.get() + b * hidden_size, space.normed.get() + b * hidden_size,
                state + (1 + rows[b]) * hidden_size);
    }
}
