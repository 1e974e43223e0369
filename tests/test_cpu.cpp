// The native CPU kernels against loops over tokens, without Python and torch: `make aarch64` runs
// this on a processor that is emulated.
//
// Truth are the loops in double precision. The errors of attention may be twice, those of gradients
// three times as large as those of the same loops in float, which round as dense attention does in
// the dtype of the tensors; and a few roundings more. Everything lies between NaN.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "cpu/dispatch.h"

namespace {

using namespace nabla;

constexpr int kBatch = 2, kThreads = 3;
constexpr double kTopP = 0.7;
constexpr Window kWindow{1, 3, 1};
const double kNaN = std::nan(""), kInfinity = HUGE_VAL;

struct Case {
    const char* name;
    Grid grid;
    int heads, kv_heads, head_dim;
    int first_block;  // of the queries
};

const Case kCases[] = {
    {"64-token blocks", {2, 16, 8, 1, 8, 8, 0}, 2, 2, 64, 0},
    {"short blocks and extra tokens", {1, 11, 13, 1, 8, 8, 70}, 4, 2, 80, 0},
    {"16-token blocks", {2, 5, 13, 1, 4, 4, 3}, 3, 1, 48, 0},
    {"32-token blocks, a slice", {3, 8, 7, 2, 4, 4, 0}, 2, 1, 32, 3},
    {"128-token blocks", {3, 13, 4, 2, 8, 8, 129}, 1, 1, 128, 0},
    {"blocks of one token, a slice", {1, 9, 17, 1, 8, 8, 1}, 2, 2, 96, 2},
    {"112 channels", {1, 7, 19, 1, 4, 8, 0}, 1, 1, 112, 0},
    {"256 channels", {1, 8, 17, 1, 8, 8, 0}, 2, 1, 256, 0},
};

int failures = 0;

void fail(const std::string& where, const std::string& what) {
    std::printf("FAILED %s: %s\n", where.c_str(), what.c_str());
    ++failures;
}

// Values in the formats of tensors.

const char* name_of(DType dtype) {
    return dtype == DType::kFloat32    ? "float32"
           : dtype == DType::kBFloat16 ? "bfloat16"
                                       : "float16";
}

int bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

double decode(DType dtype, const void* from) {
    uint32_t bits = 0;
    std::memcpy(&bits, from, bytes_of(dtype));
    if (dtype != DType::kFloat16) {
        float x;
        bits <<= dtype == DType::kBFloat16 ? 16 : 0;
        std::memcpy(&x, &bits, sizeof x);
        return x;
    }
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023, sign = bits >> 15 ? -1 : 1;
    if (exponent == 31) return mantissa ? kNaN : sign * kInfinity;
    return sign * std::ldexp(exponent ? 1024 + mantissa : mantissa, std::max(exponent, 1) - 25);
}

// The nearest value of the format, of two the even one; x is far from the largest.
template <class Real>
Real rounded(DType dtype, Real x) {
    if (x == 0 || !std::isfinite(x)) return x;
    int exponent;
    std::frexp(x, &exponent);
    const int digits = dtype == DType::kFloat32 ? 24 : dtype == DType::kBFloat16 ? 8 : 11;
    const int lowest = dtype == DType::kFloat16 ? -24 : -149;
    const Real unit = std::ldexp(Real(1), std::max(exponent - digits, lowest));
    return std::nearbyint(x / unit) * unit;
}

void encode(DType dtype, double value, void* to) {
    const float x = static_cast<float>(rounded(dtype, value));
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (dtype == DType::kBFloat16) bits >>= 16;
    if (dtype == DType::kFloat16) {
        const uint32_t sign = bits >> 16 & 0x8000;
        const uint32_t rest = std::isnan(x)             ? 0x7e00
                              : std::fabs(x) < 0x1p-14f ? std::fabs(x) * 0x1p24f
                                                        : (bits >> 13 & 0x3ffff) - (112 << 10);
        bits = sign | rest;
    }
    std::memcpy(to, &bits, bytes_of(dtype));
}

// A tensor [B, H, S, D] with NaN before, after and between its rows, whose stride is odd.
class Tensor {
  public:
    Tensor(DType dtype, int heads, int64_t rows, int dim)
        : dtype_(dtype), heads_(heads), rows_(rows), dim_(dim), stride_(dim + 3) {
        memory_.resize((kBatch * heads * (rows + 2) + 2) * stride_ * bytes_of(dtype));
        for (size_t i = 0; i < memory_.size(); i += bytes_of(dtype))
            encode(dtype, kNaN, &memory_[i]);
    }

