// smallest_per_class on the CPU: a counting sort by class, then a selection within each class.
//
// Computes   for each class the k smallest of its (score, index) keys, in order.
// A chunk    owns 65,536 samples while keys are dealt out to their classes, then one class.
// Moves      reads scores and labels twice; writes and reads 8 bytes a sample.
// Result     does not depend on chunks or threads: keys are unique.
#include "smallest_per_class.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "parallel.h"
#include "rows.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {
namespace {

constexpr int64_t kChunk = 65536;

// Samples [begin, end) that can be selected.
template <class Body>
void for_each_selectable(const SmallestPerClassArgs& a, int64_t begin, int64_t end, const Body& body) {
  for (int64_t i = begin; i < end; ++i) {
    if (is_selectable(a.scores[i])) body(i);
  }
}

void select(uint64_t* keys, int64_t size, int64_t k, int64_t* indices) {
  const int64_t selected = std::min(k, size);
  if (size > k) std::nth_element(keys, keys + k, keys + size);
  std::sort(keys, keys + selected);
  for (int64_t i = 0; i < selected; ++i) indices[i] = selected_index(keys[i]);
  std::fill(indices + selected, indices + k, int64_t{-1});
}

}  // namespace

int64_t smallest_per_class(const SmallestPerClassArgs& a, int64_t* indices, int64_t* counts) {
  const int64_t outside = first_label_outside(a.labels, a.count, a.classes);
  if (outside >= 0) return outside;
  const int64_t bytes = a.count * static_cast<int64_t>(sizeof(float) + sizeof(int64_t));
  const int64_t chunk_size =
      std::max(kChunk, a.classes);  // so that all histograms together are no larger than the keys
  const int64_t chunks = (a.count + chunk_size - 1) / chunk_size;
  const auto end_of = [&](int64_t chunk) { return std::min(a.count, (chunk + 1) * chunk_size); };

  // places[chunk][class]: first how many keys, then where the next one goes.
  std::vector<int64_t> places(static_cast<size_t>(chunks * a.classes));
  parallel_chunks(chunks, bytes, [&](int64_t chunk) {
    int64_t* sizes = places.data() + chunk * a.classes;
    for_each_selectable(a, chunk * chunk_size, end_of(chunk), [&](int64_t i) { ++sizes[a.labels[i]]; });
  });
  std::vector<int64_t> starts(static_cast<size_t>(a.classes) + 1);
  int64_t start = 0;
  for (int64_t c = 0; c < a.classes; ++c) {
    starts[static_cast<size_t>(c)] = start;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      int64_t& place = places[static_cast<size_t>(chunk * a.classes + c)];
      start += place;
      place = start - place;
    }
  }
  starts[static_cast<size_t>(a.classes)] = start;

  const std::unique_ptr<uint64_t[]> keys(new uint64_t[static_cast<size_t>(start)]);
  parallel_chunks(chunks, bytes, [&](int64_t chunk) {
    int64_t* next = places.data() + chunk * a.classes;
    for_each_selectable(a, chunk * chunk_size, end_of(chunk),
                        [&](int64_t i) { keys[next[a.labels[i]]++] = selection_key(a.scores[i], i); });
  });
  parallel_chunks(a.classes, bytes, [&](int64_t c) {
    const int64_t begin = starts[static_cast<size_t>(c)];
    const int64_t size = starts[static_cast<size_t>(c) + 1] - begin;
    select(keys.get() + begin, size, a.k, indices + c * a.k);
    counts[c] = std::min(a.k, size);
  });
  return -1;
}

}  // namespace BDFAST_ISA_NAMESPACE
}  // namespace bdfast
