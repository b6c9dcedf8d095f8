// Noise, verification, and what becomes of the cache after it.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "numbers.h"

// ln of positive normal numbers, as noise.py has it.
inline float log_normal(float x) {
    int32_t bits, exponent;
    std::memcpy(&bits, &x, sizeof bits);
    exponent = (bits - 0x3F2AAAAB) & -0x800000;  // that of x / (2/3): what remains, 1 + f, lies between 2/3 and 4/3
    bits -= exponent;
    float f;
    std::memcpy(&f, &bits, sizeof f);
    f -= 1;
    float series = -0.1513927f + f * 0.14013819f;
    series = 0.13999087f + f * series;
    series = -0.16469346f + f * series;
    series = 0.20010896f + f * series;
    series = -0.25004363f + f * series;
    series = 0.33333206f + f * series;
    series = f + f * f * (-0.5f + f * series);
    return series + exponent * (1.0f / 8388608 * 0.69314718f);
}

// -ln(-ln(1 - v)) of v = (bits + 1/2) / 2^32; 1 - v would lose a small v, whose logarithm is a series.
inline float gumbel(uint32_t bits) {
    float v = (bits + 0.5f) * (1.0f / 4294967296.0f);
    v = v < 1 - 1.0f / 16777216 ? v : 1 - 1.0f / 16777216;
    float small = 1.0f / 6 + v * (1.0f / 7 + v * (1.0f / 8 + v * (1.0f / 9)));
    small = v * (1 + v * (1.0f / 2 + v * (1.0f / 3 + v * (1.0f / 4 + v * (1.0f / 5 + v * small)))));
    return -log_normal(v < 0.1f ? small : -log_normal(1 - v));
}

constexpr Index COUNTERS = 64, TOKENS = 4 * COUNTERS;  // of Philox, with four words each, that are made at once

// The noise of TOKENS tokens from ``first`` on, a multiple of TOKENS. Not inlined: it is the same to the last bit whoever calls it.
__attribute__((noinline)) inline void noise_of(Index seed, Index position, Index first, float *noise) {
    uint32_t words[4][COUNTERS], key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
    for (Index i = 0; i < COUNTERS; i++) words[0][i] = uint32_t(first / 4 + i), words[1][i] = uint32_t(position), words[2][i] = words[3][i] = 0;
    for (int round = 0; round < 7; round++, key0 += 0x9E3779B9, key1 += 0xBB67AE85)
        for (Index i = 0; i < COUNTERS; i++) {
            uint64_t first = uint64_t(words[0][i]) * 0xD2511F53, second = uint64_t(words[2][i]) * 0xCD9E8D57;
            words[0][i] = uint32_t(second >> 32) ^ words[1][i] ^ key0, words[1][i] = uint32_t(second);
            words[2][i] = uint32_t(first >> 32) ^ words[3][i] ^ key1, words[3][i] = uint32_t(first);
        }
    float drawn[4][COUNTERS];
    for (int word = 0; word < 4; word++)
        for (Index i = 0; i < COUNTERS; i++) drawn[word][i] = gumbel(words[word][i]);
    for (Index i = 0; i < TOKENS; i++) noise[i] = drawn[i % 4][i / 4];
}

inline void gumbel_noise(const Index *seeds, const Index *positions, Index rows, Index vocab, float *out) {
#pragma omp for collapse(2)
    for (Index row = 0; row < rows; row++)
        for (Index first = 0; first < vocab; first += TOKENS) {
            float noise[TOKENS];
            noise_of(seeds[row], positions[row], first, noise);
            std::memcpy(out + row * vocab + first, noise, std::min(TOKENS, vocab - first) * sizeof *noise);
        }
}

constexpr Index TOGETHER_ROWS = 8;  // that share what noise is made

// Of ``rows`` rows the place of the largest of logits / temperature + noise, the first of equal ones, and whether there is no NaN among
// them; ``seed`` null: there is no noise.
template <class T>
void largest(
    const T *logits, Index rows, float temperature, const Index *seed, Index position, Index vocab, Index *places, bool *whole) {
    constexpr int LANES = 32;
    float top[TOGETHER_ROWS][LANES], noise[TOKENS];
    int32_t place[TOGETHER_ROWS][LANES] = {}, broken[TOGETHER_ROWS] = {};
    std::fill(top[0], top[0] + TOGETHER_ROWS * LANES, -INF);
    for (Index block = 0; block < vocab; block += TOKENS) {
        if (seed) noise_of(*seed, position, block, noise);
        for (Index row = 0; row < rows; row++)
            for (Index first = block; first < std::min(block + TOKENS, vocab); first += LANES) {
                Index lanes = std::min<Index>(LANES, vocab - first);
                float scores[LANES];
                for (Index i = 0; i < lanes; i++) scores[i] = read(logits[row * vocab + first + i]);
                for (Index i = lanes; i < LANES; i++) scores[i] = -INF;
                if (temperature != 1)
                    for (Index i = 0; i < LANES; i++) scores[i] = scores[i] / temperature;
                if (seed)
                    for (Index i = 0; i < LANES; i++) scores[i] += noise[first - block + i];
                for (Index i = 0; i < LANES; i++) {
                    broken[row] |= scores[i] != scores[i];
                    bool more = scores[i] > top[row][i];
                    place[row][i] = more ? int32_t(first + i) : place[row][i], top[row][i] = more ? scores[i] : top[row][i];
                }
            }
    }
    for (Index row = 0; row < rows; row++) {
        int best = 0;
        for (int i = 1; i < LANES; i++)
            if (top[row][i] > top[row][best] || (top[row][i] == top[row][best] && place[row][i] < place[row][best])) best = i;
        places[row] = place[row][best], whole[row] = !broken[row];
    }
}

