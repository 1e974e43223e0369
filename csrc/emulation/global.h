// Accesses to global memory: bounds, and races between threads and CTAs of a launch.
#pragma once

#include <cstdint>

#include "emulation/cta.h"

namespace nabla::emulation {

enum class Touching : uint8_t { kRead, kWrite, kAdd };

// The current thread touches these bytes; what is wrong with that is reported.
void touch_global(Cta& cta, const void* address, uint32_t bytes, Touching touching, uint32_t site);

}  // namespace nabla::emulation
