// The running softmax of a warp's 16 query rows, over blocks of 64 scores that lie in accumulators.
//
// A score weighs exp2(scale_log2 (score - reference)), and sums of weights are exact for any
// reference of a row. It need not be the largest score: it follows one that would weigh more than 1
// and more than an eighth of the sum so far. So what dominates a row weighs 1, which bf16 holds
// exactly, and most blocks move no reference, which takes shuffles and rescales what has been
// summed. Where references are large the difference comes before the scale: beside a product that
// was rounded, a fused one would leave the rounding in the weights.
#pragma once

#include <cfloat>
#include <cmath>

#include "cuda/accumulators.cuh"
#include "cuda/ptx.cuh"

namespace nabla {

constexpr float kLog2E = 1.44269504f;

// kKeepsBounds: whether there are registers for bounds of the scores, which save instructions.
template <bool kKeepsBounds>
class Softmax {
  public:
    // Of the scale without its sign. One of 0 still makes -inf of a score of -inf.
    NABLA_DEVICE explicit Softmax(float scale)
        : scale_log2_(fmaxf(fabsf(scale) * kLog2E, FLT_MIN)) {}

    // Scores from column `size` on weigh nothing.
    NABLA_DEVICE static void mask_from(int size, float (&scores)[kScores]) {
        NABLA_UNROLL
        for (int i = 0; i < kScores; ++i)
            if (8 * (i / 4) + thread_column() + i % 2 >= size) scores[i] = -INFINITY;
    }

    // Moves the references of the warp's rows if they have to; then what has been summed is to be
    // multiplied by the factors of its rows.
    NABLA_DEVICE bool move_references(const float (&scores)[kScores], float (&factors)[2]) {
        float largest[2];
        find_largest(scores, largest);
        const float(&low)[2] = kKeepsBounds ? bounds_ : reference_;
        if (!ptx::any(largest[0] > low[0] || largest[1] > low[1])) return false;
        const float bounds[2] = {reference_[0] + slack(0), reference_[1] + slack(1)};
        if (kKeepsBounds) bounds_[0] = bounds[0], bounds_[1] = bounds[1];
        if (!ptx::any(largest[0] > bounds[0] || largest[1] > bounds[1])) return false;
        is_large_ = false;
        NABLA_UNROLL
        for (int r = 0; r < 2; ++r) {
            float reference = fmaxf(reference_[r], largest[r]);
            NABLA_UNROLL
            for (int mask = 1; mask < 4; mask *= 2)
                reference = fmaxf(reference, ptx::shuffle_xor(reference, mask));
            factors[r] = weight(reference_[r], reference);
            reference_[r] = reference;
            if (kKeepsBounds) bounds_[r] = reference;
            sum_[r] *= factors[r];
            is_large_ |= !(fabsf(reference * scale_log2_) < kLarge);
        }
        is_large_ = ptx::any(is_large_);
        return true;
    }

    // Scores become weights.
    NABLA_DEVICE void exponentiate(float (&scores)[kScores]) {
        if (!kKeepsBounds || is_large_) {
            NABLA_UNROLL
            for (int i = 0; i < kScores; ++i)
                scores[i] = weight(scores[i], reference_[row_of(i)]);
        } else {
            const float scaled[2] = {reference_[0] * scale_log2_, reference_[1] * scale_log2_};
            NABLA_UNROLL
            for (int i = 0; i < kScores; ++i)
                scores[i] = ptx::exp2(fmaf(scores[i], scale_log2_, -scaled[row_of(i)]));
        }
        NABLA_UNROLL
        for (int i = 0; i < kScores; ++i) sum_[row_of(i)] += scores[i];
    }

    // From sums over the columns of a thread to sums of rows.
    NABLA_DEVICE void gather_sums() {
        NABLA_UNROLL
        for (int mask = 1; mask < 4; mask *= 2) {
            NABLA_UNROLL
            for (int r = 0; r < 2; ++r) sum_[r] += ptx::shuffle_xor(sum_[r], mask);
        }
    }
    NABLA_DEVICE float sum(int r) const { return sum_[r]; }

    // log(sum(exp(scale score))) of a row; -inf without scores.
    NABLA_DEVICE float lse(int r) const {
        constexpr float kLn2 = 0.693147181f;
        return (reference_[r] * scale_log2_ + ptx::log2(sum_[r])) * kLn2;
    }

  private:
    // NaN is passed over, and reaches the sum as the weight of NaN.
    NABLA_DEVICE void find_largest(const float (&scores)[kScores], float (&largest)[2]) const {
        float parts[8];  // of a few scores each, so that one maximum need not wait for another
        NABLA_UNROLL
        for (int i = 0; i < kScores; ++i)
            parts[i % 8] = i < 8 ? scores[i] : fmaxf(parts[i % 8], scores[i]);
        NABLA_UNROLL
        for (int r = 0; r < 2; ++r)
            largest[r] = fmaxf(fmaxf(parts[2 * r], parts[2 * r + 1]),
                               fmaxf(parts[2 * r + 4], parts[2 * r + 5]));
    }

    NABLA_DEVICE float weight(float score, float reference) const {
        return ptx::exp2((score - reference) * scale_log2_);
    }

    // By how much a score may exceed the reference of its row: 2^8 is a weight that fp16 holds.
    NABLA_DEVICE float slack(int r) const {
        return fminf(fmaxf(ptx::log2(sum_[r]) - 3, 0.0f), 8.0f) / scale_log2_;
    }

    // References from which on a rounding of 2^-24 of them shows in weights of fp16.
    static constexpr float kLarge = 1024.0f;

    float scale_log2_;
    float reference_[2] = {-FLT_MAX, -FLT_MAX};
    float bounds_[2] = {-FLT_MAX, -FLT_MAX};  // up to here scores move no reference
    bool is_large_ = true;                    // a reference of the warp
    float sum_[2] = {0.0f, 0.0f};
};

}  // namespace nabla
