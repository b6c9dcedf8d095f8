// Matrix products of bfloat16 by a processor's tiles (Intel AMX), of which each holds 16 rows of 64 bytes.
#pragma once

#include <cstdlib>

#include "linear.h"

#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

constexpr Index TILE_ROWS = 16, TILE_DEPTH = 32, STREAMS = 4;  // STREAMS: places of a panel that are read in turn, as in linear.h

// Whether the system lets this process use tiles, which are a part of a thread's state that it must make room for.
inline bool has_tiles() {
    constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool permitted = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
    return permitted;
}

struct alignas(64) TileConfig {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {TILE_ROWS, TILE_ROWS, TILE_ROWS, TILE_ROWS, TILE_ROWS, TILE_ROWS, TILE_ROWS, TILE_ROWS};
};

// sums [TILES * TILE_ROWS, PANEL] of as many rows of x, [TILES * TILE_ROWS, steps * TILE_DEPTH], and a panel. Tiles 0 to 3 are the sums,
// 4 and 5 rows of x, 6 and 7 the halves of the panel.
template <int TILES>
void multiply_tiles(const Bfloat16 *x, const Bfloat16 *panel, Index steps, float *sums) {
    const Index row = steps * TILE_DEPTH * Index(sizeof(Bfloat16)), pairs = PANEL * 2 * sizeof(Bfloat16);
    auto add = [&](Index step) {
        const Bfloat16 *weights = panel + step * TILE_DEPTH * PANEL, *own = x + step * TILE_DEPTH;
        for (Index byte = 0; byte < TILE_DEPTH * PANEL * Index(sizeof(Bfloat16)); byte += LINE)
            __builtin_prefetch(reinterpret_cast<const char *>(weights) + AHEAD + byte, 0, 2);
        _tile_loadd(6, weights, pairs);
        _tile_loadd(7, weights + PANEL, pairs);
        _tile_loadd(4, own, row);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (TILES == 2) {
            _tile_loadd(5, own + TILE_ROWS * steps * TILE_DEPTH, row);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    };
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    Index stream = steps / STREAMS;
    for (Index step = 0; step < stream; step++)
        for (Index part = 0; part < STREAMS; part++) add(part * stream + step);
    for (Index step = STREAMS * stream; step < steps; step++) add(step);
    constexpr Index out = PANEL * sizeof(float);
    _tile_stored(0, sums, out);
    _tile_stored(1, sums + PANEL / 2, out);
    if (TILES == 2) {
        _tile_stored(2, sums + TILE_ROWS * PANEL, out);
        _tile_stored(3, sums + TILE_ROWS * PANEL + PANEL / 2, out);
    }
}

// As linear; panels [outputs / PANEL, size / 2, PANEL, 2], the size being filled up to a multiple of TILE_DEPTH. There is no scale.
inline void tile_linear(
    const Bfloat16 *x, const Bfloat16 *panels, const float *, const float *bias, Index rows, Index size, Index outputs, Bfloat16 *out) {
    Index steps = (size + TILE_DEPTH - 1) / TILE_DEPTH, depth = steps * TILE_DEPTH, tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    std::unique_ptr<Bfloat16[]> whole;  // x, filled up with zeros: a thread's own, so that nobody waits
    if (rows % TILE_ROWS || size % TILE_DEPTH) {
        whole.reset(new Bfloat16[tiles * TILE_ROWS * depth]());
        for (Index row = 0; row < rows; row++) std::memcpy(whole.get() + row * depth, x + row * size, size * sizeof *x);
        x = whole.get();
    }
    const TileConfig config;
    asm volatile("" ::: "memory");  // some compilers do not know that all of the config is read
    _tile_loadconfig(&config);
    float sums[2 * TILE_ROWS][PANEL];
#pragma omp for schedule(static)
    for (Index panel = 0; panel < (outputs + PANEL - 1) / PANEL; panel++)
        for (Index first = 0; first < rows; first += 2 * TILE_ROWS) {
            auto run = rows - first > TILE_ROWS ? multiply_tiles<2> : multiply_tiles<1>;
            run(x + first * depth, panels + panel * PANEL * depth, steps, sums[0]);
            Index count = std::min(PANEL, outputs - panel * PANEL);
            for (Index row = first; row < std::min(rows, first + 2 * TILE_ROWS); row++)
                for (Index half = 0; half < count; half += 2 * WIDTH) {
                    const float *own = sums[row - first] + half, *offset = bias ? bias + panel * PANEL + half : nullptr;
                    Vector values[2] = {load(own), load(own + WIDTH)};
                    if (offset) values[0] += load(offset), values[1] += load(offset + WIDTH);
                    store(out + row * outputs + panel * PANEL + half, values, std::min<Index>(2 * WIDTH, count - half));
                }
        }
    _tile_release();
}
#else
inline bool has_tiles() { return false; }

inline void tile_linear(const Bfloat16 *, const Bfloat16 *, const float *, const float *, Index, Index, Index, Bfloat16 *) { std::abort(); }
#endif
