// Power iteration of one layer, in vectors.
//
// A convolution runs over padded planes, whose rows are Wp wide: with pixel p = y Wp + x every tap is an offset of p,
// so that tiles of channels by pixels stay in registers without an unfolded copy. The columns beyond the image are
// computed and dropped. The gradient of a norm sums over pixels: there it is weights that stand side by side in a
// vector, and a part of the image is unfolded at a time.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/floats.h"

namespace iresnet_fast {

// Sizes of a layer; a matrix has one pixel and one tap.
struct Layer {
  int64_t c_in, c_out, h_in, w_in, h_out, w_out, kh, kw, pad_h, pad_w;

  int64_t taps() const { return kh * kw; }
  int64_t weights() const { return c_out * c_in * taps(); }
  int64_t u_size() const { return c_out * h_out * w_out; }
  int64_t v_size() const { return c_in * h_in * w_in; }
  double cost() const { return static_cast<double>(weights()) * h_out * w_out; }
  bool is_matrix() const { return h_out * w_out * h_in * w_in * taps() == 1; }
};

// One direction of a layer's operator: W from v to u, or its adjoint.
struct Direction {
  int64_t from, to, height_from, width_from, height, width;  // channels, sizes of the images
  int64_t pad_h, pad_w, kh, kw;
  int64_t stride_to, stride_from;  // of the weight, in elements
  bool flipped;                    // taps in reverse

  int64_t row() const { return width_from + 2 * pad_w; }
  int64_t plane() const { return (height_from + 2 * pad_h) * row(); }
  int64_t pixels() const { return (height - 1) * row() + width; }  // of the result, with what is dropped between rows
};

inline Direction forward_of(const Layer& l) {
  return {l.c_in, l.c_out,           l.h_in,   l.w_in, l.h_out, l.w_out, l.pad_h, l.pad_w, l.kh,
          l.kw,   l.c_in * l.taps(), l.taps(), false};
}

inline Direction adjoint_of(const Layer& l) {
  return {l.c_out, l.c_in, l.h_out,  l.w_out,           l.h_in, l.w_in, l.kh - 1 - l.pad_h, l.kw - 1 - l.pad_w,
          l.kh,    l.kw,   l.taps(), l.c_in * l.taps(), true};
}

// Memory of a thread: padded planes, then room to read a tile beyond the last of them.
class Planes {
 public:
  float* fill(const float* image, int64_t channels, int64_t height, int64_t width, int64_t pad_h, int64_t pad_w) {
    const int64_t row = width + 2 * pad_w, plane = (height + 2 * pad_h) * row;
    memory_.assign(channels * plane + kSlack, 0.0f);
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t y = 0; y < height; ++y)
        std::memcpy(memory_.data() + c * plane + (y + pad_h) * row + pad_w, image + (c * height + y) * width,
                    width * sizeof(float));
    return memory_.data();
  }

 private:
  static constexpr int64_t kSlack = 128;  // two tiles of the widest vectors, and more
  std::vector<float> memory_;
};

// Scratch of a thread.
struct Scratch {
  Planes planes;
  std::vector<float> wide, image, unfolded;
};

// A tile of sums is so many channels by so many vectors: as many as the processor has room for.
template <typename F>
constexpr int kChannels = sizeof(F) == sizeof(Floats16) ? 8 : 4;
constexpr int kVectors = 3;
// out[m][0 .. count) = sum over channels and taps of weight * source, for Channels rows m; count pixels of a tile.
// Kernel: its side, where that is known ahead and the loops over taps unroll; else 0.
template <typename F, int Channels, int Kernel, int Vectors>
IRESNET_FAST_INLINE void convolve_tile(const Direction& d, const float* weight, const float* source, float* out,
                                       int64_t count) {
  const int64_t row = d.row(), plane = d.plane(), from = d.from;
  const int64_t kh = Kernel ? Kernel : d.kh, kw = Kernel ? Kernel : d.kw, taps = kh * kw;
  const int64_t next = d.stride_from, step = d.flipped ? -1 : 1;
  F sum[Channels][Vectors];
  const float* rows[Channels];
#pragma GCC unroll 8
  for (int m = 0; m < Channels; ++m) {
    rows[m] = weight + m * d.stride_to + (d.flipped ? taps - 1 : 0);
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) sum[m][v] = F{};
  }
  for (int64_t c = 0; c < from; ++c, source += plane) {
    int64_t at = c * next;
#pragma GCC unroll 4
    for (int64_t ty = 0; ty < kh; ++ty)
#pragma GCC unroll 4
      for (int64_t tx = 0; tx < kw; ++tx, at += step) {
        F x[Vectors];
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) x[v] = load<F>(source + ty * row + tx + v * kWide<F>);
#pragma GCC unroll 8
        for (int m = 0; m < Channels; ++m) {
          const float factor = rows[m][at];
#pragma GCC unroll 8
          for (int v = 0; v < Vectors; ++v) sum[m][v] += factor * x[v];
        }
      }
  }
  const int64_t stride = d.pixels();
#pragma GCC unroll 8
  for (int m = 0; m < Channels; ++m) {
    if (count == Vectors * kWide<F>) {
      for (int v = 0; v < Vectors; ++v) store(out + m * stride + v * kWide<F>, sum[m][v]);
    } else {
      float tile[Vectors * kWide<F>];
      for (int v = 0; v < Vectors; ++v) store(tile + v * kWide<F>, sum[m][v]);
      std::memcpy(out + m * stride, tile, count * sizeof(float));
    }
  }
}

