// All levels of a draft in one call.
#pragma once

#include "layers.h"
#include "trees.h"
#include "verify.h"

// What a request's draft begins from; ``state`` [hidden]: see Drafter. Arguments as Drafter.grow has them, those of all requests one after
// the other. angles [2, positions, size]: RoPE's table. Null: temperatures of 1, no noise, draft ids that are target ids.
template <class T>
struct Draft {
    const T *table, *angles, *shift, *sharpness;
    const Index *tables, *lengths, *target_ids, *seeds, *positions;
    const bool *sampled;
    const float *temperature, *sigma, *start;  // sigma [batch, levels]; start: the roots' scores, null: 0
    Index batch, table_row, table_size, block_size, angle_rows, vocab, draft_vocab, topk, levels;
    double level_price, node_price;
};

// See _worthwhile in drafter.py.
inline Index worthwhile(const float *scores, Index topk, const float *parents, Index parent_count, Index batch, double level_price, double node_price) {
    if (level_price == 0 && node_price == 0) return topk;
    double worth = 0, above = 0, bought = 0;
    for (Index i = 0; i < batch * parent_count; i++) above += std::exp(double(parents[i]));
    for (Index i = 0; i < batch * topk; i++)
        if (double own = std::exp(double(scores[i])); own >= node_price) worth += own;
    double kept = above > 0 ? std::min(1.0, worth / above) : 0;
    for (Index i = 0; i < batch * topk; i++)
        if (double own = std::exp(double(scores[i])); own >= node_price) bought += std::max(0.0, own * kept - node_price);
    Index width = 0;
    for (Index i = 0; i < topk && bought >= level_price; i++) {
        double tokens = 0;
        for (Index b = 0; b < batch; b++) tokens += std::exp(double(scores[b * topk + i]));
        width += tokens >= node_price * batch;
    }
    return width;
}

// The noise of all requests at one depth of their trees.
template <class T>
void draw(const Draft<T> &own, Index depth, Index *places, float *noise) {
#pragma omp single
    for (Index b = 0; b < own.batch; b++) places[b] = own.positions[b] + depth;
    gumbel_noise(own.seeds, places, own.batch, own.vocab, noise);
#pragma omp for
    for (Index b = 0; b < own.batch; b++)
        if (!own.sampled[b]) std::fill(noise + b * own.vocab, noise + (b + 1) * own.vocab, 0.0f);
}

// Grows trees of at most ``levels`` levels after the states [batch, hidden]. The nodes of each level, level by level, come to scores,
// tokens and parents, rows of topk * (1 + (levels - 1) * topk), as in Pool; used [2]: how many columns that are, and levels.
template <class T>
void grow(
    const Head *head, const Draft<T> *draft, Index hidden_size, Index heads, Index kv_heads, Index size, float scale, float eps, const T *states,
    T *k_cache, T *v_cache, float *scores, Index *tokens, Index *parents, Index *used) {
    const Draft<T> &own = *draft;
    const Shape shape{hidden_size, heads, kv_heads, size, scale, eps};
    const Index batch = own.batch, topk = own.topk, most = batch * topk, pool = topk * (1 + (own.levels - 1) * topk), first = 0;
    const HeadRoom<T> space(*head, shape, most);
    auto hidden = room<T>(most * hidden_size), next = room<T>(most * hidden_size), logits = room<T>(most * own.draft_vocab);
    auto noise = room<float>(batch * own.vocab), level = room<float>(most * topk), best_scores = room<float>(most), above = room<float>(most);
    auto level_tokens = room<Index>(most * topk), best = room<Index>(most), sources = room<Index>(most), best_tokens = room<Index>(most);
    auto bits = room<Index>(most), bits_before = room<Index>(most), expanded = room<Index>(most);
    auto slots = room<Index>(most), depths = room<Index>(most), places = room<Index>(batch), angles = room<Index>(most), chosen = room<Index>(most);
    Index columns = 0, before = 0, parent_count = 1, rows = 1, depth = 0;  // before: columns before those of the last level
    Layout layout{own.tables, own.lengths, depths.get(), bits.get(), nullptr, nullptr, nullptr, own.table_row, own.table_size, 1, 1, batch, 1,
                  own.block_size, 0, 0};
    Pass<T> pass{batch, own.angles, own.angles + own.angle_rows * size, angles.get(), slots.get(), &layout, &first, 1};

    auto keep = [&] {  // the children of the last rows
        for (Index b = 0; b < batch; b++)
            for (Index i = 0; i < rows * topk; i++) {
                scores[b * pool + columns + i] = level[b * rows * topk + i], tokens[b * pool + columns + i] = level_tokens[b * rows * topk + i];
                parents[b * pool + columns + i] = depth ? 1 + before + expanded[b * rows + i / topk] : 0;
            }
        before = columns, columns += rows * topk, depth++;
    };
    auto expand = [&](Index width) {  // the best of them
        std::swap(bits, bits_before);
        const Index first_slot = (depth - 1) * topk;
        for (Index b = 0; b < batch; b++)
            for (Index i = 0; i < width; i++) {
                Index row = b * width + i, source = sources[b * topk + i];
                above[row] = best_scores[b * topk + i], expanded[row] = best[b * topk + i], depths[row] = depth - 1;
                chosen[row] = best_tokens[b * topk + i], angles[row] = std::min(own.lengths[b] + depth - 1, own.angle_rows - 1);
                bits[row] = (depth == 1 ? 0 : bits_before[b * rows + source]) | Index(uint64_t(1) << (first_slot + i));
                std::memcpy(next.get() + row * hidden_size, hidden.get() + (b * rows + source) * hidden_size, hidden_size * sizeof(T));
                layout.find<1>(b, own.lengths[b] + first_slot + i, slots.get() + row);
            }
        std::swap(hidden, next);
        rows = parent_count = width, pass.rows = batch * width;
        layout.ancestors = bits.get(), layout.depth_row = layout.rows = width, layout.first_column = first_slot;
    };
    std::memcpy(hidden.get(), states, batch * hidden_size * sizeof(T));
    std::fill(above.get(), above.get() + batch, 0.0f), std::fill(bits.get(), bits.get() + most, 0);
    bool more = true;
#pragma omp parallel
    while (true) {
        head_output(*head, shape, space, hidden.get(), own.sharpness, batch, rows, logits.get());
        if (own.seeds) draw(own, depth, places.get(), noise.get());
        draft_level(
            logits.get(), own.temperature, own.seeds ? noise.get() : nullptr, own.vocab, own.sigma + depth, own.levels, own.target_ids,
            depth || !own.start ? above.get() : own.start, batch, rows, own.draft_vocab, topk, level.get(), level_tokens.get(), best_scores.get(),
            best.get(), sources.get(), best_tokens.get());
#pragma omp single
        {
            keep();
            Index width = depth == own.levels ? 0 : worthwhile(best_scores.get(), topk, above.get(), parent_count, batch, own.level_price, own.node_price);
            if ((more = width > 0)) expand(width);
        }
        if (!more) break;
        head_states(
            *head, shape, pass, space, own.table, chosen.get(), own.shift, rows, k_cache, v_cache, hidden.get());
    }
    used[0] = columns, used[1] = depth;
}