// ``places``: flat nodes that the rows of ``logits`` belong to, null if they are all in order; seeds null: all requests are greedy, else
// those that are not ``sampled``. Noise as in NoiseKey, trees as in Tree; outputs as tree_verify has them.
template <class T>
void tree_verify(
    const T *logits, const Index *places, Index rows, Index vocab, const float *temperature, const Index *seeds, const Index *positions,
    const bool *sampled, const Index *tokens, const Index *parent, const Index *depth, const Index *ancestors, Index batch, Index nodes,
    Index max_depth, Index *path, Index *accepted, Index *committed, bool *healthy) {
    std::unique_ptr<Index[]> target(new Index[batch * nodes]);
    std::unique_ptr<bool[]> whole(new bool[batch * nodes]);
    std::fill(target.get(), target.get() + batch * nodes, -1), std::fill(whole.get(), whole.get() + batch * nodes, true);
    auto node_of = [&](Index row) { return places ? places[row] : row; };
    std::vector<Index> starts;  // of rows that follow one another and have the same noise
    for (Index row = 0; row < rows; row++) {
        Index node = node_of(row), before = row ? node_of(row - 1) : node;
        bool same = row && node / nodes == before / nodes && depth[node] == depth[before];
        if (!same || row - starts.back() == TOGETHER_ROWS) starts.push_back(row);
    }
    starts.push_back(rows);
#pragma omp parallel for schedule(dynamic) if (rows * vocab >= LEAST_WORK)
    for (size_t i = 0; i < starts.size() - 1; i++) {
        Index first = starts[i], count = starts[i + 1] - first, node = node_of(first), request = node / nodes, best[TOGETHER_ROWS];
        bool own_whole[TOGETHER_ROWS], noisy = seeds && sampled[request];
        largest(
            logits + first * vocab, count, temperature ? temperature[request] : 1, noisy ? seeds + request : nullptr,
            noisy ? positions[request] + depth[node] : 0, vocab, best, own_whole);
        for (Index row = 0; row < count; row++)
            target[node_of(first + row)] = best[row], whole[node_of(first + row)] = own_whole[row];
    }
    for (Index b = 0; b < batch; b++) {
        const Index first = b * nodes, place = b * (max_depth + 1);
        uint64_t right = 1;
        healthy[b] = true;
        for (Index i = 0; i < nodes; i++) {
            right |= uint64_t(tokens[first + i] == target[first + parent[first + i]]) << i;
            healthy[b] = healthy[b] && whole[first + i];
        }
        Index winner = 0;
        for (Index i = 1; i < nodes; i++)
            if ((right & ancestors[first + i]) == uint64_t(ancestors[first + i]) && depth[first + i] > depth[first + winner]) winner = i;
        std::fill(path + place, path + place + max_depth + 1, -1), std::fill(committed + place, committed + place + max_depth + 1, -1);
        for (Index i = 0; i < nodes; i++)
            if (ancestors[first + winner] >> i & 1)
                path[place + depth[first + i]] = i, committed[place + depth[first + i]] = target[first + i];
        accepted[b] = depth[first + winner];
    }
}

// path [batch, length]; k_cache and v_cache [layers, slots, width], tables [batch, table_row].
template <class T>
void kv_commit(
    T *k_cache, T *v_cache, Index layers, Index slots, Index width, const Index *tables, Index table_row, Index table_size,
    const Index *lengths, const Index *path, Index batch, Index length, Index block_size) {
    auto slot = [&](Index request, Index logical) {
        return tables[request * table_row + std::min(logical / block_size, table_size - 1)] * block_size + logical % block_size;
    };
    for (Index request = 0; request < batch; request++)
        for (Index d = 0; d < length; d++) {  // a row's place is never before its target, and the ones before it have been moved
            Index node = path[request * length + d];
            if (node <= d) continue;
            Index from = slot(request, lengths[request] + node) * width, to = slot(request, lengths[request] + d) * width;
            for (Index layer = 0; layer < layers; layer++)
                for (T *cache : {k_cache, v_cache})
                    std::memcpy(cache + layer * slots * width + to, cache + layer * slots * width + from, width * sizeof(T));
        }
}
