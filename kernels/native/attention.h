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

    // The physical slots of the columns ``column`` .. ``column`` + COUNT.
    template <Index COUNT = COLUMNS>
    void find(Index request, Index column, Index *slots) const {
        const Index *block = tables + request * table_row + column / block_size, *end = tables + request * table_row + table_size - 1;
        for (Index c = 0, offset = column % block_size; c < COUNT; c++) {
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
constexpr Index MANY = 8;  // requests, of which each is one thread's: its heads lie side by side

inline Vector larger(Vector x, Vector y) { return x > y ? x : y; }

inline Vector exponential(Vector x) {
    for (int i = 0; i < WIDTH; i++) x[i] = exponential(x[i]);
    return x;
}

// Of COLUMNS columns K and V as floats, in rows of whole vectors; zeros where no row sees one: it may be NaN, which a weight of 0 would
// not stop. IN_PLACE: they are where they lie.
template <Index MOST, bool IN_PLACE>
struct Tile {
    const float *keys[COLUMNS], *values[COLUMNS];
    float zeros[MOST] = {}, scratch[IN_PLACE ? 1 : 2 * COLUMNS][MOST];

    template <class T>
    void fill(const T *k_cache, const T *v_cache, const Index *slots, Index stride, Index size, uint32_t seen) {
        for (Index c = 0; c < COLUMNS; c++)
            if (seen >> c & 1)
                keys[c] = floats(k_cache + slots[c] * stride, 2 * c, size), values[c] = floats(v_cache + slots[c] * stride, 2 * c + 1, size);
            else
                keys[c] = values[c] = zeros;
    }

    template <class T>
    const float *floats(const T *x, [[maybe_unused]] Index place, [[maybe_unused]] Index size) {
        if constexpr (IN_PLACE) {
            return x;
        } else {
            for (Index d = 0; d < (size + WIDTH - 1) / WIDTH * WIDTH; d++) scratch[place][d] = d < size ? read(x[d]) : 0;
            return scratch[place];
        }
    }
};

// sums [ROWS, MOST] of COUNT rows become kept times themselves, and the values times their weights, weights[row * by_row + column * by_column].
template <Index MOST, Index COUNT>
void add_values(const float *const *values, const float *weights, Index by_row, Index by_column, const float *kept, Index columns, Index vectors, float *sums) {
    for (Index v = 0; v < vectors; v += GROUP) {
        Vector sum[COUNT][GROUP];
        for (Index j = 0; j < COUNT; j++)
            for (Index part = 0; part < GROUP; part++) sum[j][part] = load(sums + j * MOST + (v + part) * WIDTH) * kept[j];
        for (Index c = 0; c < columns; c++) {
            Vector value[GROUP];
            for (Index part = 0; part < GROUP; part++) value[part] = load(values[c] + (v + part) * WIDTH);
            for (Index j = 0; j < COUNT; j++)
                for (Index part = 0; part < GROUP; part++) sum[j][part] += weights[j * by_row + c * by_column] * value[part];
        }
        for (Index j = 0; j < COUNT; j++) std::memcpy(sums + j * MOST + v * WIDTH, sum[j], sizeof sum[j]);
    }
}

// Rows ``first`` .. ``first`` + ``count`` of those of a request that share a KV head. SIZE: of a head, if it is known beforehand.
template <int SIZE, class T>
void attend_tile(
    const Layout &layout, Index request, Index kv_head, Index first, Index count, Index heads, Index kv_heads, Index any_size, float scale,
    const T *q, Index q_request, Index q_row, Index q_head, const T *k_cache, const T *v_cache, T *out) {
    constexpr Index MOST = SIZE ? SIZE : LARGEST;
    const Index size = SIZE ? SIZE : any_size, vectors = (size + WIDTH - 1) / WIDTH, group = heads / kv_heads, stride = kv_heads * size;
    const bool few = count <= GROUP;  // then columns are the lanes of a vector, else rows
    Tile<MOST, std::is_same_v<T, float> && SIZE> tile;
    float queries[ROWS * MOST], weights[COLUMNS * ROWS], sums[ROWS * MOST] = {}, kept[ROWS];
    Index row[ROWS], head[ROWS], nodes[ROWS];
    for (Index i = 0, r = first / group, h = first % group; i < ROWS; i++) {
        row[i] = r, head[i] = kv_head * group + h, nodes[i] = layout.node(request, r);
        const T *own = q + (layout.starts ? layout.first_row(request) * q_row : request * q_request) + r * q_row + head[i] * q_head;
        for (Index d = 0; d < size; d++) queries[few ? i * MOST + d : d * ROWS + i] = read(own[d]) * scale;
        if (i + 1 < count && ++h == group) h = 0, r++;  // what is beyond ``count`` repeats the last one
    }
    Index length = layout.lengths[request], begin = 0, last = length + layout.first_column + nodes[ROWS - 1] + 1;
    if (layout.window) {
        Index shallowest = layout.depth[request * layout.depth_row + nodes[0]];
        for (Index i = 1; i < ROWS; i++) shallowest = std::min(shallowest, layout.depth[request * layout.depth_row + nodes[i]]);
        begin = std::max<Index>(0, length + shallowest - layout.window + 1);
    }
    Index slots[COLUMNS], seen_by_all = length + (layout.ancestors ? 0 : nodes[0] + 1);
    layout.find(request, begin, slots);
    Vector top = Vector{} - INF, total{};
    k_cache += kv_head * size, v_cache += kv_head * size;
    for (Index column = begin; column < last; column += COLUMNS) {
        Index columns = std::min(COLUMNS, last - column);
        uint32_t seen[ROWS], by_any = Layout::first_bits(COLUMNS);
        bool masked = layout.window || column + COLUMNS > seen_by_all;
        if (masked) {
            by_any = 0;
            for (Index i = 0; i < ROWS; i++) by_any |= seen[i] = i < count ? layout.seen(request, nodes[i], column) : seen[count - 1];
        }
        tile.fill(k_cache, v_cache, slots, stride, size, by_any);
        layout.find(request, column + COLUMNS, slots);
        for (Index c = 0; c < std::min(COLUMNS, last - column - COLUMNS) && first == 0; c++)  // nobody has read them yet
            for (Index d = 0; d < size; d += LINE / Index(sizeof(T)))
                __builtin_prefetch(k_cache + slots[c] * stride + d, 0, 2), __builtin_prefetch(v_cache + slots[c] * stride + d, 0, 2);
        if (few) {
            for (Index c = 0; c < COLUMNS; c++)
                for (Index i = 0; i < count; i++) {
                    float score = 0;
                    for (Index d = 0; d < size; d++) score += queries[i * MOST + d] * tile.keys[c][d];
                    weights[i * COLUMNS + c] = score;
                }
            for (Index i = 0; i < count; i++) {
                float *own = weights + i * COLUMNS, highest = top[i], sum = 0;
                for (Index c = 0; c < COLUMNS && masked; c++) own[c] = seen[i] >> c & 1 ? own[c] : -INF;
                for (Index c = 0; c < COLUMNS; c++) highest = own[c] > highest ? own[c] : highest;
                float base = highest == -INF ? 0 : highest;
                for (Index c = 0; c < COLUMNS; c++) own[c] = exponential(own[c] - base);
                for (Index c = 0; c < COLUMNS; c++) sum += own[c];
                kept[i] = exponential(top[i] - base), top[i] = highest, total[i] = total[i] * kept[i] + sum;
            }
            auto add = count == 1 ? add_values<MOST, 1> : count == 2 ? add_values<MOST, 2> : add_values<MOST, GROUP>;
            add(tile.values, weights, COLUMNS, 1, kept, columns, vectors, sums);
            continue;
        }
        Vector scores[COLUMNS], highest = top;
        for (Index c = 0; c < columns; c += TOGETHER) {
            Vector score[TOGETHER] = {};
            for (Index d = 0; d < size; d++)
                for (Index j = 0; j < TOGETHER; j++) score[j] += tile.keys[c + j][d] * load(queries + d * ROWS);
            for (Index j = 0; j < TOGETHER; j++) scores[c + j] = score[j];
        }
        for (Index c = 0; c < columns && masked; c++)
            for (Index i = 0; i < ROWS; i++) scores[c][i] = seen[i] >> c & 1 ? scores[c][i] : -INF;
        for (Index c = 0; c < columns; c++) highest = larger(scores[c], highest);
        Vector base = highest == -INF ? Vector{} : highest, factor = exponential(top - base);
        top = highest, total *= factor;
        for (Index c = 0; c < columns; c++) total += scores[c] = exponential(scores[c] - base);
        std::memcpy(weights, scores, sizeof scores), std::memcpy(kept, &factor, sizeof kept);
        for (Index i = 0; i < count; i += GROUP)
            add_values<MOST, GROUP>(tile.values, weights + i, 1, ROWS, kept + i, columns, vectors, sums + i * MOST);
    }
    for (Index i = 0; i < count; i++) {
        T *own = out + ((layout.first_row(request) + row[i]) * heads + head[i]) * size;
        float inverse = total[i] == 0 ? 0 : 1 / total[i];
        for (Index d = 0; d < size; d++) write(own + d, sums[i * MOST + d] * inverse);
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
#pragma omp for collapse(3) schedule(dynamic, layout.batch >= MANY ? kv_heads * tiles : 1)
    for (Index request = 0; request < layout.batch; request++)
        for (Index head = 0; head < kv_heads; head++)
            for (Index tile = 0; tile < tiles; tile++) {
                Index count = std::min(ROWS, layout.row_count(request) * group - tile * ROWS);
                if (count > 0)
                    attend(layout, request, head, tile * ROWS, count, heads, kv_heads, size, scale, q, q_request, q_row, q_head, k_cache, v_cache, out);
            }
}