    template <class Value>  // (b, h, s, d)
    void fill(Value value) {
        each([&](int b, int h, int64_t s, int d, char* at) {
            encode(dtype_, value(b, h, s, d), at);
        });
    }
    View view() {
        return {&memory_[2 * stride_ * bytes_of(dtype_)], heads_ * (rows_ + 2) * stride_,
                (rows_ + 2) * stride_, stride_};
    }
    template <class Real>
    std::vector<Real> values() {
        std::vector<Real> found;
        each([&](int, int, int64_t, int, char* at) { found.push_back(decode(dtype_, at)); });
        return found;
    }
    // Nothing beside the tensor has been written.
    bool is_alone() const {
        Tensor copy(*this);
        copy.fill([](auto...) { return kNaN; });
        return copy.memory_ == Tensor(dtype_, heads_, rows_, dim_).memory_;
    }
    const std::vector<char>& memory() const { return memory_; }

  private:
    template <class Visit>
    void each(Visit visit) {
        const View v = view();
        for (int b = 0; b < kBatch; ++b)
            for (int h = 0; h < heads_; ++h)
                for (int64_t s = 0; s < rows_; ++s)
                    for (int d = 0; d < dim_; ++d)
                        visit(b, h, s, d,
                              static_cast<char*>(v.data) +
                                  (b * v.stride_b + h * v.stride_h + s * v.stride_s + d) *
                                      bytes_of(dtype_));
    }

    DType dtype_;
    int heads_;
    int64_t rows_;
    int dim_;
    int64_t stride_;
    std::vector<char> memory_;
};

// One case in one dtype.
struct Problem {
    Case of;
    DType dtype;
    std::string name;
    std::vector<int32_t> starts{0};
    Blocks blocks{};
    int q_blocks;
    int64_t q_first, q_rows, rows;  // tokens: first and number of the queries, number of the keys
    float scale;
    Tensor q, k, v, dout;
    std::vector<float> dlse;     // [B, Hq, Sq]
    std::vector<uint32_t> bits;  // [B, Hq, Nq, W]; some rows keep nothing

    Problem(const Case& c, DType type)
        : of(c),
          dtype(type),
          name(std::string(c.name) + ", " + name_of(type)),
          q_blocks(cut(c.grid) - c.first_block),
          q_first(starts[c.first_block]),
          q_rows(starts.back() - q_first),
          rows(starts.back()),
          scale(1 / std::sqrt(c.head_dim)),
          q(type, c.heads, q_rows, c.head_dim),
          k(type, c.kv_heads, rows, c.head_dim),
          v(type, c.kv_heads, rows, c.head_dim),
          dout(type, c.heads, q_rows, c.head_dim) {
        std::mt19937 random(c.head_dim);
        std::normal_distribution<double> normal;
        const auto noise = [&](auto...) { return normal(random); };
        // The tokens of a block resemble each other, so that the scores of blocks differ.
        std::vector<double> common(blocks.count * c.head_dim);
        for (double& x : common) x = normal(random);
        const auto smooth = [&](int64_t first) {
            return [&, first](int, int, int64_t s, int d) {
                return common[block_of(first + s) * c.head_dim + d] + normal(random);
            };
        };
        q.fill(smooth(q_first));
        k.fill(smooth(0));
        v.fill(noise);
        dout.fill(noise);
        const int words = (blocks.count + 31) / 32;
        for (int64_t row = 0; row < int64_t{kBatch} * c.heads * q_blocks; ++row) {
            const bool is_empty = row % 5 == 1;
            const int first = row % q_blocks + c.first_block;
            for (int64_t s = starts[first]; s < starts[first + 1]; ++s)
                dlse.push_back(is_empty ? 0 : normal(random));
            for (int w = 0; w < words; ++w) {
                // Past the last block the bits are anything.
                const uint32_t unread =
                    w + 1 < words || blocks.count % 32 == 0 ? 0 : ~0u << blocks.count % 32;
                bits.push_back(is_empty ? unread : random() | unread | (w == 0));
            }
        }
    }

