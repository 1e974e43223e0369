// bits[i, j] = 1 iff the scores ranked before j in row i hold less than top_p of the row, or the
// window or an always-kept block says so. Ranks are by descending score, then by index.
//
// No row is sorted. Scores are not negative, so their bit patterns are integers of the same order:
// a warp bisects for the pattern at the cut, until the few candidates that are left can be ranked
// against each other. Masses are integers, 2^-30 of the row's or less, so that sums of them are exact
// in any order and equal scores have equal masses.
#include "cuda/kernels.h"
#include "cuda/scores.cuh"

namespace nabla::cuda {
namespace {

constexpr uint32_t kFewCandidates = 32;  // a lane each

// The kept scores: those with a greater pattern than `pattern`, and of the equal ones those up to
// `column`.
struct Cut {
    int32_t pattern, column;
};
constexpr Cut kKeepNone = {0x7fffffff, -1}, kKeepAll = {-1, -1};

// One row of scores in shared memory, and a warp that searches it.
struct Row {
    uint32_t smem;
    int32_t selectable;  // columns
    float unit;          // factor from a score to its mass

    NABLA_DEVICE float score(int32_t column) const {
        return ptx::load_shared<float>(smem + column * 4);
    }
    NABLA_DEVICE uint32_t mass(float score) const {
        return static_cast<uint32_t>(score * unit + 0.5f);
    }
};

// Number and mass of the scores with a greater pattern than some threshold.
struct Above {
    uint32_t count, mass;
};

NABLA_DEVICE Above above(const Row& row, int32_t pattern) {
    Above sum{0, 0};
    for (int j = ptx::lane_index(); j < row.selectable; j += 32) {
        const float score = row.score(j);
        if (ptx::bit_cast<int32_t>(score) > pattern) {
            sum.count += 1;
            sum.mass += row.mass(score);
        }
    }
    return {ptx::reduce_add(sum.count), ptx::reduce_add(sum.mass)};
}

// The column of the n-th score (from 1) of a pattern.
NABLA_DEVICE int32_t column_of(const Row& row, int32_t pattern, uint32_t n) {
    for (int first = 0; first < row.selectable; first += 32) {
        const int j = first + ptx::lane_index();
        uint32_t equal = ptx::ballot(j < row.selectable &&
                                     ptx::bit_cast<int32_t>(row.score(j)) == pattern);
        const uint32_t count = ptx::popcount(equal);
        if (n <= count) {
            for (; n > 1; --n) equal &= equal - 1;
            return first + ptx::trailing_zeros(equal);
        }
        n -= count;
    }
    return row.selectable;
}

// The cut among the few scores whose patterns are above `low` and up to `high`. `before` is the mass
// above `high`.
NABLA_DEVICE Cut cut_of_few(const Row& row, int32_t low, int32_t high, uint32_t count,
                            uint32_t before, uint32_t wanted, uint32_t candidates) {
    const uint32_t lane = ptx::lane_index();
    uint32_t found = 0;
    for (int first = 0; found < count; first += 32) {
        const int j = first + lane;
        const int32_t pattern =
            j < row.selectable ? ptx::bit_cast<int32_t>(row.score(j)) : kKeepAll.pattern;
        const bool is_candidate = pattern > low && pattern <= high;
        const uint32_t all = ptx::ballot(is_candidate);
        const uint32_t place = found + ptx::popcount(all & ((1u << lane) - 1));
        if (is_candidate) ptx::store_shared(candidates + place * 4, j);
        found += ptx::popcount(all);
    }
    ptx::sync_warp();  // the candidates are there, in order of their columns

    const bool is_candidate = lane < count;
    const int32_t column = is_candidate ? ptx::load_shared<int32_t>(candidates + lane * 4) : 0;
    const float score = is_candidate ? row.score(column) : 0.0f;
    const int32_t pattern = ptx::bit_cast<int32_t>(score);
    const uint32_t mass = row.mass(score);
    for (uint32_t other = 0; other < count; ++other) {
        const int32_t its_pattern = ptx::shuffle(pattern, other);
        const uint32_t its_mass = ptx::shuffle(mass, other);
        if (its_pattern > pattern || (its_pattern == pattern && other < lane)) before += its_mass;
    }
    const bool is_kept = is_candidate && before < wanted;
    const uint32_t lowest = ptx::reduce_min(is_kept ? pattern : kKeepNone.pattern);
    const bool is_last = is_kept && pattern == static_cast<int32_t>(lowest);
    return {static_cast<int32_t>(lowest), static_cast<int32_t>(ptx::reduce_max(is_last ? column : 0))};
}

// Where the fewest scores that hold top_p of the row end.
NABLA_DEVICE Cut find_cut(uint32_t smem, int32_t selectable, float top_p, uint32_t candidates) {
    // A part of the sum, so that it does not overflow; it need not be exact.
    constexpr int kPart = 13;
    float sum = 0.0f, top = kAlwaysKept;
    Row row{smem, selectable, 0.0f};
    for (int j = ptx::lane_index(); j < selectable; j += 32) {
        const float score = row.score(j);
        if (score > 0.0f) sum += score * (1.0f / (1 << kPart));
        if (score > top) top = score;
    }
    sum = warp_sum(sum), top = warp_max(top);
    if (top < 0.0f) return kKeepNone;
    if (top_p >= 1.0f) return kKeepAll;
    // The power of 2 that brings the sum to between 2^30 and 2^31.
    const int exponent = 127 + 30 - kPart + 127 - (ptx::bit_cast<int32_t>(sum) >> 23);
    row.unit = ptx::bit_cast<float>((exponent < 254 ? exponent : 254) << 23);

    int32_t low = kKeepAll.pattern, high = ptx::bit_cast<int32_t>(top);
    Above above_low = above(row, low), above_high{0, 0};
    if (above_low.mass == 0) return {high, column_of(row, high, 1)};
    const double share = static_cast<double>(top_p > 0.0f ? top_p : 0.0f) * above_low.mass;
    uint32_t wanted = static_cast<uint32_t>(share);
    if (wanted < share) ++wanted;
    if (wanted == 0) wanted = 1;  // one is always kept
    // The mean is a good first guess; from there on down by factors of 16, until the cut is passed.
    int32_t middle = ptx::bit_cast<int32_t>(sum * (1 << kPart) / above_low.count);
    while (high - low > 1 && above_low.count - above_high.count > kFewCandidates) {
        if (middle <= low || middle >= high) middle = low + (high - low) / 2;
        const Above at = above(row, middle);
        if (at.mass < wanted) high = middle, above_high = at;
        else low = middle, above_low = at;
        middle = low < 0 ? high - (4 << 23) : low + (high - low) / 2;
    }
    const uint32_t count = above_low.count - above_high.count;
    if (count <= kFewCandidates)
        return cut_of_few(row, low, high, count, above_high.mass, wanted, candidates);
    const uint32_t each = row.mass(ptx::bit_cast<float>(high));  // all candidates are equal
    const uint32_t needed = each ? (wanted - above_high.mass + each - 1) / each : 1;
    return {high, column_of(row, high, needed)};
}

// Set bits begin .. end - 1 of a row.
NABLA_DEVICE void set_run(uint32_t words, int32_t begin, int32_t end) {
    for (int word = begin / 32; word * 32 < end; ++word) {
        const int low = begin > word * 32 ? begin - word * 32 : 0;
        const int high = end < word * 32 + 32 ? end - word * 32 : 32;
        ptx::atomic_or_shared(words + word * 4, (~0u >> (32 - (high - low))) << low);
    }
}

// Set the bits of the window around grid block `block`, clipped at the borders; a lane a line.
NABLA_DEVICE void set_window(const Blocks& blocks, const Window& window, int32_t block,
                             uint32_t words) {
    const auto clip = [](int x, int extent) { return x < 0 ? 0 : x < extent ? x : extent; };
    const int w = block % blocks.nw, h = block / blocks.nw % blocks.nh,
              t = block / blocks.nw / blocks.nh;
    const int t_begin = clip(t - window.frames / 2, blocks.nt);
    const int t_end = clip(t + window.frames / 2 + 1, blocks.nt);
    const int h_begin = clip(h - window.height / 2, blocks.nh);
    const int h_lines = clip(h + window.height / 2 + 1, blocks.nh) - h_begin;
    for (int i = ptx::lane_index(); i < (t_end - t_begin) * h_lines; i += 32) {
        const int line = ((t_begin + i / h_lines) * blocks.nh + h_begin + i % h_lines) * blocks.nw;
        set_run(words, line + clip(w - window.width / 2, blocks.nw),
                line + clip(w + window.width / 2 + 1, blocks.nw));
    }
}

// The bits of one row of scores, by a warp.
NABLA_DEVICE void mask_row(const BlockMaskParams& p, const RowGroup& at, int r,
                           const RowMemory& memory) {
    const ScoresParams& s = p.scores;
    const int pitch = row_pitch(s.blocks.count), num_words = pitch / 32, lane = ptx::lane_index();
    const uint32_t smem = memory.scores + r * pitch * 4, words = memory.words + r * num_words * 4;
    const int32_t columns = selectable(s, at.row + r);
    const float top_p = ptx::load_global_nc(p.top_p + at.h);
    const Cut cut = find_cut(smem, columns, top_p, memory.candidates + r * 128);
    for (int first = 0; first < num_words; first += 32) {
        uint32_t own = 0;
        for (int i = 0; i < 32 && first + i < num_words; ++i) {
            const int j = (first + i) * 32 + lane;
            const int32_t pattern = ptx::bit_cast<int32_t>(ptx::load_shared<float>(smem + j * 4));
            const bool is_selected =
                pattern < 0 || pattern > cut.pattern || (pattern == cut.pattern && j <= cut.column);
            const uint32_t word = ptx::ballot(j < s.blocks.count && is_selected);
            if (lane == i) own = word;
        }
        if (first + lane < num_words) ptx::store_shared(words + (first + lane) * 4, own);
    }
    const int32_t block = s.q_block_offset + at.row + r;
    ptx::sync_warp();  // the words are there
    if (p.window.frames && block < s.blocks.grid_count)
        set_window(s.blocks, p.window, block, words);
    ptx::sync_warp();  // so is the window
    uint32_t* bits = p.bits + at.line(s, r) * num_words;
    for (int i = lane; i < num_words; i += 32)
        ptx::store_global(bits + i, ptx::load_shared<uint32_t>(words + i * 4));
}

// A row of given scores, as softmax_row leaves it.
NABLA_DEVICE void load_row(const ScoresParams& p, int64_t line, uint32_t smem, int32_t selectable) {
    for (int j = ptx::lane_index(); j < p.blocks.count; j += 32) {
        const float x = ptx::load_global_nc(p.scores + line * p.blocks.count + j);
        const float score = j < selectable && is_finite(x) ? (x > 0.0f ? x : 0.0f) : kAlwaysKept;
        ptx::store_shared(smem + j * 4, score);
    }
}

template <class Config, bool kFromMeans>
NABLA_KERNEL(32 * Config::kWarps, Config::kCtas)
block_mask_kernel(const NABLA_GRID_CONSTANT BlockMaskParams p) {
    const ScoresParams& s = p.scores;
    const auto at = RowGroup::of_cta(s, Config{});
    const int pitch = row_pitch(s.blocks.count);
    const RowMemory memory(ptx::shared_base(), Config::kRows, pitch, s.head_dim);
    if constexpr (kFromMeans) compute_logits<Config>(s, at, memory);
    for (int r = ptx::warp_index(); r < Config::kRows; r += Config::kWarps) {
        if (at.row + r >= s.q_blocks) break;
        const uint32_t smem = memory.scores + r * pitch * 4;
        const int32_t columns = selectable(s, at.row + r);
        if constexpr (kFromMeans) softmax_row(smem, s.blocks.count, columns);
        else load_row(s, at.line(s, r), smem, columns);
        mask_row(p, at, r, memory);
    }
}

constexpr int kTransposeWarps = 8;

// A warp turns 32 words, of as many rows, into the words of 32 columns.
NABLA_KERNEL(32 * kTransposeWarps, 1)
transpose_kernel(const NABLA_GRID_CONSTANT TransposeParams p) {
    const uint32_t words = (p.blocks.count + 31) / 32, column_words = (p.q_blocks + 31) / 32;
    const uint32_t task = ptx::cta_index() * kTransposeWarps + ptx::warp_index();
    const uint32_t word = task % words, column_word = task / words % column_words;
    const uint32_t head = task / words / column_words, lane = ptx::lane_index();
    if (head >= static_cast<uint32_t>(p.batch * p.heads)) return;
    const uint32_t row = column_word * 32 + lane, column = word * 32 + lane;
    const uint32_t* bits =
        p.bits + head / p.heads * p.bits_stride_b + head % p.heads * p.bits_stride_h;
    const uint32_t mine = row < static_cast<uint32_t>(p.q_blocks)
                              ? ptx::load_global_nc(bits + static_cast<int64_t>(row) * words + word)
                              : 0;
    uint32_t transposed = 0;
    NABLA_UNROLL
    for (uint32_t i = 0; i < 32; ++i) {
        const uint32_t rows = ptx::ballot(mine >> i & 1);
        if (lane == i) transposed = rows;
    }
    if (column < static_cast<uint32_t>(p.blocks.count))
        ptx::store_global(p.columns + (static_cast<int64_t>(head) * p.blocks.count + column) *
                                          column_words + column_word,
                          transposed);
}

}  // namespace

void transpose(const TransposeParams& p) {
    const uint32_t words = ceil_div(p.blocks.count, 32);
    const uint32_t warps = p.batch * p.heads * words * ceil_div(p.q_blocks, 32);
    ptx::launch(transpose_kernel,
                {"transpose", ceil_div<uint32_t>(warps, kTransposeWarps),
                 32 * kTransposeWarps, 0, p.stream},
                p);
}

void block_mask(const BlockMaskParams& p) {
    with_row_config("block_mask", p.scores, [&](auto config, const ptx::LaunchShape& shape) {
        using Config = decltype(config);
        if (p.scores.q_mean) ptx::launch(block_mask_kernel<Config, true>, shape, p);
        else ptx::launch(block_mask_kernel<Config, false>, shape, p);
    });
}

}  // namespace nabla::cuda
