// bits[i, j] = 1 iff the scores ranked before j in row i hold less than top_p of the row, or the
// window or an always-kept block says so. Ranks are by descending score, then by index.
//
// No row is sorted: the score at the cut is found by bisection on its bit pattern (positive floats
// order as integers), and only the few candidates that are left at the end are put in order. Sums
// are in double precision, so that the cut does not depend on how a vector adds.
#include "cpu/bits.h"
#include "cpu/kernels.h"
#include "cpu/scores.h"
#include "cpu/scratch.h"

namespace nabla::cpu::NABLA_ISA {
namespace {

constexpr int kFewCandidates = 32;
constexpr float kAlwaysKept =
    -1.0f;  // stands for +inf in a row: below every score, and without mass

struct MaskArrays {
    float* rows;      // [kScoreRows, padded]
    int* candidates;  // [padded]
    MaskArrays(Arena& arena, int padded)
        : rows(arena.take<float>(kScoreRows * padded)), candidates(arena.take<int>(padded)) {}
};

struct Mass {
    int count;
    double total;
};

static inline int32_t bits_of(float x) { return load_raw<int32_t>(&x); }

// The scores whose bit pattern is above `threshold`.
Mass mass_above(const float* row, int padded, int32_t threshold) {
    constexpr int kHalf = kWidth / 2;
    HalfInts count[2]{};
    Doubles total[2]{};  // two sums, as each addition waits for the one before
    for (int j = 0; j < padded; j += kWidth)
        for (int half = 0; half < 2; ++half) {
            const HalfInts x = load_raw<HalfInts>(row + j + half * kHalf);
            const HalfInts above = x > threshold;
            count[half] -= above;
            total[half] += __builtin_convertvector((HalfFloats)(x & above), Doubles);
        }
    Mass mass{0, 0};
    for (int i = 0; i < kHalf; ++i) {
        mass.count += count[0][i] + count[1][i];
        mass.total += total[0][i] + total[1][i];
    }
    return mass;
}

// Mark the always-kept entries in bits and in the row; return the largest score.
float mark_always_kept(float* row, int padded, uint32_t* bits) {
    Floats top = splat(kAlwaysKept);
    for (int j = 0; j < padded; j += kWidth) {
        const Floats x = load(row + j);
        const Ints kept = ~is_finite(x);
        const Floats score = kept ? splat(kAlwaysKept) : max(Floats{}, x);
        top = max(top, score);
        store(row + j, score);
        bits[j / 32] |= mask_bits(kept) << (j % 32);
    }
    for (int i = 1; i < kWidth; ++i) top[0] = top[0] > top[i] ? top[0] : top[i];
    return top[0];
}

// Set the bits of the fewest scores that hold top_p of the row. Overwrites the row.
void select_row(float* row, int padded, float top_p, uint32_t* bits, int* candidates) {
    const float top = mark_always_kept(row, padded, bits);
    if (top < 0) return;  // nothing to rank
    // Scores above `high` are kept, and those up to `low` are not: the cut lies between.
    int32_t low = -1, high = bits_of(top);
    Mass above_low = mass_above(row, padded, low), above_high{0, 0};
    const double target = top_p >= 1 ? __builtin_inf() : top_p * above_low.total;
    // The mean is a good first guess; from there on down by factors of 16, until the cut is passed.
    int32_t middle = bits_of(static_cast<float>(above_low.total / above_low.count));
    while (high - low > 1 && above_low.count - above_high.count > kFewCandidates) {
        if (middle <= low || middle >= high) middle = low + (high - low) / 2;
        const Mass mass = mass_above(row, padded, middle);
        if (mass.total < target) high = middle, above_high = mass;
        else low = middle, above_low = mass;
        middle = low < 0 ? high - (4 << 23) : low + (high - low) / 2;
    }
    int count = 0;
    for (int j = 0; j < padded; j += kWidth) {
        const Ints x = load_raw<Ints>(row + j);
        bits[j / 32] |= mask_bits(x > high) << (j % 32);
        for (uint32_t left = mask_bits((x > low) & (x <= high)); left; left &= left - 1)
            candidates[count++] = j + __builtin_ctz(left);
    }
    if (high - low > 1)  // else they are equal, and in order as they are
        for (int i = 1; i < count; ++i) {
            const int j = candidates[i];
            int rank = i;
            for (; rank > 0 && row[candidates[rank - 1]] < row[j]; --rank)
                candidates[rank] = candidates[rank - 1];
            candidates[rank] = j;
        }
    double before = above_high.total;
    for (int i = 0; i < count && (before < target || (i == 0 && above_high.count == 0)); ++i) {
        bits[candidates[i] / 32] |= 1u << (candidates[i] % 32);
        before += row[candidates[i]];
    }
}

// Set the bits of the window around grid block `block`, clipped at the borders.
void set_window(const Blocks& blocks, const Window& window, int block, uint32_t* bits) {
    const auto clip = [](int x, int extent) { return x < 0 ? 0 : x < extent ? x : extent; };
    const int w = block % blocks.nw, h = block / blocks.nw % blocks.nh,
              t = block / blocks.nw / blocks.nh;
    const int t_end = clip(t + window.frames / 2 + 1, blocks.nt);
    const int h_end = clip(h + window.height / 2 + 1, blocks.nh);
    for (int i = clip(t - window.frames / 2, blocks.nt); i < t_end; ++i)
        for (int j = clip(h - window.height / 2, blocks.nh); j < h_end; ++j) {
            const int line = (i * blocks.nh + j) * blocks.nw;
            set_run(bits, line + clip(w - window.width / 2, blocks.nw),
                    line + clip(w + window.width / 2 + 1, blocks.nw));
        }
}

}  // namespace

void block_mask(const BlockMaskParams& p) {
    const ScoresParams& s = p.scores;
    const int count = s.blocks.count, words = (count + 31) / 32, padded = words * 32;
    const Scratch<MaskArrays> scratch(s.threads, padded);
    for_each_row_group(s, [&](int64_t b, int64_t h, int first, int n, int slot) {
        const MaskArrays a = scratch.slot(slot, padded);
        if (s.q_mean) score_rows(s, b, h, first, n, a.rows);
        for (int i = 0; i < n; ++i) {
            const int64_t index = (b * s.heads + h) * s.q_blocks + first + i;
            float* row = a.rows + i * padded;
            uint32_t* bits = p.bits + index * words;
            std::memset(bits, 0, words * sizeof *bits);
            if (!s.q_mean) std::memcpy(row, s.scores + index * count, count * sizeof *row);
            for (int j = s.blocks.grid_count; j < padded; ++j) row[j] = kInfinity;
            const int block = s.q_block_offset + first + i;
            if (block >= s.blocks.grid_count) {
                set_run(bits, 0, count);
                continue;
            }
            select_row(row, padded, p.top_p[h], bits, a.candidates);
            if (p.window.frames) set_window(s.blocks, p.window, block, bits);
            if (count % 32) bits[words - 1] &= ~0u >> (32 - count % 32);
        }
    });
}

}  // namespace nabla::cpu::NABLA_ISA
