// wgmma: issued by the lanes of a warp, computed later by its tensor cores.
//
// From issue to wait, the accumulators hold kInFlightBits: arithmetic on them shows, in the
// accumulators when they are written and in its result when it is converted or stored.
#include <algorithm>
#include <cstring>

#include "emulation/cta.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define NABLA_CLONES __attribute__((target_clones("avx512f", "avx2,fma", "default")))
#else
#define NABLA_CLONES
#endif

namespace nabla::emulation {
namespace {

constexpr int kK = 16;     // of one instruction
constexpr int kRows = 16;  // of a warp

// Of register i of a lane in an accumulator.
int row(uint32_t lane, int i) { return static_cast<int>(lane / 4) + 8 * (i >> 1 & 1); }
int column(uint32_t lane, int i) { return 8 * (i >> 2) + 2 * static_cast<int>(lane % 4) + (i & 1); }

// values [16, n] += a [16, 16] b [16, n], 64 columns at a time: those fit registers.
NABLA_CLONES void multiply(float* values, const float* a, const float* b, int n) {
    for (int j0 = 0; j0 < n; j0 += 64)
        for (int i = 0; i < kRows; ++i) {
            float sum[64];
            for (int j = 0; j < 64; ++j) sum[j] = values[i * n + j0 + j];
            for (int k = 0; k < kK; ++k)
                for (int j = 0; j < 64; ++j) sum[j] += a[i * kK + k] * b[k * n + j0 + j];
            for (int j = 0; j < 64; ++j) values[i * n + j0 + j] = sum[j];
        }
}

// A matrix in shared memory with 128-byte swizzle, of which one instruction reads some rows
// (M or N) and 16 columns (K).
struct Matrix {
    uint32_t start, leading_bytes, stride_bytes;
    bool transpose;

    Matrix(uint64_t descriptor, bool transpose)
        : start(static_cast<uint32_t>(descriptor & 0x3fff) << 4),
          leading_bytes(static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4),
          stride_bytes(static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4),
          transpose(transpose) {}

    // Address of the 16 bytes that hold 8 elements: columns k .. k + 7 of a row, or, transposed,
    // rows row .. row + 7 of column k. PTX ISA, "Shared Memory Matrix Layout".
    uint32_t chunk(int row, int k) const {
        uint32_t address = start;
        if (transpose)
            address += static_cast<uint32_t>(row / 64) * leading_bytes +
                       static_cast<uint32_t>(k / 8) * stride_bytes +
                       static_cast<uint32_t>(k % 8) * 128 + static_cast<uint32_t>(row % 64) * 2;
        else
            address += static_cast<uint32_t>(row / 8) * stride_bytes +
                       static_cast<uint32_t>(row % 8) * 128 + static_cast<uint32_t>(k) * 2;
        return address ^ (address >> 7 & 7) << 4;
    }

    template <class Visit>
    void for_each_chunk(int first_row, int rows, Visit visit) const {
        if (transpose) {
            for (int k = 0; k < kK; ++k)
                for (int r = first_row; r < first_row + rows; r += 8) visit(r, k, chunk(r, k));
        } else {
            for (int r = first_row; r < first_row + rows; ++r)
                for (int k = 0; k < kK; k += 8) visit(r, k, chunk(r, k));
        }
    }
};

class WgmmaObserver : public Observer {
  public:
    WgmmaObserver(const Wgmma& op, uint32_t warp, uint32_t agent)
        : op_(op), warp_(warp), agent_(agent) {}

    bool has_seen(Epoch epoch) const override {
        if (epoch.agent / 32u == warp_ && epoch.clock <= op_.now[epoch.agent % 32]) return true;
        if (epoch.agent == agent_) return true;
        return std::any_of(op_.known.begin(), op_.known.end(), [&](const KnowledgeRef& known) {
            return known && known->seen(epoch.agent) >= epoch.clock;
        });
    }
    bool has_fenced(Epoch epoch) const override {
        if (epoch.agent / 32u == warp_ && epoch.clock <= op_.fenced[epoch.agent % 32]) return true;
        return std::any_of(op_.known.begin(), op_.known.end(), [&](const KnowledgeRef& known) {
            return known && known->fenced(epoch.agent) >= epoch.clock;
        });
    }

