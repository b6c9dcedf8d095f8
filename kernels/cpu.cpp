// The kernels between a layer's matrix products, for CPUs. Each does what the Python reference beside it does, in one pass over memory and
// one call: a decoding step of a small model is made of many operations that take less time than it takes to begin them.
// Tensors are rows of elements one after the other, unless a stride (in elements) says otherwise. Sums are float.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <tuple>
#include <type_traits>
#include <utility>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

using Index = int64_t;
constexpr float INF = std::numeric_limits<float>::infinity();
constexpr Index LINE = 64;  // bytes that memory is read by
constexpr Index LEAST_WORK = 1 << 15;  // elements or products that are worth waking another thread for

#ifdef __AVX512F__
constexpr int WIDTH = 16, MOST_ROWS = 12;  // floats of a vector; rows whose sums fit into registers, beside weights
#else
constexpr int WIDTH = 8, MOST_ROWS = 4;
#endif
using Vector = float __attribute__((vector_size(4 * WIDTH)));
using Unaligned = float __attribute__((vector_size(4 * WIDTH), aligned(4)));

inline Vector load(const float *x) { return *reinterpret_cast<const Unaligned *>(x); }

struct Bfloat16 {
    uint16_t bits;
};

inline float read(float x) { return x; }

inline float read(Bfloat16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline void write(float *out, float x) { *out = x; }

inline void write(Bfloat16 *out, float x) {  // rounded to nearest, ties to even; a NaN stays one
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    out->bits = x != x ? 0x7FC0 : uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// e^x to two units in the last place, 0 below -87; a NaN stays one. Unlike the library's, it is computed for a whole vector at once.
inline float exponential(float x) {
    float bounded = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float power = std::nearbyint(bounded * 1.44269504f);
    float rest = bounded - power * 0.693145752f - power * 1.42860677e-6f;  // ln 2 in two parts
    float sum = 1.0f + rest * (1.0f + rest * (0.5f + rest * (0.166666672f + rest * (0.0416664891f + rest * (0.00833337847f + rest * 0.00138888892f)))));
    uint32_t bits = uint32_t(int32_t(power) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return x < -87.0f ? 0.0f : sum * scale;
}

// Where elements lie as floats, if they do.
inline const float *floats(const float *x) { return x; }
inline const float *floats(const Bfloat16 *) { return nullptr; }

template <class T>
void add_rms_norm(const T *x, const T *delta, const T *weight, float eps, Index rows, Index size, T *total, T *out) {
#pragma omp parallel for if (rows * size >= LEAST_WORK)
    for (Index row = 0; row < rows; row++) {
        const T *own = x + row * size;
        if (delta) {
            for (Index i = 0; i < size; i++) write(total + row * size + i, read(own[i]) + read(delta[row * size + i]));
            own = total + row * size;
        }
        float sum = 0;
        for (Index i = 0; i < size; i++) sum += read(own[i]) * read(own[i]);
        float scale = 1 / std::sqrt(sum / size + eps);
        for (Index i = 0; i < size; i++) write(out + row * size + i, read(own[i]) * scale * read(weight[i]));
    }
}

template <class T>
void gated_silu(const T *gate_up, Index rows, Index size, T *out) {
#pragma omp parallel for if (rows * size >= LEAST_WORK)
    for (Index row = 0; row < rows; row++) {
        const T *gate = gate_up + 2 * row * size, *up = gate + size;
        for (Index i = 0; i < size; i++) write(out + row * size + i, read(gate[i]) / (1 + exponential(-read(gate[i]))) * read(up[i]));
    }
}

template <class T>
void rope_store(
    const T *qk, Index qk_row, const T *v, Index v_row, const T *cos, const T *sin, const Index *slots, const bool *live, Index rows,
    Index heads, Index kv_heads, Index size, T *k_cache, T *v_cache, T *q) {
#pragma omp parallel for if (rows * (heads + 2 * kv_heads) * size >= LEAST_WORK)
    for (Index row = 0; row < rows; row++) {
        const T *c = cos + row * size, *s = sin + row * size;
        Index half = size / 2, place = slots[row] * kv_heads * size;
        bool alive = !live || live[row];
        for (Index head = 0; head < heads + kv_heads; head++) {
            const T *x = qk + row * qk_row + head * size;
            T *out = head < heads ? q + (row * heads + head) * size : k_cache + place + (head - heads) * size;
            if (head >= heads && !alive) {
                std::memset(out, 0, size * sizeof(T));
                continue;
            }
            for (Index i = 0; i < half; i++) {
                float first = read(x[i]), second = read(x[i + half]);
                write(out + i, first * read(c[i]) + second * read(s[i]));
                write(out + i + half, second * read(c[i + half]) + first * read(s[i + half]));
            }
        }
        if (alive)
            std::memcpy(v_cache + place, v + row * v_row, kv_heads * size * sizeof(T));
        else
            std::memset(v_cache + place, 0, kv_heads * size * sizeof(T));
    }
}

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
    Index slots[COLUMNS];
    layout.find(request, begin, slots);
    for (Index column = begin; column < last; column += COLUMNS) {
        Index columns = std::min(COLUMNS, last - column);
        uint32_t seen[ROWS], by_any = Layout::first_bits(COLUMNS);
        bool masked = layout.window || column + COLUMNS > length;
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
        for (Index c = 0; c < COLUMNS && first == 0; c++)  // nobody has read them yet
            for (Index d = 0, place = (slots[c] * kv_heads + kv_head) * size; d < size; d += LINE / Index(sizeof(T)))
                __builtin_prefetch(k_cache + place + d), __builtin_prefetch(v_cache + place + d);
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
            for (Index v = 0; v < vectors; v++) {
                Vector sum[GROUP];
                for (Index j = 0; j < GROUP; j++) sum[j] = sums[i + j][v] * kept[i + j];
                for (Index c = 0; c < columns; c++) {
                    Vector value = load(values[c] + v * WIDTH);
                    for (Index j = 0; j < GROUP; j++) sum[j] += scores[c][i + j] * value;
                }
                for (Index j = 0; j < GROUP; j++) sums[i + j][v] = sum[j];
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
    const T *q, Index q_request, Index q_row, Index q_head, const T *k_cache, const T *v_cache, const Layout &layout, Index heads,
    Index kv_heads, Index size, float scale, T *out) {
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

// Matrix products of a few rows: each weight is read once, and multiplied with all rows while it is in a register. Weights lie in panels
// of PANEL outputs, [outputs / PANEL, size, PANEL], so that a thread reads memory in order.
constexpr Index PANEL = 32, BLOCK = 64, FEW_ROWS = 16;
constexpr Index FAR = 2 << 20;  // bytes of a matrix that is not expected in a cache
constexpr Index AHEAD = 4096;  // bytes by which weights are fetched ahead, into the second-level cache

inline Vector load(const int8_t *x) {
#if defined(__AVX512F__)
    return Vector(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(x)))));
#elif defined(__AVX2__)
    return Vector(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(x)))));
