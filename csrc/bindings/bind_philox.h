// philox: the generator, for tests against published values.
#pragma once

#include <array>
#include <cstdint>

#include "addresses.h"
#include "philox.h"

namespace bdfast {
namespace {

std::array<uint32_t, 4> philox4x32_words(uint64_t key, uint64_t counter_low, uint64_t counter_high) {
  const auto random = isa_baseline::philox4x32(key, counter_low, counter_high);
  return {random.word[0], random.word[1], random.word[2], random.word[3]};
}

void bind_philox(py::module_& m) { m.def("philox4x32", &philox4x32_words, nogil()); }

}  // namespace
}  // namespace bdfast