    int block_of(int64_t token) const {
        return std::upper_bound(starts.begin(), starts.end(), token) - starts.begin() - 1;
    }
    bool keeps(int b, int h, int row, int block) const {
        const int words = (blocks.count + 31) / 32;
        const int64_t i = (int64_t{b} * of.heads + h) * q_blocks + row;
        return bits[i * words + block / 32] >> block % 32 & 1;
    }
    Blocks launched() const {
        Blocks with_starts = blocks;
        with_starts.starts = starts.data();
        return with_starts;
    }

  private:
    // Fill `starts` and `blocks`; the number of blocks.
    int cut(const Grid& g) {
        const auto add = [&](int tokens) { starts.push_back(starts.back() + tokens); };
        for (int t = 0; t < g.frames; t += g.block_frames)
            for (int h = 0; h < g.height; h += g.block_height)
                for (int w = 0; w < g.width; w += g.block_width)
                    add(std::min(g.block_frames, g.frames - t) *
                        std::min(g.block_height, g.height - h) *
                        std::min(g.block_width, g.width - w));
        const auto pieces = [](int n, int size) { return (n + size - 1) / size; };
        blocks.grid = g;
        blocks.nt = pieces(g.frames, g.block_frames);
        blocks.nh = pieces(g.height, g.block_height);
        blocks.nw = pieces(g.width, g.block_width);
        blocks.grid_count = static_cast<int>(starts.size()) - 1;
        const int size = g.block_frames * g.block_height * g.block_width;
        for (int x = 0; x < g.extra; x += size) add(std::min(size, g.extra - x));
        return blocks.count = static_cast<int>(starts.size()) - 1;
    }
};

// Attention.

template <class Real>
struct Answers {
    std::vector<Real> out, lse, dq, dk, dv;
};

// By loops over the kept tokens. In float, what dense attention rounds to the dtype is rounded.
template <class Real>
Answers<Real> attend(Problem& p) {
    const auto in_dtype = [&](Real x) {
        return std::is_same_v<Real, double> || p.dtype == DType::kFloat32 ? x : rounded(p.dtype, x);
    };
    const int dim = p.of.head_dim, group = p.of.heads / p.of.kv_heads;
    const auto q = p.q.values<Real>(), k = p.k.values<Real>(), v = p.v.values<Real>(),
               dout = p.dout.values<Real>();
    const auto dot = [&](const Real* x, const Real* y) {
        Real sum = 0;
        for (int d = 0; d < dim; ++d) sum += x[d] * y[d];
        return sum;
    };
    const auto add = [&](Real factor, const Real* x, Real* y) {
        for (int d = 0; d < dim; ++d) y[d] += factor * x[d];
    };
    Answers<Real> a;
    a.out.resize(q.size()), a.dq.resize(q.size()), a.dk.resize(k.size()), a.dv.resize(k.size());
    a.lse.resize(q.size() / dim);
    std::vector<int64_t> keys;
    std::vector<Real> scores;
    for (int64_t i = 0; i < static_cast<int64_t>(a.lse.size()); ++i) {
        const int64_t b = i / p.q_rows / p.of.heads, h = i / p.q_rows % p.of.heads;
        const int64_t kv_head = (b * p.of.kv_heads + h / group) * p.rows;
        const int row = p.block_of(p.q_first + i % p.q_rows) - p.of.first_block;
        keys.clear(), scores.clear();
        for (int block = 0; block < p.blocks.count; ++block)
            for (int64_t s = p.starts[block]; s < p.starts[block + 1]; ++s)
                if (p.keeps(b, h, row, block)) keys.push_back((kv_head + s) * dim);
        Real top = -kInfinity, total = 0;
        for (const int64_t key : keys) {
            scores.push_back(dot(&q[i * dim], &k[key]) * Real(p.scale));
            top = std::max(top, scores.back());
        }
        Real* out = &a.out[i * dim];
        for (size_t j = 0; j < keys.size(); ++j) {
            const Real probability = std::exp(scores[j] - top);
            total += probability;
            add(in_dtype(probability), &v[keys[j]], out);
        }
        a.lse[i] = top + std::log(total);
        for (int d = 0; d < dim; ++d) out[d] = keys.empty() ? 0 : in_dtype(out[d] / total);
        const Real delta = dot(&dout[i * dim], out) - Real(p.dlse[i]);
        for (size_t j = 0; j < keys.size(); ++j) {
            const Real probability = std::exp(scores[j] - a.lse[i]);
            const Real ds =
                in_dtype(probability * (dot(&dout[i * dim], &v[keys[j]]) - delta) * Real(p.scale));
            add(ds, &k[keys[j]], &a.dq[i * dim]);
            add(ds, &q[i * dim], &a.dk[keys[j]]);
            add(in_dtype(probability), &dout[i * dim], &a.dv[keys[j]]);
        }
    }
    for (auto* gradient : {&a.dq, &a.dk, &a.dv})
        for (Real& x : *gradient) x = in_dtype(x);
    return a;
}

struct Size {
    double most = 0, mean = 0;
};

// The largest and the mean distance of x from y, where y is finite and not 0.
template <class X, class Y>
Size distance(const std::vector<X>& x, const std::vector<Y>& y) {
    Size size;
    int64_t count = 0;
    for (size_t i = 0; i < y.size(); ++i) {
        if (y[i] == 0 || !std::isfinite(y[i])) continue;
        const double error = std::fabs(x[i] - y[i]);
        size.most = std::isnan(error) ? kInfinity : std::max(size.most, error);
        size.mean += error;
        ++count;
    }
    size.mean = count ? size.mean / count : 0;
    return size;
}

Size size_of(const std::vector<double>& x) { return distance(std::vector<double>(x.size()), x); }

// Returns the share of what is allowed.
double compare(const std::string& where, const std::vector<double>& actual,
               const std::vector<float>& low, const std::vector<double>& exact, double factor,
               const std::vector<double>& values) {
    for (size_t i = 0; i < exact.size(); ++i)
        if ((exact[i] == 0 || !std::isfinite(exact[i])) && actual[i] != exact[i]) {
            fail(where, "a row of nothing is " + std::to_string(actual[i]));
            return kInfinity;
        }
    const Size ours = distance(actual, exact), theirs = distance(low, exact),
               size = size_of(values);
    const double floor = 4 * 0x1p-23, most = ours.most / (factor * theirs.most + floor * size.most),
                 mean = ours.mean / (factor * theirs.mean + floor * size.mean);
    const double share = std::max(most, mean);
    if (!(share <= 1)) fail(where, std::to_string(share) + " times the error that is allowed");
    return share;
}

// Returns the largest share of what is allowed.
double check_attention(const cpu::Kernels& kernels, Problem& p, const Answers<float>& low,
                       const Answers<double>& exact) {
    const Case& c = p.of;
    const std::string where = std::string(kernels.name) + ", " + p.name;
    Tensor out(p.dtype, c.heads, p.q_rows, c.head_dim),
        dq = out, dk(p.dtype, c.kv_heads, p.rows, c.head_dim), dv = dk;
    std::vector<float> lse(kBatch * c.heads * p.q_rows, kNaN), delta = lse;
    const int64_t words = (p.blocks.count + 31) / 32 * p.q_blocks;
    AttentionBackwardParams params{};
    params.forward = {p.dtype,    kBatch,     c.heads,       c.kv_heads,
                      c.head_dim, p.q_blocks, c.first_block, p.launched(),
                      p.scale,    p.q.view(), p.k.view(),    p.v.view(),
                      out.view(), lse.data(), p.bits.data(), words * c.heads,
                      words,      1,          nullptr};
    params.dout = p.dout.view();
    params.dlse = p.dlse.data();
    params.delta = delta.data();
    params.dq = dq.view(), params.dk = dk.view(), params.dv = dv.view();
    const auto run = [&](int threads) {
        params.forward.threads = threads;
        kernels.attention_forward(params.forward);
        kernels.attention_backward(params);
        std::vector<char> bytes(reinterpret_cast<char*>(lse.data()),
                                reinterpret_cast<char*>(lse.data() + lse.size()));
        for (const Tensor* x : {&out, &dq, &dk, &dv})
            bytes.insert(bytes.end(), x->memory().begin(), x->memory().end());
        return bytes;
    };
    if (run(1) != run(kThreads)) fail(where, "other bits with other threads");
    for (const Tensor* x : {&out, &dq, &dk, &dv})
        if (!x->is_alone()) fail(where, "something beside the results was written");
    // dq and dk may cancel: the floor is that of the largest gradient.
    const std::vector<const std::vector<double>*> gradients{&exact.dq, &exact.dk, &exact.dv};
    const std::vector<double>& largest = **std::max_element(
        gradients.begin(), gradients.end(),
        [](const auto* x, const auto* y) { return size_of(*x).most < size_of(*y).most; });
    const std::vector<double> wide(lse.begin(), lse.end());
    return std::max(
        {compare(where + ": out", out.values<double>(), low.out, exact.out, 2, exact.out),
         compare(where + ": lse", wide, low.lse, exact.lse, 2, exact.lse),
         compare(where + ": dq", dq.values<double>(), low.dq, exact.dq, 3, largest),
         compare(where + ": dk", dk.values<double>(), low.dk, exact.dk, 3, largest),
         compare(where + ": dv", dv.values<double>(), low.dv, exact.dv, 3, largest)});
}

// Means, scores and masks.

// [B, H, N, D] of the blocks from `first` on.
std::vector<double> means_of(const Problem& p, const std::vector<double>& x, int heads, int first) {
    const int dim = p.of.head_dim;
    const int64_t rows = p.rows - p.starts[first];
    std::vector<double> means;
    for (int64_t head = 0; head < kBatch * heads; ++head)
        for (int n = first; n < p.blocks.count; ++n)
            for (int d = 0; d < dim; ++d) {
                double sum = 0;
                for (int64_t s = p.starts[n]; s < p.starts[n + 1]; ++s)
                    sum += x[(head * rows + s - p.starts[first]) * dim + d];
                means.push_back(sum / (p.starts[n + 1] - p.starts[n]));
            }
    return means;
}

bool is_close(double x, double exact, double relative, double absolute) {
    return std::fabs(x - exact) <= absolute + relative * std::fabs(exact);
}

bool is_in_window(const Blocks& blocks, int i, int j) {
    const auto near = [&](int size, int extent, int stride) {
        return std::abs(i / stride % size - j / stride % size) <= extent / 2;
    };
    return near(blocks.nt, kWindow.frames, blocks.nw * blocks.nh) &&
           near(blocks.nh, kWindow.height, blocks.nw) && near(blocks.nw, kWindow.width, 1);
}

// Whether `kept` are the fewest blocks that hold kTopP of a row of exact scores, or always kept.
bool is_selection(const std::vector<double>& row, const std::vector<bool>& always,
                  const std::vector<bool>& kept) {
    constexpr double kBand = 1e-6, kCloseness = 6e-5;
    std::vector<double> ranked = row;
    std::sort(ranked.rbegin(), ranked.rend());
    const auto lowest_kept = [&](double mass) {
        size_t n = 0;
        for (double sum = 0; n < ranked.size() && (n == 0 || sum < mass); ++n) sum += ranked[n];
        return ranked[n - 1];
    };
    const double certain = lowest_kept(kTopP - kBand) * (1 + kCloseness),
                 possible = lowest_kept(kTopP + kBand) * (1 - kCloseness);
    for (size_t j = 0; j < kept.size(); ++j) {
        const double score = j < row.size() ? row[j] : 0;
        if (!kept[j] && (always[j] || score > certain)) return false;
        if (kept[j] && !always[j] && score < possible) return false;
    }
    return true;
}

void check_masks(const cpu::Kernels& kernels, Problem& p) {
    const Case& c = p.of;
    const std::string where = std::string(kernels.name) + ", " + p.name;
    const int dim = c.head_dim, count = p.blocks.count, words = (count + 31) / 32,
              padded = words * 32, group = c.heads / c.kv_heads;
    const int64_t q_blocks = int64_t{kBatch} * c.heads * p.q_blocks;
    std::vector<float> q_mean(q_blocks * dim, kNaN), k_mean(kBatch * c.kv_heads * dim * padded),
        scores(q_blocks * count, kNaN), top_p(c.heads, kTopP);
    kernels.block_mean({p.dtype, kBatch, c.heads, dim, p.q_blocks, c.first_block, p.launched(),
                        p.q.view(), q_mean.data(), 0, kThreads, nullptr});
    kernels.block_mean({p.dtype, kBatch, c.kv_heads, dim, count, 0, p.launched(), p.k.view(),
                        k_mean.data(), padded, kThreads, nullptr});
    ScoresParams params{kBatch,        c.heads,       c.kv_heads, dim,           p.q_blocks,
                        c.first_block, p.launched(),  p.scale,    q_mean.data(), k_mean.data(),
                        padded,        scores.data(), kThreads,   nullptr};
    kernels.pooled_scores(params);
    std::vector<uint32_t> bits(q_blocks * words, ~0u), of_scores = bits;
    params.scores = nullptr;
    kernels.block_mask({params, kWindow, top_p.data(), bits.data()});
    params.scores = scores.data();
    params.q_mean = nullptr;
    kernels.block_mask({params, kWindow, top_p.data(), of_scores.data()});
    if (bits != of_scores) fail(where, "the mask of the scores is another than that of q and k");

    const auto q_exact = means_of(p, p.q.values<double>(), c.heads, c.first_block),
               k_exact = means_of(p, p.k.values<double>(), c.kv_heads, 0);
    for (size_t i = 0; i < q_exact.size(); ++i)
        if (!is_close(q_mean[i], q_exact[i], 1e-6, 1e-6)) return fail(where, "a mean of q is off");
    for (int64_t head = 0; head < kBatch * c.kv_heads; ++head)
        for (int n = 0; n < padded; ++n)
            for (int d = 0; d < dim; ++d) {
                const double exact = n < count ? k_exact[(head * count + n) * dim + d] : 0;
                if (!is_close(k_mean[(head * dim + d) * padded + n], exact, 1e-6, 1e-6))
                    return fail(where, "a mean of k is off");
            }
    for (int64_t i = 0; i < q_blocks; ++i) {
        const int64_t b = i / p.q_blocks / c.heads, h = i / p.q_blocks % c.heads;
        const int block = c.first_block + i % p.q_blocks;
        const bool is_extra = block >= p.blocks.grid_count;
        std::vector<double> row;
        double total = 0;
        for (int j = 0; j < p.blocks.grid_count; ++j) {
            double logit = 0;
            for (int d = 0; d < dim; ++d)
                logit += q_exact[i * dim + d] *
                         k_exact[((b * c.kv_heads + h / group) * count + j) * dim + d];
            row.push_back(std::exp(logit * p.scale));
            total += row.back();
        }
        for (double& x : row) x /= total;
        std::vector<bool> always, kept;
        for (int j = 0; j < count; ++j) {
            const bool is_ranked = !is_extra && j < p.blocks.grid_count;
            const float score = scores[i * count + j];
            if (is_ranked ? !is_close(score, row[j], 3e-5, 0) : score != kInfinity)
                return fail(where, "a score is off");
            always.push_back(!is_ranked || is_in_window(p.blocks, block, j));
        }
        for (int j = 0; j < padded; ++j) kept.push_back(bits[i * words + j / 32] >> j % 32 & 1);
        if (std::count(kept.begin() + count, kept.end(), true))
            return fail(where, "a bit past the last block is set");
        kept.resize(count);
        if (!is_selection(row, always, kept)) return fail(where, "a row keeps other blocks");
    }
}

}  // namespace

int main() {
    std::setvbuf(stdout, nullptr, _IOLBF, BUFSIZ);  // an emulated processor takes its time
    const auto all = cpu::kernels_for(cpu::features());
    for (const Case& c : kCases)
        for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
            Problem problem(c, dtype);
            const auto low = attend<float>(problem);
            const auto exact = attend<double>(problem);
            for (const cpu::Kernels& kernels : all) {
                check_masks(kernels, problem);
                const double share = check_attention(kernels, problem, low, exact);
                std::printf("%-12s %s: %.2f of the error that is allowed\n", kernels.name,
                            problem.name.c_str(), share);
            }
        }
    std::printf("%d failures\n", failures);
    return failures != 0;
}
