// projected_sgd_step_ on the CPU: three passes over chunks of 16,384 weights of all layers together.
//
// Computes   the update stated in projected_sgd_step.h.
// A chunk    owns up to 16,384 consecutive weights of one layer (64 KB a tensor: four tensors stay in a core's L2).
// Moves      measure: reads W, W0 (skipped where the distance is carried); update: reads W, W0, G, V, writes V, W~;
//            project: reads and writes W (and reads W0 where the next distance needs a direct sum).
// Accumulates in float64, chunk by chunk, in order: the number of threads does not change a bit.
#include "projected_sgd_step.h"

#include <algorithm>
#include <vector>

#include "parallel.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {
namespace {

constexpr int64_t kChunk = 16384;

struct Chunk {
  int64_t segment;
  int64_t begin;
  int64_t end;
};

std::vector<Chunk> split(const ProjectedSgdSegment* segments, int64_t count) {
  std::vector<Chunk> chunks;
  for (int64_t s = 0; s < count; ++s) {
    for (int64_t begin = 0; begin < segments[s].numel; begin += kChunk) {
      chunks.push_back({s, begin, std::min(segments[s].numel, begin + kChunk)});
    }
  }
  return chunks;
}

// Independent accumulators: with one vector of them, a sum would take an addition's latency a vector.
constexpr int64_t kLanes = 32;

double total(const double (&lanes)[kLanes]) {
  double sum = 0.0;
#pragma omp simd reduction(+ : sum)
  for (int64_t lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

double squared_distance(const float* weight, const float* anchor, int64_t begin, int64_t end) {
  double sums[kLanes] = {};
  const auto add = [&](int64_t i, double& sum) {
    const double difference = static_cast<double>(weight[i]) - static_cast<double>(anchor[i]);
    sum += difference * difference;
  };
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
#pragma omp simd
    for (int64_t lane = 0; lane < kLanes; ++lane) add(i + lane, sums[lane]);
  }
  for (int64_t lane = 0; i < end; ++i, ++lane) add(i, sums[lane]);
  return total(sums);
}

ProjectedSgdSums update(const ProjectedSgdSegment& segment, int64_t begin, int64_t end, float pull,
                        const ProjectedSgdScalars& scalars) {
  float* __restrict__ weight = segment.weight;
  float* __restrict__ velocity = segment.momentum;
  const float* __restrict__ anchor = segment.anchor;
  const float* __restrict__ grad = segment.grad;
  const float lr = scalars.lr;
  const float momentum = scalars.momentum;
  double ww[kLanes] = {}, wa[kLanes] = {}, aa[kLanes] = {};
  const auto step = [&](int64_t i, int64_t lane) {
    const float v = updated_momentum(weight[i], anchor[i], grad[i], velocity[i], pull, momentum);
    const float w = weight[i] - lr * v;
    velocity[i] = v;
    weight[i] = w;
    const double wd = w, ad = anchor[i];
    ww[lane] += wd * wd;
    wa[lane] += wd * ad;
    aa[lane] += ad * ad;
  };
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
#pragma omp simd
    for (int64_t lane = 0; lane < kLanes; ++lane) step(i + lane, lane);
  }
  for (int64_t lane = 0; i < end; ++i, ++lane) step(i, lane);
  return {total(ww), total(wa), total(aa)};
}

double project(const ProjectedSgdSegment& segment, int64_t begin, int64_t end, double scale, bool measure) {
  float* weight = segment.weight;
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) weight[i] = static_cast<float>(scale * static_cast<double>(weight[i]));
  return measure ? squared_distance(weight, segment.anchor, begin, end) : 0.0;
}

}  // namespace

void projected_sgd_step(const ProjectedSgdSegment* segments, int64_t count, const ProjectedSgdScalars& scalars,
                        const float* norms, float* distances) {
  const std::vector<Chunk> chunks = split(segments, count);
  const int64_t total = static_cast<int64_t>(chunks.size());
  int64_t bytes = 0;
  for (int64_t s = 0; s < count; ++s) bytes += segments[s].numel * static_cast<int64_t>(sizeof(float));

  std::vector<double> squared(static_cast<size_t>(total));
  std::vector<float> pull(static_cast<size_t>(count));
  const auto known = [&](int64_t s) { return distances != nullptr && distance_is_known(distances[s]); };
  parallel_chunks(total, 2 * bytes, [&](int64_t c) {
    const Chunk& chunk = chunks[static_cast<size_t>(c)];
    if (known(chunk.segment)) return;
    const ProjectedSgdSegment& segment = segments[chunk.segment];
    squared[static_cast<size_t>(c)] = squared_distance(segment.weight, segment.anchor, chunk.begin, chunk.end);
  });
  std::vector<double> distance(static_cast<size_t>(count));
  for (int64_t c = 0; c < total; ++c) distance[chunks[c].segment] += squared[c];
  for (int64_t s = 0; s < count; ++s) {
    const double d = known(s) ? static_cast<double>(distances[s]) : std::sqrt(distance[s]);
    pull[s] = distance_pull(d, norms[s], scalars.distance_weight);
  }

  std::vector<ProjectedSgdSums> partial(static_cast<size_t>(total));
  parallel_chunks(total, 6 * bytes, [&](int64_t c) {
    const Chunk& chunk = chunks[static_cast<size_t>(c)];
    partial[c] = update(segments[chunk.segment], chunk.begin, chunk.end, pull[chunk.segment], scalars);
  });
  std::vector<ProjectedSgdSums> sums(static_cast<size_t>(count), ProjectedSgdSums{0.0, 0.0, 0.0});
  for (int64_t c = 0; c < total; ++c) {
    ProjectedSgdSums& sum = sums[chunks[c].segment];
    sum.weight_weight += partial[c].weight_weight;
    sum.weight_anchor += partial[c].weight_anchor;
    sum.anchor_anchor += partial[c].anchor_anchor;
  }

  const auto scale_of = [&](int64_t s) { return projection_scale(sums[s].weight_weight, norms[s]); };
  const auto direct = [&](int64_t s) {
    return distances != nullptr && distance_needs_direct_sum(sums[s], scale_of(s));
  };
  parallel_chunks(total, 2 * bytes, [&](int64_t c) {
    const Chunk& chunk = chunks[static_cast<size_t>(c)];
    squared[c] =
        project(segments[chunk.segment], chunk.begin, chunk.end, scale_of(chunk.segment), direct(chunk.segment));
  });
  if (distances == nullptr) return;
  std::fill(distance.begin(), distance.end(), 0.0);
  for (int64_t c = 0; c < total; ++c) distance[chunks[c].segment] += squared[c];
  for (int64_t s = 0; s < count; ++s) {
    distances[s] = direct(s) ? static_cast<float>(std::sqrt(distance[s])) : expanded_distance(sums[s], scale_of(s));
  }
}

}  // namespace BDFAST_ISA_NAMESPACE
}  // namespace bdfast