#else
    Vector values;
    for (int i = 0; i < WIDTH; i++) values[i] = x[i];
    return values;
#endif
}

inline void store(float *out, const Vector (&values)[2], Index count) {
    if (count == 2 * WIDTH)
        std::memcpy(out, values, sizeof values);  // which is two instructions
    else
        std::memcpy(out, values, count * sizeof *out);
}

inline void store(Bfloat16 *out, const Vector (&values)[2], Index count) {
    float each[2 * WIDTH];
    std::memcpy(each, values, sizeof each);
    for (Index i = 0; i < count; i++) write(out + i, each[i]);
}

// ``rows`` has the COUNT rows side by side, [size, COUNT]. Few rows wait for memory, which is read faster at several places at once.
template <int STREAMS, int COUNT, class T, class W>
void multiply(const float *rows, const W *weights, const float *scale, const float *bias, Index size, Index outputs, T *out, Index out_row) {
    for (Index first = 0; first < std::min(PANEL, outputs); first += 2 * WIDTH, weights += 2 * WIDTH) {
        Vector sums[COUNT][2] = {};
        auto add = [&](Index k) {
            const W *own = weights + k * PANEL;
            Vector left = load(own), right = load(own + WIDTH);
            for (Index byte = 0; byte < 2 * WIDTH * Index(sizeof(W)); byte += LINE)
                __builtin_prefetch(reinterpret_cast<const char *>(own) + AHEAD + byte, 0, 2);
            for (int i = 0; i < COUNT; i++) {
                sums[i][0] += rows[k * COUNT + i] * left;
                sums[i][1] += rows[k * COUNT + i] * right;
            }
        };
        Index stream = size / STREAMS;
        for (Index k = 0; k < stream; k++)
            for (int part = 0; part < STREAMS; part++) add(part * stream + k);
        for (Index k = STREAMS * stream; k < size; k++) add(k);
        Index count = std::min<Index>(2 * WIDTH, outputs - first);
        for (int i = 0; i < COUNT; i++) {
            for (int half = 0; half < 2; half++) {
                if (scale) sums[i][half] *= load(scale + first + half * WIDTH);
                if (bias) sums[i][half] += load(bias + first + half * WIDTH);
            }
            store(out + i * out_row + first, sums[i], count);
        }
    }
}

