// What all kernels compute with.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

using Index = int64_t;
constexpr float INF = std::numeric_limits<float>::infinity();
constexpr Index LINE = 64;  // bytes that memory is read by
constexpr Index LEAST_WORK = 1 << 15;  // elements that are worth waking another thread for

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

// e^x to a few units in the last place, 0 below -87; a NaN stays one. Unlike the library's, it is computed for a whole vector at once.
inline float exponential(float x) {
    float bounded = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float power = std::nearbyint(bounded * 1.44269504f);
    float rest = bounded - power * 0.693147182f;
    float sum = 1.0f + rest * (1.0f + rest * (0.5f + rest * (0.166666672f + rest * (0.0416664891f + rest * (0.00833337847f + rest * 0.00138888892f)))));
    uint32_t bits = uint32_t(int32_t(power) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return x < -87.0f ? 0.0f : sum * scale;
}

// Most kernels are called by all threads of a team, which share out the work; what one leaves behind is there for all when it returns.
// This is such a kernel with a team of its own.
template <auto KERNEL>
struct Alone;

template <class... ARGUMENTS, void (*KERNEL)(ARGUMENTS...)>
struct Alone<KERNEL> {
    static void run(ARGUMENTS... arguments) {
#pragma omp parallel
        KERNEL(arguments...);
    }
};
