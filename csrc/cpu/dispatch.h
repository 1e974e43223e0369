// Which kernels a machine runs: a pure function of what its processor has.
#pragma once

#include <string>
#include <vector>

#include "params.h"

namespace nabla::cpu {

// The launches of one instruction set.
struct Kernels {
    const char* name;
    void (*block_mean)(const BlockMeanParams&);
    void (*pooled_scores)(const ScoresParams&);
    void (*block_mask)(const BlockMaskParams&);
    void (*attention_forward)(const AttentionParams&);
    void (*attention_backward)(const AttentionBackwardParams&);
};

// What the choice depends on, in the words of __builtin_cpu_supports and __builtin_cpu_is.
using Features = std::vector<std::string>;

Features features();  // of this machine

// Those that a machine of such features runs, best first; the last one runs everywhere.
std::vector<Kernels> kernels_for(const Features& features);

}  // namespace nabla::cpu
