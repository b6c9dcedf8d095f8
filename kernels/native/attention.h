// Attention of few new rows over the paged cache, K and V being read where they lie.
#pragma once

#include <algorithm>
#include <type_traits>

#include "numbers.h"

// What a request's rows see, and where it lies; arguments as TreeLayout has them. ``starts`` null: every request has ``rows`` rows of q,
// else request b has counts[b] from row starts[b] on, which are the nodes ``nodes`` of the flat batch, a number for each row of q.
struct Layout {
    static constexpr Index COLUMNS = 16;  // of a tile
    const Index *tables, *lengths, *depth, *ancestors, *starts, *counts, *nodes;  // ancestors null: row i sees rows 0..i
    Index table_row, table_size, depth_row, words, batch, rows, block_size, first_column, window;  // window 0: none

    Index first_row(Index request) const { return starts ? starts[request] : request * rows; }
    Index row_count(Index request) const { return starts ? counts[request] : rows; }
    Index node(Index request, Index row) const { return starts ? nodes[starts[request] + row] - request * rows : row; }

    // The physical slots of the columns ``column`` .. ``column`` + COLUMNS.
    void find(Index request, Index column, Index *slots) const {
        const Index *block = tables + request * table_row + column / block_size, *end = tables + request * table_row + table_size - 1;
        for (Index c = 0, offset = column % block_size; c < COLUMNS; c++) {
            slots[c] = *std::min(block, end) * block_size + offset;
            if (++offset == block_size) offset = 0, block++;
        }
    }

    // Which of the columns ``column`` .. ``column`` + COLUMNS a node sees, a bit each.
    uint32_t seen(Index request, Index row, Index column) const {
        Index node = column - lengths[request], own = depth[request * depth_row + row];
        uint32_t bits = first_bits(ancestors ? -node : row + 1 - node);
        if (ancestors) {
            const Index *word = ancestors + (request * rows + row) * words;
            unsigned __int128 all = uint64_t(word[0]);
            if (words > 1) all |= (unsigned __int128)(uint64_t(word[1])) << 64;
            if (node < 128 && node > -COLUMNS) bits |= uint32_t(node < 0 ? all << -node : all >> node);
        }
        for (Index c = 0; window && c < COLUMNS; c++) {
            if (!(bits >> c & 1)) continue;
            Index position = node + c < 0 ? node + c : depth[request * depth_row + node + c];
            if (position <= own - window) bits &= ~(1u << c);
        }
        return bits & first_bits(COLUMNS);
    }

    static uint32_t first_bits(Index count) { return (1u << std::clamp<Index>(count, 0, COLUMNS)) - 1; }
};

constexpr Index COLUMNS = Layout::COLUMNS, ROWS = WIDTH, TOGETHER = 8, GROUP = 4, LARGEST = 256;  // LARGEST: size of a head

