// Scratch memory of a kernel.
#pragma once

#include <cstdint>
#include <memory>

#include "isa.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {

// Memory that a thread keeps for its next call: fresh pages would cost more than the transforms.
class Workspace {
 public:
  // Uninitialised, from the beginning of a cache line on.
  float* at_least(int64_t floats) {
    if (floats > size_) {
      memory_.reset(new float[static_cast<size_t>(floats) + kLine / sizeof(float)]);
      size_ = floats;
    }
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory_.get());
    return memory_.get() + ((address + kLine - 1) / kLine * kLine - address) / sizeof(float);
  }

 private:
  static constexpr uintptr_t kLine = 64;
  std::unique_ptr<float[]> memory_;
  int64_t size_ = 0;
};

}  // namespace BDFAST_ISA_NAMESPACE
}  // namespace bdfast
