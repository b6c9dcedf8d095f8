// What lies between a layer's matrix products.
#pragma once

#include "numbers.h"

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
