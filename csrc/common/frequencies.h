// The distinct frequencies of a real convolution on a grid.
//
// The symbol of a real kernel satisfies F(-w) = conj F(w), so a frequency and its mirror image share their singular
// values: about half of the grid need be computed (514 of 1024 for 32 x 32).
#pragma once

#include <cstdint>
#include <vector>

namespace iresnet_fast {

struct DistinctFrequencies {
  std::vector<int64_t> index;   // flat index, in the grid, of each distinct frequency
  std::vector<int64_t> mirror;  // flat index of its mirror image (its own where it is self-conjugate)
};

// Flat index (row-major) of the frequency opposite to `flat` on a grid of the given sizes.
inline int64_t mirror_frequency(int64_t flat, const std::vector<int64_t>& grid) {
  int64_t mirrored = 0;
  int64_t place = 1;
  for (auto axis = grid.rbegin(); axis != grid.rend(); ++axis) {
    const int64_t j = flat % *axis;
    flat /= *axis;
    mirrored += place * (j == 0 ? 0 : *axis - j);
    place *= *axis;
  }
  return mirrored;
}

inline DistinctFrequencies distinct_frequencies(const std::vector<int64_t>& grid) {
  int64_t count = 1;
  for (const int64_t axis : grid) count *= axis;
  DistinctFrequencies distinct;
  distinct.index.reserve(count / 2 + 1);
  distinct.mirror.reserve(count / 2 + 1);
  for (int64_t flat = 0; flat < count; ++flat) {
    const int64_t mirrored = mirror_frequency(flat, grid);
    if (flat <= mirrored) {
      distinct.index.push_back(flat);
      distinct.mirror.push_back(mirrored);
    }
  }
  return distinct;
}

}  // namespace iresnet_fast