template <typename F, int Channels, int Vectors>
IRESNET_FAST_INLINE void convolve_pixels(const Direction& d, const float* weight, const float* source, float* out,
                                         int64_t count) {
  if (d.kh == 3 && d.kw == 3)
    convolve_tile<F, Channels, 3, Vectors>(d, weight, source, out, count);
  else
    convolve_tile<F, Channels, 0, Vectors>(d, weight, source, out, count);
}

template <typename F, int Channels>
IRESNET_FAST_INLINE void convolve_channels(const Direction& d, const float* weight, const float* source, float* wide) {
  const int64_t pixels = d.pixels();
  int64_t p = 0;
  for (; pixels - p > 2 * kWide<F>; p += kVectors * kWide<F>)
    convolve_pixels<F, Channels, 3>(d, weight, source + p, wide + p,
                                    std::min<int64_t>(kVectors * kWide<F>, pixels - p));
  if (pixels - p > kWide<F>)
    convolve_pixels<F, Channels, 2>(d, weight, source + p, wide + p, pixels - p);
  else if (pixels > p)
    convolve_pixels<F, Channels, 1>(d, weight, source + p, wide + p, pixels - p);
}

// wide: (to, pixels()), with what is dropped between rows.
template <typename F>
IRESNET_FAST_INLINE void convolve(const Direction& d, const float* weight, const float* source, float* wide) {
  int64_t m = 0;
  for (; m + kChannels<F> <= d.to; m += kChannels<F>)
    convolve_channels<F, kChannels<F>>(d, weight + m * d.stride_to, source, wide + m * d.pixels());
  for (; m < d.to; ++m) convolve_channels<F, 1>(d, weight + m * d.stride_to, source, wide + m * d.pixels());
}

// W x for rows of `columns` weights.
template <typename F>
IRESNET_FAST_INLINE void multiply(const float* weight, int64_t rows, int64_t columns, const float* x, float* out) {
  for (int64_t i = 0; i < rows; ++i) {
    const float* w = weight + i * columns;
    F sum[2] = {F{}, F{}};
    int64_t j = 0;
    for (; j + 2 * kWide<F> <= columns; j += 2 * kWide<F>) {
      sum[0] += load<F>(w + j) * load<F>(x + j);
      sum[1] += load<F>(w + j + kWide<F>) * load<F>(x + j + kWide<F>);
    }
    float result = total(sum[0] + sum[1]);
    for (; j < columns; ++j) result += w[j] * x[j];
    out[i] = result;
  }
}

// W^T x.
template <typename F>
IRESNET_FAST_INLINE void multiply_adjoint(const float* weight, int64_t rows, int64_t columns, const float* x,
                                          float* out) {
  std::fill(out, out + columns, 0.0f);
  for (int64_t i = 0; i < rows; ++i) {
    const float* w = weight + i * columns;
    const float factor = x[i];
    int64_t j = 0;
    for (; j + kWide<F> <= columns; j += kWide<F>) store(out + j, load<F>(out + j) + factor * load<F>(w + j));
    for (; j < columns; ++j) out[j] += factor * w[j];
  }
}

// image = operator of one direction times source, of the direction's sizes.
template <typename F>
IRESNET_FAST_INLINE void apply(const Layer& layer, bool adjoint, const float* weight, const float* source,
                               Scratch& scratch, float* image) {
  if (layer.is_matrix()) {
    adjoint ? multiply_adjoint<F>(weight, layer.c_out, layer.c_in, source, image)
            : multiply<F>(weight, layer.c_out, layer.c_in, source, image);
    return;
  }
  const Direction d = adjoint ? adjoint_of(layer) : forward_of(layer);
  const float* planes = scratch.planes.fill(source, d.from, d.height_from, d.width_from, d.pad_h, d.pad_w);
  scratch.wide.resize(d.to * d.pixels());
  convolve<F>(d, weight, planes, scratch.wide.data());
  for (int64_t c = 0; c < d.to; ++c)
    for (int64_t y = 0; y < d.height; ++y)
      std::memcpy(image + (c * d.height + y) * d.width, scratch.wide.data() + c * d.pixels() + y * d.row(),
                  d.width * sizeof(float));
}

// max(1, sigma / c), NaN where sigma is not finite.
inline float scale_of(double sigma, double coeff) {
  const double ratio = sigma / coeff;
  if (ratio <= 1) return 1;
  return ratio < std::numeric_limits<double>::infinity() ? static_cast<float>(ratio) : NAN;
}

// u and v come in as the vectors to start from, and go out as those that were found.
template <typename F>
IRESNET_FAST_INLINE void iterate(const Layer& layer, const float* weight, double coeff, int64_t n, Scratch& scratch,
                                 float* u, float* v, float* normalized, float* sigma) {
  double estimate = 0;
  std::vector<float>& image = scratch.image;
  for (int64_t half = 0; half < 2 * n; ++half) {
    const bool adjoint = half % 2;
    const int64_t size = adjoint ? layer.v_size() : layer.u_size();
    image.resize(size);
    apply<F>(layer, adjoint, weight, adjoint ? u : v, scratch, image.data());
    estimate = norm_of<F>(image.data(), size);
    // A zero or non-finite vector is not taken: the one before stays.
    const float norm = static_cast<float>(estimate);
    if (norm > 0 && std::isfinite(norm)) divide<F>(image.data(), norm, adjoint ? v : u, size);
  }
  if (n == 0) {
    image.resize(layer.u_size());
    apply<F>(layer, false, weight, v, scratch, image.data());
    estimate = dot<F>(u, image.data(), layer.u_size());
  }
  // <u, W v> = |W^T u| once v is its direction.
  *sigma = static_cast<float>(estimate);
  divide<F>(weight, scale_of(estimate, coeff), normalized, layer.weights());
}

}  // namespace iresnet_fast
