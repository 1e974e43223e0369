// Which blocks a CTA computes together, sharing each load of those that they attend to, or that
// attend to them.
//
// The blocks of one place in kSize frames in a row: their windows differ in a frame or two, so
// their rows and their columns of the mask agree best. What is left when such chunks of frames are
// taken away (odd numbers of frames, one frame, plain sequences, extra tokens, a slice's end) is
// grouped in order. Blocks count from the first of a slice, so a slice of the queries pairs its own
// frames.
#pragma once

#include "cuda/ptx.cuh"

namespace nabla {

template <int kSize>
struct BlockGroups {
    int32_t blocks;
    int32_t frame_blocks;  // of one frame

    NABLA_HOST_DEVICE int32_t whole_chunks() const { return blocks / (kSize * frame_blocks); }
    NABLA_HOST_DEVICE int32_t chunked() const { return whole_chunks() * frame_blocks; }  // groups
    NABLA_HOST_DEVICE int32_t count() const {
        return chunked() + (blocks - chunked() * kSize + kSize - 1) / kSize;
    }

    // Block `member` of a group, or -1 where the last group has fewer.
    NABLA_HOST_DEVICE int32_t block(int32_t group, int32_t member) const {
        const int32_t chunk = group / frame_blocks, place = group % frame_blocks;
        if (chunk < whole_chunks()) return (chunk * kSize + member) * frame_blocks + place;
        const int32_t block = group * kSize + member;
        return block < blocks ? block : -1;
    }
};

}  // namespace nabla
