// The gradient through the normalisation of one layer, in vectors.
//
// That of a norm sums over the pixels of u times those of v under each tap: it is weights that stand side by side in a
// vector, and a part of the image is unfolded at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/power_iteration_layer.h"

namespace iresnet_fast {

// Of the unfolded image of a gradient, nearly: how many values of a pixel stand together, and how many pixels.
constexpr int64_t kUnfolded = 144, kUnfoldedPixels = 1024;

// to[p][i][tap], in rows of `width`: what the taps of some channels meet at each pixel p of some rows of the result.
IRESNET_FAST_INLINE void unfold(const Direction& d, const float* planes, int64_t channels, int64_t first_row,
                                int64_t rows, int64_t width, float* to) {
  for (int64_t y = first_row; y < first_row + rows; ++y)
    for (int64_t x = 0; x < d.width; ++x, to += width) {
      float* next = to;
      for (int64_t i = 0; i < channels; ++i) {
        const float* from = planes + i * d.plane() + y * d.row() + x;
        for (int64_t ty = 0; ty < d.kh; ++ty, from += d.row(), next += d.kw)
          if (d.kw == 3)
            std::memcpy(next, from, 4 * sizeof(float));  // one more, which the next overwrites, in one instruction
          else
            std::copy_n(from, d.kw, next);
      }
    }
}

// A part of a gradient: `count` weights of some output channels, summed over the pixels of a part of the image.
struct GradientPart {
  const float *u, *unfolded, *grad;
  float* out;
  int64_t u_stride, weight_stride;  // from one output channel to the next
  int64_t pixels, width, count;
  bool is_first, is_last;  // of the parts of the image; between them the sum is in out
  float along, inverse;

  GradientPart of_columns(int64_t at, int64_t most) const {
    GradientPart part = *this;
    part.unfolded += at, part.grad += at, part.out += at;
    part.count = std::min(most, count - at);
    return part;
  }
};

// out = (grad - along * sum) * inverse of Channels rows of the weight, with the sum of u's pixels times the unfolded
// image's columns.
template <typename F, int Channels, int Vectors>
IRESNET_FAST_INLINE void differentiate_tile(const GradientPart& part) {
  constexpr int64_t kTile = Vectors * kWide<F>;
  F sum[Channels][Vectors];
#pragma GCC unroll 8
  for (int m = 0; m < Channels; ++m) {
    float tile[kTile] = {};
    if (!part.is_first) std::copy_n(part.out + m * part.weight_stride, part.count, tile);
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) sum[m][v] = load<F>(tile + v * kWide<F>);
  }
  const float *u = part.u, *from = part.unfolded;
  for (int64_t p = 0; p < part.pixels; ++p, from += part.width) {
    F x[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) x[v] = load<F>(from + v * kWide<F>);
#pragma GCC unroll 8
    for (int m = 0; m < Channels; ++m) {
      const float factor = u[m * part.u_stride + p];
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sum[m][v] += factor * x[v];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < Channels; ++m) {
    const float* grad = part.grad + m * part.weight_stride;
    float* out = part.out + m * part.weight_stride;
    if (part.is_last && part.count == kTile) {
      for (int v = 0; v < Vectors; ++v)
        store(out + v * kWide<F>, (load<F>(grad + v * kWide<F>) - part.along * sum[m][v]) * part.inverse);
    } else {
      float tile[kTile];
      for (int v = 0; v < Vectors; ++v) store(tile + v * kWide<F>, sum[m][v]);
      for (int64_t at = 0; at < part.count; ++at)
        out[at] = part.is_last ? (grad[at] - part.along * tile[at]) * part.inverse : tile[at];
    }
  }
}

template <typename F, int Channels>
IRESNET_FAST_INLINE void differentiate_channels(const GradientPart& part) {
  int64_t at = 0;
  for (; part.count - at > 2 * kWide<F>; at += kVectors * kWide<F>)
    differentiate_tile<F, Channels, 3>(part.of_columns(at, kVectors * kWide<F>));
  if (part.count - at > kWide<F>)
    differentiate_tile<F, Channels, 2>(part.of_columns(at, 2 * kWide<F>));
  else if (part.count > at)
    differentiate_tile<F, Channels, 1>(part.of_columns(at, kWide<F>));
}

// out = (G - 1{sigma > c} (<G, W> / c) grad sigma) / max(1, sigma / c), W normalised.
template <typename F>
IRESNET_FAST_INLINE void differentiate(const Layer& layer, const float* grad, const float* normalized, const float* u,
                                       const float* v, double sigma, double coeff, Scratch& scratch, float* out) {
  const float scale = scale_of(sigma, coeff);
  if (sigma <= coeff) {
    divide<F>(grad, scale, out, layer.weights());
    return;
  }
  const float along = static_cast<float>(dot<F>(grad, normalized, layer.weights()) / coeff);
  const int64_t taps = layer.taps();
  if (layer.is_matrix()) {
    for (int64_t o = 0; o < layer.c_out; ++o) {
      const float factor = along * u[o];
      for (int64_t i = 0; i < layer.c_in; ++i) {
        const int64_t at = o * layer.c_in + i;
        out[at] = (grad[at] - factor * v[i]) / scale;
      }
    }
    return;
  }
  const Direction d = forward_of(layer);
  const float* planes = scratch.planes.fill(v, d.from, d.height_from, d.width_from, d.pad_h, d.pad_w);
  const int64_t together = std::clamp<int64_t>(kUnfolded / taps, 1, layer.c_in), stride = layer.c_in * taps;
  const int64_t width = (together * taps + kWide<F> - 1) / kWide<F> * kWide<F>;
  const int64_t rows = std::clamp<int64_t>(kUnfoldedPixels / d.width, 1, d.height);
  scratch.unfolded.assign(rows * d.width * width + kVectors * kWide<F>, 0.0f);
  for (int64_t i = 0; i < layer.c_in; i += together)
    for (int64_t y = 0; y < d.height; y += rows) {
      const int64_t channels = std::min(together, layer.c_in - i), here = std::min(rows, d.height - y);
      unfold(d, planes + i * d.plane(), channels, y, here, width, scratch.unfolded.data());
      GradientPart part{u + y * d.width,
                        scratch.unfolded.data(),
                        grad + i * taps,
                        out + i * taps,
                        d.height * d.width,
                        stride,
                        here * d.width,
                        width,
                        channels * taps,
                        y == 0,
                        y + here == d.height,
                        along,
                        1 / scale};
      int64_t o = 0;
      const auto step = [&](int64_t by) IRESNET_FAST_INLINED {
        o += by;
        part.u += by * part.u_stride;
        part.grad += by * stride;
        part.out += by * stride;
      };
      for (; o + kChannels<F> <= layer.c_out; step(kChannels<F>)) differentiate_channels<F, kChannels<F>>(part);
      for (; o < layer.c_out; step(1)) differentiate_channels<F, 1>(part);
    }
}

}  // namespace iresnet_fast
