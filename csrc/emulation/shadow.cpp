#include "emulation/shadow.h"

namespace nabla::emulation {
namespace {

constexpr uint32_t kSuccessors = 4096;
constexpr uint16_t kSplit = 0x8000;  // the cells of this word's bytes hold its accesses

}  // namespace

void Shadow::reset(uint32_t bytes) {
    words_.assign((bytes + 3) / 4, Cell());
    bytes_.clear();
    nodes_.assign(1, Node());
    successors_.assign(kSuccessors, Successor());
}

// The node for `access` after `node`.
uint32_t Shadow::append(uint32_t node, const Access& access) {
    if (node && nodes_[node].access.epoch == access.epoch) return node;
    if (node && nodes_[node].access.epoch.agent == access.epoch.agent &&
        nodes_[node].access.epoch.flags == access.epoch.flags)
        node = nodes_[node].earlier;  // the later read of one agent stands for both
    const uint32_t hash =
        (node * 2654435761u ^ access.epoch.clock * 40503u ^ access.epoch.agent * 2246822519u) %
        kSuccessors;
    Successor& known = successors_[hash];
    if (known.result && known.node == node && known.epoch == access.epoch) return known.result;
    nodes_.push_back({access, node});
    known = {node, static_cast<uint32_t>(nodes_.size() - 1), access.epoch};
    return known.result;
}

Conflict Shadow::order(const Observer& observer, const Access& access, const Epoch& write) const {
    if (!write.clock) return Conflict::kNone;
    if (write.flags & kMbarrier) return Conflict::kMbarrier;
    if (write.flags & kInFlight) return Conflict::kInFlight;
    if (!observer.has_seen(write)) return Conflict::kWrite;
    const bool generic_before_async = (access.epoch.flags & kAsync) && !(write.flags & kAsync);
    if (generic_before_async && !observer.has_fenced(write)) return Conflict::kFence;
    return Conflict::kNone;
}

Finding Shadow::read_cell(const Observer& observer, const Access& access, Cell& cell, Memo& memo) {
    if (!cell.write.clock && (access.epoch.flags & kAsync)) return {Conflict::kUnwritten, {}, 0};
    const Conflict conflict = order(observer, access, cell.write);
    if (conflict != Conflict::kNone) return {conflict, {cell.write, cell.site}, 0};
    if (cell.write.flags & kAtomic)
        for (uint32_t n = cell.reads; n; n = nodes_[n].earlier)
            if ((nodes_[n].access.epoch.flags & kAtomic) &&
                !observer.has_seen(nodes_[n].access.epoch))
                return {Conflict::kWrite, nodes_[n].access, 0};
    const uint32_t reads = append(cell.reads, access);
    memo = {cell.write, cell.reads, reads, true};
    cell.reads = reads;
    return {};
}

Finding Shadow::write_cell(const Observer& observer, const Access& access, Cell& cell, Memo& memo) {
    const bool both_atomic = (access.epoch.flags & kAtomic) && (cell.write.flags & kAtomic);
    if (!both_atomic) {
        const Conflict conflict = order(observer, access, cell.write);
        if (conflict != Conflict::kNone) return {conflict, {cell.write, cell.site}, 0};
    }
    for (uint32_t n = cell.reads; n; n = nodes_[n].earlier) {
        const Access& earlier = nodes_[n].access;
        if ((earlier.epoch.flags & kAtomic) && (access.epoch.flags & kAtomic)) continue;
        if (!observer.has_seen(earlier.epoch)) return {Conflict::kRead, earlier, 0};
    }
    // An earlier atomic stays, among the reads: whoever follows has to be ordered after each.
    const uint32_t reads = both_atomic ? append(cell.reads, {cell.write, cell.site}) : 0;
    memo = {cell.write, cell.reads, reads, true};
    cell = {access.epoch, access.site, reads};
    return {};
}

// Call known(cell) for what the memo answers, and visit(cell) for the rest.
template <class Known, class Visit>
Finding Shadow::visit(uint32_t offset, uint32_t bytes, const Memo& memo, Known known, Visit visit) {
    for (uint32_t at = offset, end = offset + bytes; at < end;) {
        Cell& word = words_[at / 4];
        const bool whole = at % 4 == 0 && end - at >= 4;
        if (whole && memo.valid && word.write == memo.write && word.reads == memo.reads) {
            known(word);
            at += 4;
            continue;
        }
        if (whole && !(word.write.flags & kSplit)) {
            Finding finding = visit(word);
            if (finding.conflict != Conflict::kNone) {
                finding.offset = at;
                return finding;
            }
            at += 4;
            continue;
        }
        if (!(word.write.flags & kSplit)) {
            bytes_[at / 4].fill(word);
            word.write.flags |= kSplit;
        }
        std::array<Cell, 4>& parts = bytes_[at / 4];
        do {
            Finding finding = visit(parts[at % 4]);
            if (finding.conflict != Conflict::kNone) {
                finding.offset = at;
                return finding;
            }
            ++at;
        } while (at < end && at % 4);
        if (parts[0].write == parts[1].write && parts[1].write == parts[2].write &&
            parts[2].write == parts[3].write && parts[0].reads == parts[1].reads &&
            parts[1].reads == parts[2].reads && parts[2].reads == parts[3].reads) {
            word = parts[0];
            bytes_.erase((at - 1) / 4);
        }
    }
    return {};
}

Finding Shadow::read(const Observer& observer, const Access& access, uint32_t offset,
                     uint32_t bytes, Memo& memo) {
    return visit(
        offset, bytes, memo, [&](Cell& cell) { cell.reads = memo.reads_after; },
        [&](Cell& cell) { return read_cell(observer, access, cell, memo); });
}

Finding Shadow::write(const Observer& observer, const Access& access, uint32_t offset,
                      uint32_t bytes, Memo& memo) {
    return visit(
        offset, bytes, memo,
        [&](Cell& cell) { cell = {access.epoch, access.site, memo.reads_after}; },
        [&](Cell& cell) { return write_cell(observer, access, cell, memo); });
}

void Shadow::land(uint32_t offset, uint32_t bytes, Epoch epoch) {
    visit(
        offset, bytes, Memo(), [](Cell&) {},
        [&](Cell& cell) {
            if (cell.write.flags & kInFlight) cell.write = epoch;
            return Finding();
        });
}

}  // namespace nabla::emulation
