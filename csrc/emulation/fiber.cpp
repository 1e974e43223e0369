#include "emulation/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <new>

namespace nabla::emulation {

#ifdef NABLA_UCONTEXT

void switch_context(Context& from, Context& to) { swapcontext(&from.state, &to.state); }

void start_context(Context& context, void* stack, size_t bytes, void (*entry)()) {
    getcontext(&context.state);
    context.state.uc_stack.ss_sp = stack;
    context.state.uc_stack.ss_size = bytes;
    context.state.uc_link = nullptr;
    makecontext(&context.state, entry, 0);
}

#else

// Saves the registers that a function has to preserve on the stack, and the stack pointer in
// *from; then the reverse. swapcontext would make two system calls.
extern "C" void nabla_switch_stack(void** from, void* to);

#if defined(__x86_64__)
asm(R"(
.text
.hidden nabla_switch_stack
.globl nabla_switch_stack
.type nabla_switch_stack, @function
nabla_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size nabla_switch_stack, . - nabla_switch_stack
)");

void start_context(Context& context, void* stack, size_t bytes, void (*entry)()) {
    auto* top = reinterpret_cast<void**>(static_cast<uint8_t*>(stack) + bytes);
    *--top = nullptr;  // the return address of entry, which leaves the stack as after a call
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    context.stack_pointer = top;
}
#else
asm(R"(
.text
.hidden nabla_switch_stack
.globl nabla_switch_stack
.type nabla_switch_stack, %function
nabla_switch_stack:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size nabla_switch_stack, . - nabla_switch_stack
)");

void start_context(Context& context, void* stack, size_t bytes, void (*entry)()) {
    auto* top = reinterpret_cast<void**>(static_cast<uint8_t*>(stack) + bytes) - 20;
    for (int i = 0; i < 20; ++i) top[i] = nullptr;
    top[11] = reinterpret_cast<void*>(entry);  // x30, where ret goes
    context.stack_pointer = top;
}
#endif

void switch_context(Context& from, Context& to) {
    nabla_switch_stack(&from.stack_pointer, to.stack_pointer);
}

#endif  // NABLA_UCONTEXT

Stacks::Stacks(size_t count) : count_(count), page_(static_cast<size_t>(sysconf(_SC_PAGESIZE))) {
    const size_t bytes = count * (kBytes + page_);
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<uint8_t*>(memory);
    for (size_t i = 0; i < count; ++i) mprotect(memory_ + i * (kBytes + page_), page_, PROT_NONE);
}

Stacks::~Stacks() { munmap(memory_, count_ * (kBytes + page_)); }

}  // namespace nabla::emulation
