// Keyword arguments become Params. Pointers are integers, a tensor [B, H, S, D] is (pointer, stride_b,
// stride_h, stride_s).
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "params.h"

namespace nabla {

namespace py = pybind11;

// Fields of a launch by name; a missing one is a KeyError.
class Fields {
  public:
    explicit Fields(const py::kwargs& fields) : fields_(fields) {}

    bool has(const char* name) const { return fields_.contains(name); }

    template <class T>
    T get(const char* name) const {
        return fields_[name].cast<T>();
    }
    int32_t integer(const char* name) const { return get<int32_t>(name); }
    DType dtype() const { return static_cast<DType>(integer("dtype")); }

    template <class T>
    T* pointer(const char* name) const {  // None is a null pointer
        const py::object value = fields_[name];
        return value.is_none() ? nullptr : reinterpret_cast<T*>(value.cast<uintptr_t>());
    }
    View view(const char* name) const {
        const auto t = get<std::array<int64_t, 4>>(name);
        return {reinterpret_cast<void*>(t[0]), t[1], t[2], t[3]};
    }
    Blocks blocks() const {  // TokenGrid.as_ints(), and beside it the starts where they are read
        const auto g = get<std::array<int32_t, 7>>("grid");
        const auto ceil_div = [](int32_t x, int32_t y) { return (x + y - 1) / y; };
        Blocks b;
        b.grid = {g[0], g[1], g[2], g[3], g[4], g[5], g[6]};
        b.starts = has("starts") ? pointer<const int32_t>("starts") : nullptr;
        b.nt = ceil_div(g[0], g[3]);
        b.nh = ceil_div(g[1], g[4]);
        b.nw = ceil_div(g[2], g[5]);
        b.grid_count = b.nt * b.nh * b.nw;
        b.count = b.grid_count + ceil_div(g[6], g[3] * g[4] * g[5]);
        return b;
    }
    Window window() const {
        const auto w = get<std::array<int32_t, 3>>("window");
        return {w[0], w[1], w[2]};
    }

    // Where the launch runs: `threads` or `stream`.
    template <class Params>
    void place(Params& p) const {
        p.threads = has("threads") ? integer("threads") : 0;
        p.stream = has("stream") ? pointer<void>("stream") : nullptr;
    }

  private:
    const py::kwargs& fields_;
};

inline BlockMeanParams block_mean_params(const Fields& f) {
    BlockMeanParams p;
    p.dtype = f.dtype();
    p.batch = f.integer("batch");
    p.heads = f.integer("heads");
    p.head_dim = f.integer("head_dim");
    p.x_blocks = f.integer("x_blocks");
    p.block_offset = f.integer("block_offset");
    p.blocks = f.blocks();
    p.x = f.view("x");
    p.mean = f.pointer<float>("mean");
    p.mean_stride = f.integer("mean_stride");
    f.place(p);
    return p;
}

inline ScoresParams scores_params(const Fields& f) {
    ScoresParams p;
    p.batch = f.integer("batch");
    p.heads = f.integer("heads");
    p.kv_heads = f.integer("kv_heads");
    p.head_dim = f.integer("head_dim");
    p.q_blocks = f.integer("q_blocks");
    p.q_block_offset = f.integer("q_block_offset");
    p.blocks = f.blocks();
    p.scale = f.get<float>("scale");
    p.q_mean = f.pointer<const float>("q_mean");
    p.k_mean = f.pointer<const float>("k_mean");
    p.k_mean_stride = f.integer("k_mean_stride");
    p.scores = f.pointer<float>("scores");
    f.place(p);
    return p;
}

inline BlockMaskParams block_mask_params(const Fields& f) {
    BlockMaskParams p;
    p.scores = scores_params(f);
    p.window = f.window();
    p.top_p = f.pointer<const float>("top_p");
    p.bits = f.pointer<uint32_t>("bits");
    return p;
}

inline TransposeParams transpose_params(const Fields& f) {
    TransposeParams p;
    p.batch = f.integer("batch");
    p.heads = f.integer("heads");
    p.q_blocks = f.integer("q_blocks");
    p.blocks = f.blocks();
    p.bits = f.pointer<const uint32_t>("bits");
    p.bits_stride_b = f.get<int64_t>("bits_stride_b");
    p.bits_stride_h = f.get<int64_t>("bits_stride_h");
    p.columns = f.pointer<uint32_t>("columns");
    f.place(p);
    return p;
}

inline AttentionParams attention_params(const Fields& f) {
    AttentionParams p;
    p.dtype = f.dtype();
    p.batch = f.integer("batch");
    p.heads = f.integer("heads");
    p.kv_heads = f.integer("kv_heads");
    p.head_dim = f.integer("head_dim");
    p.q_blocks = f.integer("q_blocks");
    p.q_block_offset = f.integer("q_block_offset");
    p.blocks = f.blocks();
    p.scale = f.get<float>("scale");
    p.q = f.view("q");
    p.k = f.view("k");
    p.v = f.view("v");
    p.out = f.view("out");
    p.lse = f.pointer<float>("lse");
    p.bits = f.pointer<const uint32_t>("bits");
    p.bits_stride_b = f.get<int64_t>("bits_stride_b");
    p.bits_stride_h = f.get<int64_t>("bits_stride_h");
    f.place(p);
    return p;
}

inline AttentionBackwardParams attention_backward_params(const Fields& f) {
    AttentionBackwardParams p;
    p.forward = attention_params(f);
    p.dout = f.view("dout");
    p.dlse = f.pointer<const float>("dlse");
    p.dq = f.view("dq");
    p.dk = f.view("dk");
    p.dv = f.view("dv");
    p.delta = f.pointer<float>("delta");
    const bool is_cuda = f.has("columns");
    p.columns = is_cuda ? f.pointer<const uint32_t>("columns") : nullptr;
    p.columns_stride_b = is_cuda ? f.get<int64_t>("columns_stride_b") : 0;
    p.columns_stride_h = is_cuda ? f.get<int64_t>("columns_stride_h") : 0;
    p.dq_sums = is_cuda ? f.pointer<float>("dq_sums") : nullptr;
    return p;
}

}  // namespace nabla
