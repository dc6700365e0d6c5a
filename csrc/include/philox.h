// Philox4x32-10: random words as a function of a counter and a key, so that a value depends on what it is for and not on
// who computes it, when, or beside what (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3; SC11).
#pragma once

#include <cstdint>

#include "isa.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {

struct PhiloxWords {
  uint32_t word[4];
};

// counter = (low 32 bits of `low`, its high 32 bits, low 32 bits of `high`, its high 32 bits); the key likewise.
BDFAST_HOST_DEVICE PhiloxWords philox4x32(uint64_t key, uint64_t low, uint64_t high) {
  uint32_t c0 = static_cast<uint32_t>(low), c1 = static_cast<uint32_t>(low >> 32);
  uint32_t c2 = static_cast<uint32_t>(high), c3 = static_cast<uint32_t>(high >> 32);
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t product1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(product1);
    c3 = static_cast<uint32_t>(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Uniform in [0, count) for count < 2^31; a value's probability is off by less than 2^-32.
BDFAST_HOST_DEVICE int32_t uniform_below(uint32_t word, int64_t count) {
  return static_cast<int32_t>((static_cast<uint64_t>(word) * static_cast<uint64_t>(count)) >> 32);
}

// Uniform over the 2^24 multiples of 2^-23 in [-1, 1), exact in float.
BDFAST_HOST_DEVICE float uniform_symmetric(uint32_t word) {
  return static_cast<float>(static_cast<int32_t>(word >> 8) - (1 << 23)) * 1.1920928955078125e-07f;
}

}  // namespace BDFAST_ISA_NAMESPACE
}  // namespace bdfast