// Rows ``first`` .. ``first`` + ``count`` of those of a request that share a KV head, which are the lanes of a vector but for products
// with values, and with keys if there are few. SIZE: of a head, if it is known beforehand.
template <int SIZE, class T>
void attend_tile(
    const Layout &layout, Index request, Index kv_head, Index first, Index count, Index heads, Index kv_heads, Index any_size, float scale,
    const T *q, Index q_request, Index q_row, Index q_head, const T *k_cache, const T *v_cache, T *out) {
    const Index size = SIZE ? SIZE : any_size, vectors = (size + WIDTH - 1) / WIDTH, group = heads / kv_heads;
    constexpr Index MOST = SIZE ? SIZE : LARGEST;
    const bool few = count <= GROUP;  // so few that it is better to multiply one after the other
    constexpr bool IN_PLACE = std::is_same_v<T, float> && SIZE;
    float queries[MOST * ROWS], scores[COLUMNS][ROWS], top[ROWS], total[ROWS], kept[ROWS];
    std::memset(scores, 0, sizeof scores);
    float scratch[IN_PLACE ? 1 : 2 * COLUMNS][MOST], zeros[MOST] = {};
    Vector sums[ROWS][MOST / WIDTH] = {};
    const float *keys[COLUMNS], *values[COLUMNS];
    auto row_of = [&](Index i) { return (first + i) / group; };
    for (Index i = 0; i < ROWS; i++) {
        const T *own = q + (layout.starts ? layout.first_row(request) * q_row : request * q_request) + row_of(std::min(i, count - 1)) * q_row;
        own += (kv_head * group + (first + std::min(i, count - 1)) % group) * q_head;
        for (Index d = 0; d < size; d++) queries[few ? i * MOST + d : d * ROWS + i] = read(own[d]) * scale;
        top[i] = -INF, total[i] = 0;
    }
    auto floats = [&](const T *x, [[maybe_unused]] Index place) {
        if constexpr (IN_PLACE) {
            return x;
        } else {
            for (Index d = 0; d < vectors * WIDTH; d++) scratch[place][d] = d < size ? read(x[d]) : 0;
            return static_cast<const float *>(scratch[place]);
        }
    };
    Index nodes[ROWS], length = layout.lengths[request], begin = 0;
    for (Index i = 0; i < ROWS; i++) nodes[i] = layout.node(request, row_of(std::min(i, count - 1)));
    Index last = length + layout.first_column + nodes[ROWS - 1] + 1;
    if (layout.window) {
        Index shallowest = layout.depth[request * layout.depth_row + nodes[0]];
        for (Index i = 1; i < ROWS; i++) shallowest = std::min(shallowest, layout.depth[request * layout.depth_row + nodes[i]]);
        begin = std::max<Index>(0, length + shallowest - layout.window + 1);
    }
    Index slots[COLUMNS], seen_by_all = length + (layout.ancestors ? 0 : nodes[0] + 1);
    layout.find(request, begin, slots);
    for (Index column = begin; column < last; column += COLUMNS) {
        Index columns = std::min(COLUMNS, last - column);
        uint32_t seen[ROWS], by_any = Layout::first_bits(COLUMNS);
        bool masked = layout.window || column + COLUMNS > seen_by_all;
        if (masked) {
            by_any = 0;
            for (Index i = 0; i < ROWS; i++) by_any |= seen[i] = layout.seen(request, nodes[i], column);
        }
        for (Index c = 0; c < COLUMNS; c++) {
            if (!(by_any >> c & 1)) {  // what no row sees may be NaN, which a weight of 0 would not stop
                keys[c] = values[c] = zeros;
                continue;
            }
            Index place = (slots[c] * kv_heads + kv_head) * size;
            keys[c] = floats(k_cache + place, 2 * c), values[c] = floats(v_cache + place, 2 * c + 1);
        }
        layout.find(request, column + COLUMNS, slots);
        for (Index c = 0; c < std::min(COLUMNS, last - column - COLUMNS) && first == 0; c++)  // nobody has read them yet
            for (Index d = 0, place = (slots[c] * kv_heads + kv_head) * size; d < size; d += LINE / Index(sizeof(T)))
                __builtin_prefetch(k_cache + place + d, 0, 2), __builtin_prefetch(v_cache + place + d, 0, 2);
        for (Index i = 0; i < count && few; i++)
            for (Index c = 0; c < columns; c++) {
                float score = 0;
                for (Index d = 0; d < size; d++) score += queries[i * MOST + d] * keys[c][d];
                scores[c][i] = score;
            }
        for (Index c = 0; c < columns && !few; c += TOGETHER) {
            Vector score[TOGETHER] = {};
            for (Index d = 0; d < size; d++)
                for (Index j = 0; j < TOGETHER; j++) score[j] += keys[c + j][d] * load(queries + d * ROWS);
            std::memcpy(scores[c], score, sizeof score);
        }
        for (Index c = 0; c < columns && masked; c++)
            for (Index i = 0; i < ROWS; i++) scores[c][i] = seen[i] >> c & 1 ? scores[c][i] : -INF;
        float highest[ROWS], base[ROWS];
        std::memcpy(highest, top, sizeof top);
        for (Index c = 0; c < columns; c++)
            for (Index i = 0; i < ROWS; i++) highest[i] = scores[c][i] > highest[i] ? scores[c][i] : highest[i];
        for (Index i = 0; i < ROWS; i++) {
            base[i] = highest[i] == -INF ? 0 : highest[i];
            kept[i] = exponential(top[i] - base[i]), top[i] = highest[i], total[i] *= kept[i];
        }
        for (Index c = 0; c < columns; c++)
            for (Index i = 0; i < ROWS; i++) total[i] += scores[c][i] = exponential(scores[c][i] - base[i]);
        for (Index i = 0; i < count; i += GROUP)
            for (Index v = 0; v < vectors; v += GROUP) {
                Vector sum[GROUP][GROUP];
                for (Index j = 0; j < GROUP; j++)
                    for (Index part = 0; part < GROUP; part++) sum[j][part] = sums[i + j][v + part] * kept[i + j];
                for (Index c = 0; c < columns; c++) {
                    Vector value[GROUP];
                    for (Index part = 0; part < GROUP; part++) value[part] = load(values[c] + (v + part) * WIDTH);
                    for (Index j = 0; j < GROUP; j++)
                        for (Index part = 0; part < GROUP; part++) sum[j][part] += scores[c][i + j] * value[part];
                }
                for (Index j = 0; j < GROUP; j++)
                    for (Index part = 0; part < GROUP; part++) sums[i + j][v + part] = sum[j][part];
            }
    }
    for (Index i = 0; i < count; i++) {
        T *own = out + ((layout.first_row(request) + row_of(i)) * heads + kv_head * group + (first + i) % group) * size;
        float row[MOST], inverse = total[i] == 0 ? 0 : 1 / total[i];
        std::memcpy(row, sums[i], sizeof row);
        for (Index d = 0; d < size; d++) write(own + d, row[d] * inverse);
    }
}

template <class T>
void tree_attention(
    const T *q, Index q_request, Index q_row, Index q_head, const T *k_cache, const T *v_cache, const Layout *of, Index window, Index heads,
    Index kv_heads, Index size, float scale, T *out) {
    Layout layout = *of;
    layout.window = window;
    Index group = heads / kv_heads, tiles = (layout.rows * group + ROWS - 1) / ROWS;
    auto attend = size == 64 ? attend_tile<64, T> : size == 128 ? attend_tile<128, T> : attend_tile<0, T>;
#pragma omp parallel for collapse(3) schedule(dynamic) if (layout.batch * kv_heads * tiles > 1)
    for (Index request = 0; request < layout.batch; request++)
        for (Index head = 0; head < kv_heads; head++)
            for (Index tile = 0; tile < tiles; tile++) {
                Index count = std::min(ROWS, layout.row_count(request) * group - tile * ROWS);
                if (count > 0)
                    attend(layout, request, head, tile * ROWS, count, heads, kv_heads, size, scale, q, q_request, q_row, q_head, k_cache, v_cache, out);
            }
}
