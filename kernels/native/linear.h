// Matrix products of a few rows.
#pragma once

#include <algorithm>
#include <array>
#include <memory>
#include <utility>

#include "numbers.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

// Where elements lie as floats, if they do.
inline const float *floats(const float *x) { return x; }
inline const float *floats(const Bfloat16 *) { return nullptr; }

// Each weight is read once, and multiplied with all rows while it is in a register. Weights lie in panels of PANEL outputs,
// [outputs / PANEL, size, PANEL], so that a thread reads memory in order.
constexpr Index PANEL = 32, FEW_ROWS = 16;
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

// Few rows wait for memory, which is read faster at several places at once.
template <int STREAMS, int COUNT, class T, class W>
void multiply(const float *x, const W *weights, const float *scale, const float *bias, Index size, Index outputs, T *out, Index out_row) {
    for (Index first = 0; first < std::min(PANEL, outputs); first += 2 * WIDTH, weights += 2 * WIDTH) {
        Vector sums[COUNT][2] = {};
        auto add = [&](Index k) {
            const W *own = weights + k * PANEL;
            Vector left = load(own), right = load(own + WIDTH);
            for (Index byte = 0; byte < 2 * WIDTH * Index(sizeof(W)); byte += LINE)
                __builtin_prefetch(reinterpret_cast<const char *>(own) + AHEAD + byte, 0, 2);
            for (int i = 0; i < COUNT; i++) {
                sums[i][0] += x[i * size + k] * left;
                sums[i][1] += x[i * size + k] * right;
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
    if (rows == 0) return;
    constexpr auto streams = multiplications<4, T, W>(std::make_integer_sequence<int, MOST_ROWS>());
    constexpr auto stream = multiplications<1, T, W>(std::make_integer_sequence<int, MOST_ROWS>());
    const auto &run = rows <= FEW_ROWS && size * outputs * Index(sizeof(W)) >= FAR ? streams : stream;
    Index parts = (rows + MOST_ROWS - 1) / MOST_ROWS, most = (rows + parts - 1) / parts;
    const float *own = floats(x);
    std::unique_ptr<float[]> copy;  // a thread's own, so that nobody waits
    if (!own) {
        copy.reset(new float[rows * size]);
        for (Index i = 0; i < rows * size; i++) copy[i] = read(x[i]);
        own = copy.get();
    }
#pragma omp for schedule(static)
    for (Index panel = 0; panel < (outputs + PANEL - 1) / PANEL; panel++)
        for (Index part = 0; part < rows; part += most) {
            Index n = panel * PANEL;
            run[std::min(most, rows - part) - 1](
                own + part * size, panels + n * size, scale ? scale + n : nullptr, bias ? bias + n : nullptr, size, outputs - n,
                out + part * outputs + n, outputs);
        }
}