template <class T, class W>
using Multiply = void (*)(const float *, const W *, const float *, const float *, Index, Index, T *, Index);

template <int STREAMS, class T, class W, int... COUNTS>
constexpr std::array<Multiply<T, W>, sizeof...(COUNTS)> multiplications(std::integer_sequence<int, COUNTS...>) {
    return {multiply<STREAMS, COUNTS + 1, T, W>...};
}

template <class T, class W>
void linear(const T *x, const W *panels, const float *scale, const float *bias, Index rows, Index size, Index outputs, T *out) {
    constexpr auto streams = multiplications<4, T, W>(std::make_integer_sequence<int, MOST_ROWS>());
    constexpr auto stream = multiplications<1, T, W>(std::make_integer_sequence<int, MOST_ROWS>());
    const auto &run = rows <= FEW_ROWS && size * outputs * Index(sizeof(W)) >= FAR ? streams : stream;
    Index parts = (rows + MOST_ROWS - 1) / MOST_ROWS, most = (rows + parts - 1) / parts, count = (outputs + PANEL - 1) / PANEL;
    std::unique_ptr<float[]> memory;
    const float *turned = floats(x);  // the rows of a part side by side, as a single row is anyway
    float *copy = nullptr;
    if (rows > 1 || !turned) {
        memory.reset(copy = new float[rows * size]);
        turned = copy;
    }
#pragma omp parallel if (rows * size * outputs >= LEAST_WORK)
    {
        if (copy) {
#pragma omp for schedule(static)
            for (Index block = 0; block < size; block += BLOCK)  // two threads that write to one line would take it from each other
                for (Index row = 0; row < rows; row++) {
                    Index part = row / most * most, width = std::min(most, rows - part);
                    float *to = copy + part * size + row - part;
                    for (Index k = block; k < std::min(block + BLOCK, size); k++) to[k * width] = read(x[row * size + k]);
                }
        }
#pragma omp for schedule(static) nowait
        for (Index panel = 0; panel < count; panel++)
            for (Index part = 0; part < rows; part += most) {
                Index n = panel * PANEL;
                run[std::min(most, rows - part) - 1](
                    turned + part * size, panels + n * size, scale ? scale + n : nullptr, bias ? bias + n : nullptr, size,
                    outputs - n, out + part * outputs + n, outputs);
            }
    }
}

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

constexpr Index COUNTERS = 64;  // of Philox, with four words each, that are made at once

