// Which query blocks a CTA computes together, sharing each load of keys and values.
//
// The blocks of one place in kSize frames in a row: their windows differ in a frame or two, so
// their rows of the mask agree best. What is left when such chunks of frames are taken away (odd
// numbers of frames, one frame, plain sequences, extra tokens, a slice's end) is grouped in order.
// Blocks count from the first query block, so a slice of the queries pairs its own frames.
#pragma once

#include "cuda/ptx.cuh"

namespace nabla {

template <int kSize>
struct QueryGroups {
    int32_t q_blocks;      // Nq
    int32_t frame_blocks;  // of one frame

    NABLA_HOST_DEVICE int32_t whole_chunks() const { return q_blocks / (kSize * frame_blocks); }
    NABLA_HOST_DEVICE int32_t chunked() const { return whole_chunks() * frame_blocks; }  // groups
    NABLA_HOST_DEVICE int32_t count() const {
        return chunked() + (q_blocks - chunked() * kSize + kSize - 1) / kSize;
    }

    // Query block `member` of a group, or -1 where the last group has fewer.
    NABLA_HOST_DEVICE int32_t block(int32_t group, int32_t member) const {
        const int32_t chunk = group / frame_blocks, place = group % frame_blocks;
        if (chunk < whole_chunks()) return (chunk * kSize + member) * frame_blocks + place;
        const int32_t block = group * kSize + member;
        return block < q_blocks ? block : -1;
    }
};

}  // namespace nabla
