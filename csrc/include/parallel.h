// Loops over independent chunks of work.
//
// A chunk's boundaries never depend on the number of threads: whatever is reduced per chunk, and then over chunks in
// order, is bit-identical on one thread and on a hundred.
#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "isa.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {

// Below this many bytes a kernel stays on the calling thread: waking a second one costs a few microseconds, about what
// one core needs to stream as much from its own cache.
constexpr int64_t kSerialBytes = 128 * 1024;

// Threads that a loop may have.
inline int64_t most_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

// One copy of a loop's body for one thread and for several: same bits, and half the code.
template <class Body>
BDFAST_ONE_COPY void run_chunk(const Body& body, int64_t chunk) {
  body(chunk);
}

template <class Body>
void parallel_chunks(int64_t chunks, [[maybe_unused]] int64_t bytes, const Body& body) {
#ifdef _OPENMP
  if (chunks > 1 && bytes > kSerialBytes && omp_get_max_threads() > 1) {
#pragma omp parallel for schedule(static)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) run_chunk(body, chunk);
    return;
  }
#endif
  for (int64_t chunk = 0; chunk < chunks; ++chunk) run_chunk(body, chunk);
}

}  // namespace BDFAST_ISA_NAMESPACE
}  // namespace bdfast
