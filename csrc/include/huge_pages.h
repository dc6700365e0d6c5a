// Large outputs on huge pages.
//
// glibc takes blocks of many megabytes from the system and gives them back when they are freed. Each fresh output then
// costs a page fault every 4 KB at its first write, which is most of the time of a kernel that only streams: a fill of
// 64 MB took 42 ms with small pages and 6 ms with pages of 2 MB. Linux gives the latter to memory that asks for them
// (`madvise` in /sys/kernel/mm/transparent_hugepage/enabled, the usual setting); PyTorch asks only with
// THP_MEM_ALLOC_ENABLE=1 in the environment.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "isa.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {

// Below this an output comes from memory that the process holds already, or touches few pages.
constexpr int64_t kHugePageBytes = 4 * 1024 * 1024;

// To be called on memory that is about to be written as a whole. A hint: it changes no byte, concerns only pages that lie
// in [memory, memory + bytes) entirely, and costs a system call where it is refused or has nothing left to do.
inline void prefer_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (memory == nullptr || bytes < kHugePageBytes) return;
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes)) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace BDFAST_ISA_NAMESPACE
}  // namespace bdfast