  private:
    const Wgmma& op_;
    uint32_t warp_, agent_;
};

}  // namespace

void report_in_flight(Site where) {
    Cta& cta = Cta::current();
    uint32_t site;
    cta.enter(Instruction::kConvert, where, site);
    cta.fail(
        "this value comes from an accumulator that wgmma still worked on: no wgmma_wait covers it",
        site);
}

void wgmma(Type type, int n, float* d, const uint32_t* a, uint64_t a_descriptor,
           uint64_t b_descriptor, bool accumulate, bool transpose_b, Site where) {
    Cta& cta = Cta::current();
    Wgmma op;
    cta.enter(Instruction::kWgmma, where, op.site);
    op.type = type;
    op.n = n;
    op.accumulate = accumulate;
    op.transpose_b = transpose_b;
    op.a_in_registers = a != nullptr;
    op.a_descriptor = a_descriptor;
    op.b_descriptor = b_descriptor;
    cta.issue_wgmma(Cta::self(), op, d, a);
}

void Cta::issue_wgmma(Thread& thread, const Wgmma& proto, float* d, const uint32_t* a) {
    Warp& warp = warps[thread.warp];
    const uint32_t site = proto.site;
    const uint32_t lane = thread.lane;
    if (thread.warp / 4 * 4 + 4 > num_warps)
        fail("wgmma takes the four warps of a warpgroup", site);
    if (!thread.wgmma_fenced)
        fail("no wgmma_fence lies between the last wgmma_commit or wgmma_wait and this wgmma",
             site);
    const uint32_t number = thread.wgmma_issued++;
    const bool is_first = number - warp.wgmma_first == warp.wgmmas.size();
    if (is_first) {
        warp.wgmmas.push_back(proto);
        warp.wgmmas.back().group = thread.wgmma_committed + 1;
        warp.wgmmas.back().accumulator = ~0u;
    }
    Wgmma& op = warp.wgmmas[number - warp.wgmma_first];
    if (op.site != site || op.a_descriptor != proto.a_descriptor ||
        op.b_descriptor != proto.b_descriptor || op.accumulate != proto.accumulate ||
        op.n != proto.n || op.type != proto.type || op.group != thread.wgmma_committed + 1)
        fail("the lanes of a warp issue different wgmma: another is " + sites.text(op.site), site);

    const auto find = [&]() {
        for (uint32_t i = 0; i < warp.accumulators.size(); ++i)
            if (warp.accumulators[i].d[lane] == d) return i;
        return ~0u;
    };
    uint32_t found = find();
    if (op.accumulator == ~0u) {
        op.accumulator = found;
        for (uint32_t i = 0; op.accumulator == ~0u && i < warp.accumulators.size(); ++i)
            if (!warp.accumulators[i].n) op.accumulator = i;
        if (op.accumulator == ~0u) {
            op.accumulator = static_cast<uint32_t>(warp.accumulators.size());
            warp.accumulators.emplace_back();
        }
        Accumulator& accumulator = warp.accumulators[op.accumulator];
        if (!accumulator.n) {
            accumulator.n = op.n;
            accumulator.values.assign(static_cast<size_t>(kRows * op.n), 0.0f);
        }
        accumulator.last = number;
        accumulator.site = site;
    }
    Accumulator& accumulator = warp.accumulators[op.accumulator];
    if (accumulator.n != op.n || (found != ~0u && found != op.accumulator) ||
        (found == ~0u && accumulator.d[lane]))
        fail("an accumulator that another wgmma in flight works on differently", site);
    if (found == ~0u) {
        accumulator.d[lane] = d;
        for (int i = 0; i < op.n / 2; ++i) {
            if (op.accumulate) {
                check_not_in_flight(d[i], {sites[site].site.file, sites[site].site.line});
                accumulator.values[static_cast<size_t>(row(lane, i) * op.n + column(lane, i))] =
                    d[i];
            }
            memcpy(&d[i], &kInFlightBits, 4);
        }
    }
    op.a_registers[lane] = a;
    if (a) memcpy(op.a[lane], a, sizeof(op.a[lane]));
    if (op.known.empty() || op.known.back().get() != thread.known.get())
        op.known.push_back(thread.known);
    op.now[lane] = thread.now;
    op.fenced[lane] = thread.fenced;
    op.lanes |= 1u << lane;
    if (op.lanes != ~0u) return;

    // The warps of a warpgroup compute 16 rows each of the same product.
    auto& keys = wgmma_keys[thread.warp / 4];
    const WgmmaKey key{site, op.b_descriptor};
    if (number == keys.size()) keys.push_back(key);
    else if (keys[number].site != key.site || keys[number].b_descriptor != key.b_descriptor)
        fail("the warps of a warpgroup issue different wgmma: another is " +
                 sites.text(keys[number].site),
             site);
    check_operands(thread.warp, op);
    if (launch.settings.schedule == Schedule::kEager) execute(thread.warp, op);
}

// Of an operand in shared memory: where it is, and that what it reads is ordered.
void Cta::check_operands(uint32_t warp, Wgmma& op) {
    const WgmmaObserver observer(op, warp, wgmma_agent(warp));
    const Access access{{op.group, static_cast<uint16_t>(wgmma_agent(warp)), kAsync}, op.site};
    const auto check = [&](const char* name, uint64_t descriptor, bool transpose, int rows) {
        const Matrix matrix(descriptor, transpose);
        const auto wrong = [&](const std::string& what) {
            fail(std::string("wrong descriptor of ") + name + ": " + what, op.site);
        };
        if (descriptor >> 62 != 1) wrong("it has not the 128-byte swizzle");
        if (descriptor & 0x3fff'c000'c000'c000u) wrong("bits are set that have no meaning here");
        if (matrix.start >> 7 & 7)
            wrong("its rows of 128 bytes do not start at a multiple of 1024");
        if (transpose && matrix.start % 128)
            wrong("a transposed matrix does not start at a multiple of 128");
        if (matrix.stride_bytes % 1024 || (transpose && matrix.leading_bytes % 1024))
            wrong("its groups of 8 rows are not at multiples of 1024");
        Shadow::Memo memo;
        matrix.for_each_chunk(0, rows, [&](int, int, uint32_t address) {
            if (address < kSharedBase || address - kSharedBase + 16 > shared_bytes)
                wrong("it reaches byte " + std::to_string(int64_t{address} - int64_t{kSharedBase}) +
                      " of " + std::to_string(shared_bytes) + " of shared memory");
            report_conflict(shadow.read(observer, access, address - kSharedBase, 16, memo),
                            op.site);
        });
    };
    // Nothing says which rows of a are read for which warp: all are.
    if (!op.a_in_registers) check("a", op.a_descriptor, false, 4 * kRows);
    check("b", op.b_descriptor, op.transpose_b, op.n);
}

namespace {

// The operands of one warp as floats: a [16, 16] and b [16, n].
template <Type kType>
void read_operands(Cta& cta, uint32_t warp, const Wgmma& op, float* a, float* b) {
    if (op.a_in_registers) {
        for (int lane = 0; lane < 32; ++lane)
            for (int r = 0; r < 4; ++r) {
                float* pair = a + (lane / 4 + 8 * (r & 1)) * kK + 8 * (r >> 1) + 2 * (lane % 4);
                pair[0] = from_bits(kType, static_cast<uint16_t>(op.a[lane][r]));
                pair[1] = from_bits(kType, static_cast<uint16_t>(op.a[lane][r] >> 16));
            }
    } else {
        const int first = kRows * static_cast<int>(warp % 4);
        Matrix(op.a_descriptor, false)
            .for_each_chunk(first, kRows, [&](int row, int k, uint32_t address) {
                uint16_t chunk[8];
                memcpy(chunk, cta.shared(address), 16);
                float* at = a + (row - first) * kK + k;
                for (int e = 0; e < 8; ++e) at[e] = from_bits(kType, chunk[e]);
            });
    }
    Matrix(op.b_descriptor, op.transpose_b)
        .for_each_chunk(0, op.n, [&](int row, int k, uint32_t address) {
            uint16_t chunk[8];
            memcpy(chunk, cta.shared(address), 16);
            float* at = b + k * op.n + row;
            const int step = op.transpose_b ? 1 : op.n;
            for (int e = 0; e < 8; ++e) at[e * step] = from_bits(kType, chunk[e]);
        });
}

}  // namespace

void Cta::execute(uint32_t warp, Wgmma& op) {
    if (op.is_done) return;
    op.is_done = true;
    alignas(64) float a[kRows * kK];
    alignas(64) float b[kK * 256];
    if (op.type == Type::kBFloat16) read_operands<Type::kBFloat16>(*this, warp, op, a, b);
    else read_operands<Type::kFloat16>(*this, warp, op, a, b);
    std::vector<float>& values = warps[warp].accumulators[op.accumulator].values;
    if (!op.accumulate) std::fill(values.begin(), values.end(), 0.0f);
    multiply(values.data(), a, b, op.n);
}

// Finish the groups up to this one.
void Cta::finish_wgmmas(uint32_t w, uint32_t group) {
    Warp& warp = warps[w];
    size_t done = 0;
    for (; done < warp.wgmmas.size() && warp.wgmmas[done].group <= group; ++done) {
        Wgmma& op = warp.wgmmas[done];
        if (op.lanes != ~0u) fail("not all lanes of the warp have issued this wgmma", op.site);
        execute(w, op);
        for (uint32_t lane = 0; op.a_in_registers && lane < 32; ++lane)
            if (memcmp(op.a[lane], op.a_registers[lane], sizeof(op.a[lane])))
                fail("registers of a have changed in lane " + std::to_string(lane) +
                         " while wgmma read them: no wgmma_wait comes before",
                     op.site);
    }
    if (!done) return;
    warp.wgmmas.erase(warp.wgmmas.begin(), warp.wgmmas.begin() + static_cast<ptrdiff_t>(done));
    warp.wgmma_first += static_cast<uint32_t>(done);
    for (Accumulator& accumulator : warp.accumulators) {
        if (!accumulator.n || accumulator.last >= warp.wgmma_first) continue;
        // All are looked at before any is written: what they lay in may be gone.
        for (uint32_t lane = 0; lane < 32; ++lane)
            for (int i = 0; i < accumulator.n / 2; ++i)
                if (bit_cast<uint32_t>(accumulator.d[lane][i]) != kInFlightBits)
                    fail("accumulators have changed in lane " + std::to_string(lane) +
                             " while wgmma worked on them: no wgmma_wait comes before",
                         accumulator.site);
        for (uint32_t lane = 0; lane < 32; ++lane)
            for (int i = 0; i < accumulator.n / 2; ++i)
                accumulator.d[lane][i] = accumulator.values[static_cast<size_t>(
                    row(lane, i) * accumulator.n + column(lane, i))];
        accumulator = Accumulator();
    }
}

void wgmma_wait(uint32_t pending, Site where) {
    Cta& cta = Cta::current();
    Thread& thread = Cta::self();
    uint32_t site;
    if (cta.enter(Instruction::kWgmmaWait, where, site)) return;
    uint32_t group = thread.wgmma_committed > pending ? thread.wgmma_committed - pending : 0;
    cta.collective(thread, site, group, [&](uint32_t* const* groups) {
        for (uint32_t lane = 0; lane < 32; ++lane)
            if (*groups[lane] != group)
                cta.fail("the lanes of a warp have committed different wgmma groups", site);
        cta.finish_wgmmas(thread.warp, group);
    });
    thread.wgmma_done = std::max(thread.wgmma_done, group);
    thread.wgmma_fenced = false;
}

}  // namespace nabla::emulation

namespace nabla::ptx {

using emulation::Cta;
using emulation::Instruction;
using emulation::Thread;

void wgmma_fence(Site where) {
    Cta& cta = Cta::current();
    Thread& thread = Cta::self();
    uint32_t site;
    if (cta.enter(Instruction::kWgmmaFence, where, site)) return;
    int nothing = 0;
    cta.collective(thread, site, nothing, [](int* const*) {});
    thread.wgmma_fenced = true;
}

void wgmma_commit(Site where) {
    Cta& cta = Cta::current();
    Thread& thread = Cta::self();
    uint32_t site;
    if (cta.enter(Instruction::kWgmmaCommit, where, site)) return;
    ++thread.wgmma_committed;
    thread.wgmma_fenced = false;
}

}  // namespace nabla::ptx
