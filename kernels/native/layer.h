// What lies between a layer's matrix products.
#pragma once

#include "numbers.h"

// Of one row: total becomes own + delta, if there is one, and out its norm.
template <class T>
void add_rms_norm_of(const T *own, const T *delta, const T *weight, float eps, Index size, T *total, T *out) {
    if (delta) {
        for (Index i = 0; i < size; i++) write(total + i, read(own[i]) + read(delta[i]));
        own = total;
    }
    float sum = 0;
    for (Index i = 0; i < size; i++) sum += read(own[i]) * read(own[i]);
    float scale = 1 / std::sqrt(sum / size + eps);
    for (Index i = 0; i < size; i++) write(out + i, read(own[i]) * scale * read(weight[i]));
}

template <class T>
void add_rms_norm(const T *x, const T *delta, const T *weight, float eps, Index rows, Index size, T *total, T *out) {
#pragma omp for
    for (Index row = 0; row < rows; row++) {
        Index first = row * size;
        add_rms_norm_of(x + first, delta ? delta + first : nullptr, weight, eps, size, delta ? total + first : nullptr, out + first);
    }
}

template <class T>
void gated_silu(const T *gate_up, Index rows, Index size, T *out) {
    constexpr Index PART = 128;
#pragma omp for collapse(2)
    for (Index row = 0; row < rows; row++)
        for (Index first = 0; first < size; first += PART) {
            const T *gate = gate_up + 2 * row * size, *up = gate + size;
            for (Index i = first; i < std::min(first + PART, size); i++)
                write(out + row * size + i, read(gate[i]) / (1 + exponential(-read(gate[i]))) * read(up[i]));
        }
}

// A row's angles are those at its place, places null: of its own number.
template <class T>
void rope_store(
    const T *qk, Index qk_row, const T *v, Index v_row, const T *cos, const T *sin, const Index *places, const Index *slots,
    const bool *live, Index rows, Index heads, Index kv_heads, Index size, T *k_cache, T *v_cache, T *q) {
#pragma omp for collapse(2)
    for (Index row = 0; row < rows; row++)
        for (Index head = 0; head < heads + 2 * kv_heads; head++) {
            const Index half = size / 2, angle = (places ? places[row] : row) * size, kv = head - heads;
            T *stored = kv < kv_heads ? k_cache + (slots[row] * kv_heads + kv) * size : v_cache + (slots[row] * kv_heads + kv - kv_heads) * size;
            if (kv >= 0 && live && !live[row]) {
                std::memset(stored, 0, size * sizeof(T));
            } else if (kv >= kv_heads) {
                std::memcpy(stored, v + row * v_row + (kv - kv_heads) * size, size * sizeof(T));
            } else {
                const T *__restrict x = qk + row * qk_row + head * size, *__restrict c = cos + angle, *__restrict s = sin + angle;
                T *__restrict out = kv < 0 ? q + (row * heads + head) * size : stored;
                for (Index i = 0; i < half; i++) {
                    float first = read(x[i]), second = read(x[i + half]);
                    write(out + i, first * read(c[i]) + second * read(s[i]));
                    write(out + i + half, second * read(c[i + half]) + first * read(s[i + half]));
                }
            }
        }
}
