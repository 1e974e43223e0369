// Kernels that tests run on the emulator: each instruction by itself, and a pipeline with a fault.
#pragma once

#include <cstdint>

#include "cuda/ptx.cuh"

namespace nabla::emulation::probes {

// Registers are [threads, count], row-major. Shared memory is what `image` holds at the start and
// gets at the end; addresses in it are offsets from its start.
struct WgmmaParams {
    int32_t type;  // 0 bf16, 1 fp16
    int32_t n;
    bool a_in_registers, transpose_b, accumulate;  // transpose_b: with a in registers
    const uint32_t* a;                        // [128, 4]; null where a is in shared memory
    const uint8_t* image;                     // [image_bytes]
    uint32_t image_bytes;                     // a multiple of 16
    uint32_t a_address, a_leading, a_stride;  // bytes
    uint32_t b_address, b_leading, b_stride;
    float* d;  // [128, n / 2]
};
void wgmma(const WgmmaParams& params);

struct CopyParams {
    ptx::TensorMap map;
    int32_t coordinates[4];
    const uint8_t* source;  // null: a box of `map`
    uint32_t bytes;         // that arrive
    uint8_t* image;         // [bytes]
};
void copy(const CopyParams& params);

struct WarpParams {
    int32_t instruction;  // see warp_kernel
    uint32_t argument;
    const uint32_t* inputs;  // [32, 8]
    const uint8_t* image;    // [image_bytes] before
    uint32_t image_bytes;
    uint32_t* outputs;   // [32, 8]
    uint8_t* image_out;  // [image_bytes] after
};
void warp(const WarpParams& params);

// Every CTA adds 1 / (3 + its index) to the sum: the order shows in the last bits.
void sum(float* result, int ctas);

// The first warpgroup goes down to so many registers, the others up.
void registers(int threads, int down, int up);

struct PipelineParams {
    int32_t fault;
    int32_t steps;         // tiles of b
    ptx::TensorMap b_map;  // b [steps * 64, 64] bf16, boxes of 64 rows
    const uint16_t* a;     // [64, 64] bf16
    const uint16_t* b;     // the same as b_map
    float* out;            // [ctas, 64, 64]: a times the sum of the tiles, transposed
    float* counter;        // [1]; every CTA adds 1
    int32_t ctas;
};
int faults();
const char* fault_name(int fault);
void pipeline(const PipelineParams& params);

}  // namespace nabla::emulation::probes
