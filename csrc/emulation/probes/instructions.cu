// One instruction each, between registers and shared memory that the test gives and reads.
#include "emulation/probes/probes.h"

namespace nabla::emulation::probes {
namespace {

NABLA_DEVICE void load_image(uint32_t shared, const uint8_t* image, uint32_t bytes) {
    for (uint32_t i = 16 * ptx::thread_index(); i < bytes; i += 16 * ptx::num_threads())
        ptx::store_shared(shared + i,
                          ptx::load_global(reinterpret_cast<const ptx::U32x4*>(image + i)));
}

NABLA_DEVICE void store_image(uint8_t* image, uint32_t shared, uint32_t bytes) {
    for (uint32_t i = 16 * ptx::thread_index(); i < bytes; i += 16 * ptx::num_threads())
        ptx::store_global(reinterpret_cast<ptx::U32x4*>(image + i),
                          ptx::load_shared<ptx::U32x4>(shared + i));
}

template <class T, int kN, bool kA, bool kTransposeB>
NABLA_KERNEL(128, 1)
wgmma_kernel(const NABLA_GRID_CONSTANT WgmmaParams p) {
    const uint32_t shared = ptx::shared_base();
    const uint32_t thread = ptx::thread_index();
    load_image(shared, p.image, p.image_bytes);
    ptx::fence_proxy_async();
    ptx::sync_cta();
    float d[kN / 2];
    for (int i = 0; i < kN / 2; ++i) d[i] = ptx::load_global(p.d + thread * (kN / 2) + i);
    const uint64_t b = ptx::matrix_descriptor(shared + p.b_address, p.b_leading, p.b_stride);
    uint32_t a[4] = {};
    if constexpr (kA) {
        for (int r = 0; r < 4; ++r) a[r] = ptx::load_global(p.a + 4 * thread + r);
        ptx::wgmma_fence();
        ptx::wgmma_rs<T, kN, kTransposeB>(d, a, b, p.accumulate);
    } else {
        const auto a_in_shared =
            ptx::matrix_descriptor(shared + p.a_address, p.a_leading, p.a_stride);
        ptx::wgmma_fence();
        ptx::wgmma_ss<T, kN>(d, a_in_shared, b, p.accumulate);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::keep_in_place(d);
    for (int i = 0; i < kN / 2; ++i) ptx::store_global(p.d + thread * (kN / 2) + i, d[i]);
}

template <class T, int kN>
void launch_wgmma(const WgmmaParams& p) {
    const ptx::LaunchShape shape{"wgmma", 1, 128, p.image_bytes, nullptr};
    if (p.a_in_registers) {
        if (p.transpose_b) ptx::launch(wgmma_kernel<T, kN, true, true>, shape, p);
        else ptx::launch(wgmma_kernel<T, kN, true, false>, shape, p);
    } else {
        ptx::launch(wgmma_kernel<T, kN, false, false>, shape, p);
    }
}

NABLA_KERNEL(32, 1) copy_kernel(const NABLA_GRID_CONSTANT CopyParams p) {
    const uint32_t shared = ptx::shared_base();
    const uint32_t mbarrier = shared + (p.bytes + 7) / 8 * 8;
    const bool elected = ptx::elect_one();
    if (elected) {
        ptx::mbarrier_init(mbarrier, 1);
        ptx::fence_mbarrier_init();
        ptx::mbarrier_arrive_expect_tx(mbarrier, p.bytes);
        if (p.source) ptx::copy_bulk(shared, p.source, p.bytes, mbarrier);
        else
            ptx::copy_tensor_4d(shared, &p.map, mbarrier, p.coordinates[0], p.coordinates[1],
                                p.coordinates[2], p.coordinates[3]);
    }
    ptx::sync_cta();
    ptx::mbarrier_wait(mbarrier, 0);
    store_image(p.image, shared, p.bytes);
}

template <class T>
NABLA_KERNEL(32, 1)
warp_kernel(const NABLA_GRID_CONSTANT WarpParams p) {
    const uint32_t shared = ptx::shared_base();
    const uint32_t lane = ptx::lane_index();
    uint32_t in[8], out[8] = {};
    for (uint32_t i = 0; i < 8; ++i) in[i] = ptx::load_global(p.inputs + 8 * lane + i);
    load_image(shared, p.image, p.image_bytes);
    ptx::sync_cta();
    uint32_t registers[4] = {in[0], in[1], in[2], in[3]};
    switch (p.instruction) {
        case 0: out[0] = ptx::shuffle(in[0], in[1]); break;
        case 1: out[0] = ptx::shuffle_xor(in[0], p.argument); break;
        case 2:
            out[0] = ptx::ballot(in[0] != 0);
            out[1] = ptx::any(in[0] != 0);
            break;
        case 3:
            out[0] = ptx::reduce_add(in[0]);
            out[1] = ptx::reduce_max(in[0]);
            out[2] = ptx::reduce_min(in[0]);
            break;
        case 4: {
            out[0] = ptx::pack<T>(ptx::bit_cast<float>(in[0]), ptx::bit_cast<float>(in[1]));
            const ptx::F32x2 pair = ptx::unpack<T>(in[2]);
            out[1] = ptx::bit_cast<uint32_t>(pair.v[0]);
            out[2] = ptx::bit_cast<uint32_t>(pair.v[1]);
            break;
        }
        case 5:
            ptx::ldmatrix_x4(registers, shared + in[4]);
            for (int i = 0; i < 4; ++i) out[i] = registers[i];
            break;
        case 6:
            ptx::ldmatrix_x4_trans(registers, shared + in[4]);
            for (int i = 0; i < 4; ++i) out[i] = registers[i];
            break;
        case 7: {
            const uint32_t b[2] = {in[4], in[5]};
            float d[4] = {0.0f, 1.0f, 2.0f, 3.0f};
            ptx::mma_m16n8k16<T>(d, registers, b);
            for (int i = 0; i < 4; ++i) out[i] = ptx::bit_cast<uint32_t>(d[i]);
            break;
        }
        case 8:  // 16 bytes of the image, of which in[5] are valid, to where in[4] says
            ptx::copy_async_16(shared + in[4], p.image + 16 * lane, in[5]);
            ptx::copy_async_commit();
            ptx::copy_async_wait<0>();
            break;
        case 9: out[0] = ptx::elect_one(); break;
        case 10: {
            const auto x = ptx::bit_cast<float>(in[0]);
            out[0] = ptx::bit_cast<uint32_t>(ptx::exp2(x));
            out[1] = ptx::bit_cast<uint32_t>(ptx::log2(x));
            out[2] = ptx::bit_cast<uint32_t>(ptx::reciprocal(x));
            break;
        }
        case 11:
            out[0] = ptx::popcount(in[0]);
            out[1] = ptx::trailing_zeros(in[0]);
            break;
    }
    ptx::sync_cta();
    for (uint32_t i = 0; i < 8; ++i) ptx::store_global(p.outputs + 8 * lane + i, out[i]);
    store_image(p.image_out, shared, p.image_bytes);
}

NABLA_KERNEL(32, 1) sum_kernel(float* result) {
    const float mine = 1.0f / static_cast<float>(3 + ptx::cta_index());
    if (ptx::elect_one()) ptx::reduce_add_global(result, mine);
}

template <int kDown, int kUp>
NABLA_KERNEL(512, 1)
registers_kernel(int) {
    if (ptx::warp_index() < 4) ptx::set_max_registers_down<kDown>();
    else ptx::set_max_registers_up<kUp>();
}

}  // namespace

void sum(float* result, int ctas) {
    ptx::launch(sum_kernel, {"sum", static_cast<uint32_t>(ctas), 32, 0, nullptr}, result);
}

void registers(int threads, int down, int up) {
    const ptx::LaunchShape shape{"registers", 1, static_cast<uint32_t>(threads), 0, nullptr};
    if (down == 24 && up == 240) ptx::launch(registers_kernel<24, 240>, shape, 0);
    if (down == 24 && up == 256) ptx::launch(registers_kernel<24, 256>, shape, 0);
    if (down == 200 && up == 240) ptx::launch(registers_kernel<200, 240>, shape, 0);
}

void wgmma(const WgmmaParams& p) {
    if (p.type == 0)
        p.n == 64 ? launch_wgmma<ptx::BFloat16, 64>(p) : launch_wgmma<ptx::BFloat16, 128>(p);
    else p.n == 64 ? launch_wgmma<ptx::Float16, 64>(p) : launch_wgmma<ptx::Float16, 128>(p);
}

void copy(const CopyParams& p) {
    ptx::launch(copy_kernel, {"copy", 1, 32, p.bytes + 16, nullptr}, p);
}

void warp(const WarpParams& p) {
    const ptx::LaunchShape shape{"warp", 1, 32, p.image_bytes, nullptr};
    if (p.argument >> 31) ptx::launch(warp_kernel<ptx::Float16>, shape, p);
    else ptx::launch(warp_kernel<ptx::BFloat16>, shape, p);
}

}  // namespace nabla::emulation::probes
