// The kernels for CPUs, each of which does what the Python reference of its name does, in one pass over memory and one call: a decoding
// step of a small model is made of many operations that take less time than it takes to begin them.
// Tensors are rows of elements one after the other, unless a stride (in elements) says otherwise. Sums are float.

#include <map>
#include <string>

#include "attention.h"
#include "grow.h"
#include "layer.h"
#include "layers.h"
#include "linear.h"
#include "tiles.h"
#include "trees.h"
#include "verify.h"

#define FOR_BOTH(NAME)                                       \
    {#NAME "_float32", reinterpret_cast<void *>(NAME<float>)}, \
    {#NAME "_bfloat16", reinterpret_cast<void *>(NAME<Bfloat16>)}
#define ALONE(...) reinterpret_cast<void *>(Alone<__VA_ARGS__>::run)
#define ALONE_FOR_BOTH(NAME) {#NAME "_float32", ALONE(NAME<float>)}, {#NAME "_bfloat16", ALONE(NAME<Bfloat16>)}

// The address of a kernel, null where there is none of that name, or where this machine cannot run it.
extern "C" __attribute__((visibility("default"))) void *kernel(const char *name) {
    static const std::map<std::string, void *> kernels = {
        ALONE_FOR_BOTH(add_rms_norm),
        ALONE_FOR_BOTH(gated_silu),
        ALONE_FOR_BOTH(rope_store),
        ALONE_FOR_BOTH(tree_attention),
        FOR_BOTH(decode),
        FOR_BOTH(head_rows),
        FOR_BOTH(catch_up),
        FOR_BOTH(grow),
        FOR_BOTH(kv_commit),
        FOR_BOTH(tree_verify),
        ALONE_FOR_BOTH(draft_level),
        {"linear_float32", ALONE(linear<float, float>)},
        {"linear_bfloat16", has_tiles() ? ALONE(tile_linear) : nullptr},
        {"int8_linear_float32", ALONE(linear<float, int8_t>)},
        {"int8_linear_bfloat16", ALONE(linear<Bfloat16, int8_t>)},
        {"gumbel_noise", ALONE(gumbel_noise)},
        {"tree_mask", reinterpret_cast<void *>(tree_mask)},
        {"best_nodes", reinterpret_cast<void *>(best_nodes)},
    };
    auto found = kernels.find(name);
    return found == kernels.end() ? nullptr : found->second;
}
