// What trees are made of: their levels, their best nodes, their masks.
#pragma once

#include <algorithm>
#include <memory>

#include "numbers.h"

// parent [batch, nodes] -> ancestors [batch, nodes, words] and depth, as tree_mask has them.
inline void tree_mask(const Index *parent, Index batch, Index nodes, Index words, Index *ancestors, Index *depth) {
    for (Index row = 0; row < batch * nodes; row++) {
        Index node = row % nodes, up = row - node + parent[row];
        depth[row] = node ? depth[up] + 1 : 0;
        for (Index word = 0; word < words; word++) ancestors[row * words + word] = node ? ancestors[up * words + word] : 0;
        ancestors[row * words + node / 64] |= Index(uint64_t(1) << (node % 64));
    }
}

// Inserts into ``count`` places that are in order, the best first; what is equal to another comes after it.
inline void insert(float *values, Index *places, Index count, float value, Index place) {
    Index i = count - 1;
    for (; i > 0 && values[i - 1] < value; i--) values[i] = values[i - 1], places[i] = places[i - 1];
    values[i] = value, places[i] = place;
}

// As best_nodes has it, for trees of up to ``most`` nodes beside the root, at least one; a node whose parent is not kept, which only scores
// that rise from parent to child would cause, is not kept either. The rows of tokens_out and parent_out have 1 + ``most``. Returns
// how many columns beside the first are used.
inline Index best_nodes(
    const Index *roots, const float *scores, const Index *tokens, const Index *parents, Index batch, Index drafted, Index most, float price,
    Index *tokens_out, Index *parent_out) {
    std::unique_ptr<float[]> values(new float[batch * most]);
    std::unique_ptr<Index[]> places(new Index[batch * most]), node(new Index[drafted]);
    std::fill(values.get(), values.get() + batch * most, -INF), std::fill(places.get(), places.get() + batch * most, -1);
    Index count = price > 0 ? 1 : most;
    for (Index b = 0; b < batch; b++) {
        float *own = values.get() + b * most;
        for (Index i = 0; i < drafted; i++)
            if (scores[b * drafted + i] > own[most - 1]) insert(own, places.get() + b * most, most, scores[b * drafted + i], i);
        while (price > 0 && count < most && std::exp(own[count]) >= price) count++;
    }
    for (Index b = 0; b < batch; b++) {
        Index *kept = places.get() + b * most, *out = tokens_out + b * (most + 1), *up = parent_out + b * (most + 1), used = 0;
        std::sort(kept, kept + count, [](Index i, Index j) { return uint64_t(i) < uint64_t(j); });  // -1 comes last
        out[0] = roots[b], up[0] = 0;
        std::fill(out + 1, out + 1 + count, -1), std::fill(up + 1, up + 1 + count, 0), std::fill(node.get(), node.get() + drafted, -1);
        for (Index i = 0; i < count && kept[i] >= 0; i++) {
            Index parent = parents[b * drafted + kept[i]], above = parent ? node[parent - 1] : 0;
            if (above < 0) continue;
            node[kept[i]] = ++used;
            out[used] = tokens[b * drafted + kept[i]], up[used] = above;
        }
    }
    return count;
}

// As draft_level has it, with temperature as the only option; noise, sigma: of the level, those of a request
// ``noise_row`` and ``sigma_row`` after the one before.
template <class T>
void draft_level(
    const T *logits, const float *temperature, const float *noise, Index noise_row, const float *sigma, Index sigma_row, const Index *target_ids,
    const float *parent_scores, Index batch, Index rows, Index vocab, Index topk, float *scores, Index *tokens, float *best_scores,
    Index *best, Index *best_rows, Index *best_tokens) {
    constexpr Index PART = 64;
#pragma omp for
    for (Index line = 0; line < batch * rows; line++) {
        Index b = line / rows, parts = (vocab + PART - 1) / PART;
        std::unique_ptr<float[]> x(new float[parts * PART]), top(new float[parts]);
        const T *own = logits + line * vocab;
        const float *drawn = noise ? noise + b * noise_row : nullptr;
        for (Index v = 0; v < vocab; v++) x[v] = read(own[v]);
        if (temperature && temperature[b] != 1)
            for (Index v = 0; v < vocab; v++) x[v] = x[v] / temperature[b];
        for (Index v = 0; v < vocab && drawn; v++) x[v] += drawn[target_ids ? target_ids[v] : v];
        std::fill(x.get() + vocab, x.get() + parts * PART, -INF);
        float inverse = 1 / sigma[b * sigma_row], highest = -INF, sum = 0;
        for (Index part = 0; part < parts; part++) {
            float most = -INF;
            for (float *value = x.get() + part * PART, *end = value + PART; value < end; value++) {
                *value *= inverse;
                most = *value > most ? *value : most;
            }
            top[part] = most, highest = std::max(highest, most);
        }
        for (Index v = 0; v < vocab; v++) sum += exponential(x[v] - highest);
        float normaliser = highest + std::log(sum);
        float *values = scores + line * topk;
        Index *ids = tokens + line * topk;
        for (Index k = 0; k < topk; k++) values[k] = -INF, ids[k] = k;
        for (Index part = 0; part < parts; part++)
            for (Index v = part * PART; v < (part + 1) * PART && top[part] > values[topk - 1]; v++)
                if (x[v] > values[topk - 1]) insert(values, ids, topk, x[v], v);
        for (Index k = 0; k < topk; k++) {
            float score = values[k] - normaliser;  // a NaN where a NaN or an infinity is among the logits
            values[k] = parent_scores[line] + (score > 0 ? 0 : score);  // by rounding alone: no child is better than its parent
            if (!(values[k] == values[k])) values[k] = -INF;
            if (target_ids) ids[k] = target_ids[ids[k]];
        }
    }
#pragma omp for
    for (Index b = 0; b < batch; b++) {
        float *values = best_scores + b * topk;
        Index *places = best + b * topk, first = b * rows * topk;
        for (Index k = 0; k < topk; k++) values[k] = -INF, places[k] = k;
        for (Index i = 0; i < rows * topk; i++)
            if (scores[first + i] > values[topk - 1]) insert(values, places, topk, scores[first + i], i);
        for (Index k = 0; k < topk; k++)
            best_rows[b * topk + k] = places[k] / topk, best_tokens[b * topk + k] = tokens[first + places[k]];
    }
}