void gumbel_noise(const Index *seeds, const Index *positions, Index rows, Index vocab, float *out) {
    Index blocks = (vocab + 4 * COUNTERS - 1) / (4 * COUNTERS);
#pragma omp parallel for collapse(2) if (rows * vocab >= LEAST_WORK)
    for (Index row = 0; row < rows; row++)
        for (Index block = 0; block < blocks; block++) {
            uint32_t words[4][COUNTERS], key0 = uint32_t(seeds[row]), key1 = uint32_t(seeds[row] >> 32);
            for (Index i = 0; i < COUNTERS; i++)
                words[0][i] = uint32_t(block * COUNTERS + i), words[1][i] = uint32_t(positions[row]), words[2][i] = words[3][i] = 0;
            for (int round = 0; round < 7; round++, key0 += 0x9E3779B9, key1 += 0xBB67AE85)
                for (Index i = 0; i < COUNTERS; i++) {
                    uint64_t first = uint64_t(words[0][i]) * 0xD2511F53, second = uint64_t(words[2][i]) * 0xCD9E8D57;
                    words[0][i] = uint32_t(second >> 32) ^ words[1][i] ^ key0, words[1][i] = uint32_t(second);
                    words[2][i] = uint32_t(first >> 32) ^ words[3][i] ^ key1, words[3][i] = uint32_t(first);
                }
            float drawn[4][COUNTERS], noise[4 * COUNTERS];
            for (int word = 0; word < 4; word++)
                for (Index i = 0; i < COUNTERS; i++) drawn[word][i] = gumbel(words[word][i]);
            for (Index i = 0; i < 4 * COUNTERS; i++) noise[i] = drawn[i % 4][i / 4];
            Index first = block * 4 * COUNTERS;
            std::memcpy(out + row * vocab + first, noise, std::min(4 * COUNTERS, vocab - first) * sizeof *noise);
        }
}

// The place of the largest of logits / temperature + noise, the first of equal ones; whether there is no NaN among them.
template <class T>
std::pair<Index, bool> largest(const T *logits, float temperature, const float *noise, Index vocab) {
    constexpr int LANES = 32;
    float top[LANES];
    int32_t place[LANES] = {}, broken = 0;
    std::fill(top, top + LANES, -INF);
    for (Index first = 0; first < vocab; first += LANES) {
        Index lanes = std::min<Index>(LANES, vocab - first);
        float scores[LANES];
        for (Index i = 0; i < lanes; i++) scores[i] = read(logits[first + i]);
        for (Index i = lanes; i < LANES; i++) scores[i] = -INF;
        if (temperature != 1)
            for (Index i = 0; i < LANES; i++) scores[i] = scores[i] / temperature;
        if (noise)
            for (Index i = 0; i < lanes; i++) scores[i] += noise[first + i];
        for (Index i = 0; i < LANES; i++) {
            broken |= scores[i] != scores[i];
            bool more = scores[i] > top[i];
            place[i] = more ? int32_t(first + i) : place[i], top[i] = more ? scores[i] : top[i];
        }
    }
    int best = 0;
    for (int i = 1; i < LANES; i++)
        if (top[i] > top[best] || (top[i] == top[best] && place[i] < place[best])) best = i;
    return {place[best], !broken};
}

