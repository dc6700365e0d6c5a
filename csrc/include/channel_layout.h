// Where the channels of an activation are in memory.
#pragma once

#include <cstdint>

namespace bdfast {

// Element i, in memory order, belongs to channel (i / inner) % channels.
struct ChannelLayout {
  int64_t numel;
  int64_t channels;
  int64_t inner;  // 1 for channels_last and [N, C], H * W for contiguous NCHW
};

}  // namespace bdfast