// ``places``: flat nodes that the rows of ``logits`` belong to, null if they are all in order; noise [batch, depths, vocab], greedy requests
// having zeros. Trees as in Tree; outputs as tree_verify has them.
template <class T>
void tree_verify(
    const T *logits, const Index *places, Index rows, Index vocab, const float *temperature, const float *noise, Index depths,
    const Index *tokens, const Index *parent, const Index *depth, const Index *ancestors, Index batch, Index nodes, Index max_depth,
    Index *path, Index *accepted, Index *committed, bool *healthy) {
    std::unique_ptr<Index[]> target(new Index[batch * nodes]);
    std::unique_ptr<bool[]> whole(new bool[batch * nodes]);
    std::fill(target.get(), target.get() + batch * nodes, -1), std::fill(whole.get(), whole.get() + batch * nodes, true);
#pragma omp parallel for if (rows * vocab >= LEAST_WORK)
    for (Index row = 0; row < rows; row++) {
        Index node = places ? places[row] : row, request = node / nodes;
        const float *drawn = noise ? noise + (request * depths + depth[node]) * vocab : nullptr;
        std::tie(target[node], whole[node]) = largest(logits + row * vocab, temperature ? temperature[request] : 1, drawn, vocab);
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

// parent [batch, nodes] -> ancestors [batch, nodes, words] and depth, as tree_mask has them.
void tree_mask(const Index *parent, Index batch, Index nodes, Index words, Index *ancestors, Index *depth) {
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

// As best_nodes has it, for trees of up to ``most`` nodes beside the root; the rows of tokens_out and parent_out have 1 + ``most``. Returns
// how many columns beside the first are used.
Index best_nodes(
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
        for (Index i = 0; i < count; i++) {
            Index place = kept[i], parent = place < 0 ? 0 : parents[b * drafted + place];
            if (place >= 0) node[place] = ++used;
            out[1 + i] = place < 0 ? -1 : tokens[b * drafted + place], up[1 + i] = parent ? node[parent - 1] : 0;
        }
    }
    return count;
}

// As draft_level has it, with temperature as the only option; noise: of the level, that of a request ``noise_row`` after the one before.
template <class T>
void draft_level(
    const T *logits, const float *temperature, const float *noise, Index noise_row, const float *sigma, const Index *target_ids,
    const float *parent_scores, Index batch, Index rows, Index vocab, Index topk, float *scores, Index *tokens, float *best_scores,
    Index *best, Index *best_rows, Index *best_tokens) {
    constexpr Index PART = 64;
#pragma omp parallel for if (batch * rows * vocab >= LEAST_WORK)
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
        float inverse = 1 / sigma[b], highest = -INF, sum = 0;
        for (Index part = 0; part < parts; part++) {
            float most = -INF;
            for (float *value = x.get() + part * PART, *end = value + PART; value < end; value++) {
                *value *= inverse;
                most = *value > most ? *value : most;
            }
            top[part] = most, highest = std::max(highest, most);
        }
        for (Index v = 0; v < vocab; v++) sum += exponential(x[v] - highest);
        float offset = parent_scores[line] - highest - std::log(sum);
        float *values = scores + line * topk;
        Index *ids = tokens + line * topk;
        for (Index k = 0; k < topk; k++) values[k] = -INF, ids[k] = k;
        for (Index part = 0; part < parts; part++)
            for (Index v = part * PART; v < (part + 1) * PART && top[part] > values[topk - 1]; v++)
                if (x[v] > values[topk - 1]) insert(values, ids, topk, x[v], v);
        for (Index k = 0; k < topk; k++) {
            values[k] += offset;
            if (!(values[k] == values[k])) values[k] = -INF;  // a NaN or an infinity among the logits
            if (target_ids) ids[k] = target_ids[ids[k]];
        }
    }
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

}  // namespace

#define FOR_TYPE(NAME, T)                                                                                                                  \
    void int8_linear_##NAME(                                                                                                               \
        const T *x, const int8_t *panels, const float *scale, const float *bias, Index rows, Index size, Index outputs, T *out) {              \
        linear(x, panels, scale, bias, rows, size, outputs, out);                                                                          \
    }                                                                                                                                      \
    void draft_level_##NAME(                                                                                                               \
        const T *logits, const float *temperature, const float *noise, Index noise_row, const float *sigma, const Index *target_ids,       \
        const float *parent_scores, Index batch, Index rows, Index vocab, Index topk, float *scores, Index *tokens, float *best_scores,    \
        Index *best, Index *best_rows, Index *best_tokens) {                                                                               \
        draft_level(logits, temperature, noise, noise_row, sigma, target_ids, parent_scores, batch, rows, vocab, topk, scores, tokens,     \
                    best_scores, best, best_rows, best_tokens);                                                                            \
    }                                                                                                                                      \
    void tree_verify_##NAME(                                                                                                               \
        const T *logits, const Index *places, Index rows, Index vocab, const float *temperature, const float *noise, Index depths,         \
        const Index *tokens, const Index *parent, const Index *depth, const Index *ancestors, Index batch, Index nodes, Index max_depth,   \
        Index *path, Index *accepted, Index *committed, bool *healthy) {                                                                   \
        tree_verify(logits, places, rows, vocab, temperature, noise, depths, tokens, parent, depth, ancestors, batch, nodes, max_depth,    \
                    path, accepted, committed, healthy);                                                                                   \
    }                                                                                                                                      \
    void kv_commit_##NAME(                                                                                                                 \
        T *k_cache, T *v_cache, Index layers, Index slots, Index width, const Index *tables, Index table_row, Index table_size,            \
        const Index *lengths, const Index *path, Index batch, Index length, Index block_size) {                                            \
        kv_commit(k_cache, v_cache, layers, slots, width, tables, table_row, table_size, lengths, path, batch, length, block_size);        \
    }                                                                                                                                      \
    void add_rms_norm_##NAME(const T *x, const T *delta, const T *weight, float eps, Index rows, Index size, T *total, T *out) {           \
        add_rms_norm(x, delta, weight, eps, rows, size, total, out);                                                                       \
    }                                                                                                                                      \
    void gated_silu_##NAME(const T *gate_up, Index rows, Index size, T *out) { gated_silu(gate_up, rows, size, out); }                     \
    void rope_store_##NAME(                                                                                                                \
        const T *qk, Index qk_row, const T *v, Index v_row, const T *cos, const T *sin, const Index *slots, const bool *live, Index rows,  \
        Index heads, Index kv_heads, Index size, T *k_cache, T *v_cache, T *q) {                                                           \
        rope_store(qk, qk_row, v, v_row, cos, sin, slots, live, rows, heads, kv_heads, size, k_cache, v_cache, q);                         \
    }                                                                                                                                      \
    void tree_attention_##NAME(                                                                                                            \
        const T *q, Index q_request, Index q_row, Index q_head, const T *k_cache, const T *v_cache, const Index *tables,                   \
        const Index *lengths, const Index *depth, const Index *ancestors, const Index *starts, const Index *counts, const Index *nodes, Index table_row, Index table_size, Index depth_row, Index words, \
        Index batch, Index rows, Index block_size, Index first_column, Index window, Index heads, Index kv_heads, Index size, float scale, \
        T *out) {                                                                                                                          \
        Layout layout{tables, lengths, depth, ancestors, starts, counts, nodes, table_row, table_size, depth_row, words, batch, rows, block_size, first_column,   \
                      window};                                                                                                             \
        tree_attention(q, q_request, q_row, q_head, k_cache, v_cache, layout, heads, kv_heads, size, scale, out);                          \
    }

extern "C" {
void tree_mask_float32(const Index *parent, Index batch, Index nodes, Index words, Index *ancestors, Index *depth) {
    tree_mask(parent, batch, nodes, words, ancestors, depth);
}
Index best_nodes_float32(
    const Index *roots, const float *scores, const Index *tokens, const Index *parents, Index batch, Index drafted, Index most, float price,
    Index *tokens_out, Index *parent_out) {
    return best_nodes(roots, scores, tokens, parents, batch, drafted, most, price, tokens_out, parent_out);
}
void gumbel_noise_float32(const Index *seeds, const Index *positions, Index rows, Index vocab, float *out) {
    gumbel_noise(seeds, positions, rows, vocab, out);
}
void linear_float32(const float *x, const float *panels, const float *bias, Index rows, Index size, Index outputs, float *out) {
    linear(x, panels, nullptr, bias, rows, size, outputs, out);
}
FOR_TYPE(float32, float)
FOR_TYPE(bfloat16, Bfloat16)
}
