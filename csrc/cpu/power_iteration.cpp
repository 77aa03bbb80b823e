// Power iteration and soft normalisation of many layers at once: a layer per thread, the largest first.
//
// A convolution runs over padded planes, whose rows are Wp wide: with pixel p = y Wp + x every tap is an offset of p,
// so that tiles of channels by pixels stay in registers without an unfolded copy. The columns beyond the image are
// computed and dropped.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "common/hermitian.h"
#include "cpu/dispatch.h"

namespace iresnet_fast {
namespace {

constexpr int kWide = 8;      // floats of a vector
constexpr int kVectors = 3;   // of a tile's pixels
constexpr int kChannels = 4;  // of a tile
constexpr int kTaps = 3;      // whose gradients are summed together
constexpr int kTile = kWide * kVectors;
typedef float Floats __attribute__((vector_size(kWide * sizeof(float))));
typedef float Unaligned __attribute__((vector_size(kWide * sizeof(float)), aligned(sizeof(float))));

IRESNET_FAST_INLINE Floats load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
IRESNET_FAST_INLINE void store(float* to, Floats x) { *reinterpret_cast<Unaligned*>(to) = x; }
constexpr Floats kZero{};
IRESNET_FAST_INLINE float total(Floats x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }

// The sums of four vectors, in the first four places.
IRESNET_FAST_INLINE Floats totals(Floats a, Floats b, Floats c, Floats d) {
  const Floats ab = __builtin_shufflevector(a, b, 0, 8, 2, 10, 4, 12, 6, 14) +
                    __builtin_shufflevector(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
  const Floats cd = __builtin_shufflevector(c, d, 0, 8, 2, 10, 4, 12, 6, 14) +
                    __builtin_shufflevector(c, d, 1, 9, 3, 11, 5, 13, 7, 15);
  const Floats halves = __builtin_shufflevector(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) +
                        __builtin_shufflevector(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
  return halves + __builtin_shufflevector(halves, halves, 4, 5, 6, 7, 0, 1, 2, 3);
}

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

Direction forward_of(const Layer& l) {
  return {l.c_in, l.c_out,           l.h_in,   l.w_in, l.h_out, l.w_out, l.pad_h, l.pad_w, l.kh,
          l.kw,   l.c_in * l.taps(), l.taps(), false};
}

Direction adjoint_of(const Layer& l) {
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
  static constexpr int64_t kSlack = 2 * kTile;
  std::vector<float> memory_;
};

// out[m][0 .. count) = sum over channels and taps of weight * source, for Channels rows m; count pixels of a tile.
// Kernel: its side, where that is known ahead and the loops over taps unroll; else 0.
template <int Channels, int Kernel>
IRESNET_FAST_INLINE void convolve_tile(const Direction& d, const float* weight, const float* source, float* out,
                                       int64_t count) {
  const int64_t row = d.row(), plane = d.plane(), from = d.from;
  const int64_t kh = Kernel ? Kernel : d.kh, kw = Kernel ? Kernel : d.kw, taps = kh * kw;
  const int64_t next = d.stride_from, step = d.flipped ? -1 : 1;
  Floats sum[Channels][kVectors];
  const float* rows[Channels];
#pragma GCC unroll 8
  for (int m = 0; m < Channels; ++m) {
    rows[m] = weight + m * d.stride_to + (d.flipped ? taps - 1 : 0);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[m][v] = kZero;
  }
  for (int64_t c = 0; c < from; ++c, source += plane) {
    int64_t at = c * next;
#pragma GCC unroll 4
    for (int64_t ty = 0; ty < kh; ++ty)
#pragma GCC unroll 4
      for (int64_t tx = 0; tx < kw; ++tx, at += step) {
        Floats x[kVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) x[v] = load(source + ty * row + tx + v * kWide);
#pragma GCC unroll 8
        for (int m = 0; m < Channels; ++m) {
          const float factor = rows[m][at];
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) sum[m][v] += factor * x[v];
        }
      }
  }
  const int64_t stride = d.pixels();
#pragma GCC unroll 8
  for (int m = 0; m < Channels; ++m) {
    if (count == kTile) {
      for (int v = 0; v < kVectors; ++v) store(out + m * stride + v * kWide, sum[m][v]);
    } else {
      float tile[kTile];
      for (int v = 0; v < kVectors; ++v) store(tile + v * kWide, sum[m][v]);
      std::memcpy(out + m * stride, tile, count * sizeof(float));
    }
  }
}

template <int Channels>
IRESNET_FAST_INLINE void convolve_channels(const Direction& d, const float* weight, const float* source, float* wide) {
  const int64_t pixels = d.pixels();
  for (int64_t p = 0; p < pixels; p += kTile) {
    const int64_t count = std::min<int64_t>(kTile, pixels - p);
    if (d.kh == 3 && d.kw == 3)
      convolve_tile<Channels, 3>(d, weight, source + p, wide + p, count);
    else
      convolve_tile<Channels, 0>(d, weight, source + p, wide + p, count);
  }
}

// wide: (to, pixels()), with what is dropped between rows.
IRESNET_FAST_INLINE void convolve(const Direction& d, const float* weight, const float* source, float* wide) {
  int64_t m = 0;
  for (; m + kChannels <= d.to; m += kChannels)
    convolve_channels<kChannels>(d, weight + m * d.stride_to, source, wide + m * d.pixels());
  for (; m < d.to; ++m) convolve_channels<1>(d, weight + m * d.stride_to, source, wide + m * d.pixels());
}

// W x for rows of `columns` weights.
IRESNET_FAST_INLINE void multiply(const float* weight, int64_t rows, int64_t columns, const float* x, float* out) {
  for (int64_t i = 0; i < rows; ++i) {
    const float* w = weight + i * columns;
    Floats sum[2] = {kZero, kZero};
    int64_t j = 0;
    for (; j + 2 * kWide <= columns; j += 2 * kWide) {
      sum[0] += load(w + j) * load(x + j);
      sum[1] += load(w + j + kWide) * load(x + j + kWide);
    }
    float result = total(sum[0] + sum[1]);
    for (; j < columns; ++j) result += w[j] * x[j];
    out[i] = result;
  }
}

// W^T x.
IRESNET_FAST_INLINE void multiply_adjoint(const float* weight, int64_t rows, int64_t columns, const float* x,
                                          float* out) {
  std::fill(out, out + columns, 0.0f);
  for (int64_t i = 0; i < rows; ++i) {
    const float* w = weight + i * columns;
    const float factor = x[i];
    int64_t j = 0;
    for (; j + kWide <= columns; j += kWide) store(out + j, load(out + j) + factor * load(w + j));
    for (; j < columns; ++j) out[j] += factor * w[j];
  }
}

IRESNET_FAST_INLINE double dot(const float* a, const float* b, int64_t n) {
  constexpr int64_t kBlock = 512;  // summed in float before it is added in double
  double result = 0;
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t end = std::min(n, start + kBlock);
    Floats sum[2] = {kZero, kZero};
    int64_t i = start;
    for (; i + 2 * kWide <= end; i += 2 * kWide) {
      sum[0] += load(a + i) * load(b + i);
      sum[1] += load(a + i + kWide) * load(b + i + kWide);
    }
    float rest = total(sum[0] + sum[1]);
    for (; i < end; ++i) rest += a[i] * b[i];
    result += rest;
  }
  return result;
}

// The norm, in double where squares leave the range of float.
IRESNET_FAST_INLINE double norm_of(const float* x, int64_t n) {
  double squares = dot(x, x, n);
  if (!(squares > 1e-30 && squares < 1e30)) {
    squares = 0;
    for (int64_t i = 0; i < n; ++i) squares += static_cast<double>(x[i]) * x[i];
  }
  return std::sqrt(squares);
}

// to = from / divisor
IRESNET_FAST_INLINE void divide(const float* from, float divisor, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + kWide <= n; i += kWide) store(to + i, load(from + i) / divisor);
  for (; i < n; ++i) to[i] = from[i] / divisor;
}

// Scratch of a thread.
struct Scratch {
  Planes planes;
  std::vector<float> wide, image;
};

// image = operator of one direction times source, of the direction's sizes.
IRESNET_FAST_INLINE void apply(const Layer& layer, bool adjoint, const float* weight, const float* source,
                               Scratch& scratch, float* image) {
  if (layer.is_matrix()) {
    adjoint ? multiply_adjoint(weight, layer.c_out, layer.c_in, source, image)
            : multiply(weight, layer.c_out, layer.c_in, source, image);
    return;
  }
  const Direction d = adjoint ? adjoint_of(layer) : forward_of(layer);
  const float* planes = scratch.planes.fill(source, d.from, d.height_from, d.width_from, d.pad_h, d.pad_w);
  scratch.wide.resize(d.to * d.pixels());
  convolve(d, weight, planes, scratch.wide.data());
  for (int64_t c = 0; c < d.to; ++c)
    for (int64_t y = 0; y < d.height; ++y)
      std::memcpy(image + (c * d.height + y) * d.width, scratch.wide.data() + c * d.pixels() + y * d.row(),
                  d.width * sizeof(float));
}

// max(1, sigma / c), NaN where sigma is not finite.
float scale_of(double sigma, double coeff) {
  const double ratio = sigma / coeff;
  if (ratio <= 1) return 1;
  return ratio < std::numeric_limits<double>::infinity() ? static_cast<float>(ratio) : NAN;
}

// u and v come in as the vectors to start from, and go out as those that were found.
IRESNET_FAST_INLINE void iterate(const Layer& layer, const float* weight, double coeff, int64_t n, Scratch& scratch,
                                 float* u, float* v, float* normalized, float* sigma) {
  double estimate = 0;
  std::vector<float>& image = scratch.image;
  for (int64_t half = 0; half < 2 * n; ++half) {
    const bool adjoint = half % 2;
    const int64_t size = adjoint ? layer.v_size() : layer.u_size();
    image.resize(size);
    apply(layer, adjoint, weight, adjoint ? u : v, scratch, image.data());
    estimate = norm_of(image.data(), size);
    // A zero or non-finite vector is not taken: the one before stays.
    const float norm = static_cast<float>(estimate);
    if (norm > 0 && std::isfinite(norm)) divide(image.data(), norm, adjoint ? v : u, size);
  }
  if (n == 0) {
    image.resize(layer.u_size());
    apply(layer, false, weight, v, scratch, image.data());
    estimate = dot(u, image.data(), layer.u_size());
  }
  // <u, W v> = |W^T u| once v is its direction.
  *sigma = static_cast<float>(estimate);
  divide(weight, scale_of(estimate, coeff), normalized, layer.weights());
}

// sum[t][m] = sum over pixels of rows[m] * source[t].
IRESNET_FAST_INLINE void correlate(const float* const* rows, const float* const* source, int64_t length,
                                   Floats (&sum)[kTaps]) {
  Floats held[kChannels][kTaps];
#pragma GCC unroll 8
  for (int m = 0; m < kChannels; ++m)
#pragma GCC unroll 8
    for (int t = 0; t < kTaps; ++t) held[m][t] = kZero;
  for (int64_t p = 0; p < length; p += kWide) {
    Floats x[kTaps];
#pragma GCC unroll 8
    for (int t = 0; t < kTaps; ++t) x[t] = load(source[t] + p);
#pragma GCC unroll 8
    for (int m = 0; m < kChannels; ++m) {
      const Floats y = load(rows[m] + p);
#pragma GCC unroll 8
      for (int t = 0; t < kTaps; ++t) held[m][t] += y * x[t];
    }
  }
  static_assert(kChannels == 4);
#pragma GCC unroll 8
  for (int t = 0; t < kTaps; ++t) sum[t] = totals(held[0][t], held[1][t], held[2][t], held[3][t]);
}

// out = (G - 1{sigma > c} (<G, W> / c) grad sigma) / max(1, sigma / c), W normalised.
IRESNET_FAST_INLINE void differentiate(const Layer& layer, const float* grad, const float* normalized, const float* u,
                                       const float* v, double sigma, double coeff, Scratch& scratch, float* out) {
  const float scale = scale_of(sigma, coeff);
  if (sigma <= coeff) {
    divide(grad, scale, out, layer.weights());
    return;
  }
  const float along = static_cast<float>(dot(grad, normalized, layer.weights()) / coeff);
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
  const float inverse = 1 / scale;
  const Direction d = forward_of(layer);
  const int64_t row = d.row(), pixels = d.pixels(), length = (pixels + kWide - 1) / kWide * kWide;
  const float* planes = scratch.planes.fill(v, d.from, d.height_from, d.width_from, d.pad_h, d.pad_w);
  // u in rows of the planes, zero between the images' rows.
  scratch.wide.assign(layer.c_out * length, 0.0f);
  for (int64_t o = 0; o < layer.c_out; ++o)
    for (int64_t y = 0; y < layer.h_out; ++y)
      std::memcpy(scratch.wide.data() + o * length + y * row, u + (o * layer.h_out + y) * layer.w_out,
                  layer.w_out * sizeof(float));
  for (int64_t o = 0; o < layer.c_out; o += kChannels) {
    const int64_t channels = std::min<int64_t>(kChannels, layer.c_out - o);
    const float* rows[kChannels];
    for (int64_t m = 0; m < kChannels; ++m) rows[m] = scratch.wide.data() + (o + std::min(m, channels - 1)) * length;
    for (int64_t i = 0; i < layer.c_in; ++i)
      for (int64_t tap = 0; tap < taps; tap += kTaps) {
        const int64_t together = std::min<int64_t>(kTaps, taps - tap);
        const float* source[kTaps];
        for (int64_t t = 0; t < kTaps; ++t) {
          const int64_t here = tap + std::min(t, together - 1);
          source[t] = planes + i * d.plane() + here / layer.kw * row + here % layer.kw;
        }
        Floats sum[kTaps];
        correlate(rows, source, length, sum);
        for (int64_t m = 0; m < channels; ++m)
          for (int64_t t = 0; t < together; ++t) {
            const int64_t at = ((o + m) * layer.c_in + i) * taps + tap + t;
            out[at] = (grad[at] - along * sum[t][m]) * inverse;
          }
      }
  }
}

IRESNET_FAST_DISPATCH(void, iterate_layer,
                      (const Layer& layer, const float* weight, double coeff, int64_t n, Scratch& scratch, float* u,
                       float* v, float* normalized, float* sigma),
                      iterate(layer, weight, coeff, n, scratch, u, v, normalized, sigma))
IRESNET_FAST_DISPATCH(void, differentiate_layer,
                      (const Layer& layer, const float* grad, const float* normalized, const float* u, const float* v,
                       double sigma, double coeff, Scratch& scratch, float* out),
                      differentiate(layer, grad, normalized, u, v, sigma, coeff, scratch, out))

// The layers, ten numbers each, and where each starts in the flat tensors.
struct Layers {
  std::vector<Layer> all;
  std::vector<int64_t> weight, u, v;

  explicit Layers(at::IntArrayRef sizes, at::ArrayRef<double> coeff) {
    TORCH_CHECK(sizes.size() % 10 == 0 && sizes.size() / 10 == coeff.size() && !coeff.empty(),
                "sizes needs ten numbers for each of the ", coeff.size(), " layers, got ", sizes.size());
    int64_t at_weight = 0, at_u = 0, at_v = 0;
    for (size_t i = 0; i + 10 <= sizes.size(); i += 10) {
      const int64_t* s = sizes.data() + i;
      all.push_back({s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9]});
      TORCH_CHECK(*std::min_element(s, s + 8) > 0 && 0 <= s[8] && s[8] < s[6] && 0 <= s[9] && s[9] < s[7] &&
                      s[4] == s[2] + 2 * s[8] - s[6] + 1 && s[5] == s[3] + 2 * s[9] - s[7] + 1,
                  "sizes of layer ", all.size() - 1, " are no convolution: ", sizes.slice(i, 10));
      weight.push_back(at_weight), u.push_back(at_u), v.push_back(at_v);
      at_weight += all.back().weights(), at_u += all.back().u_size(), at_v += all.back().v_size();
    }
    weight.push_back(at_weight), u.push_back(at_u), v.push_back(at_v);
  }

  // Every layer once, by whichever thread is free; the largest first. Products: of a layer's operator with a vector.
  template <typename Work>
  void in_parallel(int64_t products, const Work& work) const {
    constexpr double kWorthThreads = 1e7;  // multiplications, below which waking them takes longer
    double cost = 0;
    for (const Layer& layer : all) cost += layer.cost();
    if (cost * products < kWorthThreads) {
      Scratch scratch;
      for (size_t item = 0; item < all.size(); ++item) work(item, scratch);
      return;
    }
    std::vector<size_t> order(all.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return all[a].cost() > all[b].cost(); });
    std::atomic<size_t> next{0};
    at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) {
        Scratch scratch;
        for (size_t item = next++; item < order.size(); item = next++) work(order[item], scratch);
      }
    });
  }
};

void check_list(const char* name, at::TensorList list, const std::vector<int64_t>& starts) {
  TORCH_CHECK(list.size() + 1 == starts.size(), name, " needs ", starts.size() - 1, " tensors, got ", list.size());
  for (size_t i = 0; i < list.size(); ++i)
    TORCH_CHECK(list[i].numel() == starts[i + 1] - starts[i] && list[i].scalar_type() == at::kFloat, name, " ", i,
                " must have ", starts[i + 1] - starts[i], " float32 values");
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> power_iteration(at::TensorList weights, at::TensorList u,
                                                                           at::TensorList v, at::ArrayRef<double> coeff,
                                                                           at::IntArrayRef sizes, int64_t n) {
  const Layers layers(sizes, coeff);
  check_list("weights", weights, layers.weight);
  check_list("u", u, layers.u);
  check_list("v", v, layers.v);
  const auto options = weights[0].options();
  const at::Tensor normalized = at::empty({layers.weight.back()}, options),
                   new_u = at::empty({layers.u.back()}, options), new_v = at::empty({layers.v.back()}, options);
  const at::Tensor sigma = at::empty({static_cast<int64_t>(weights.size())}, options);
  float* to_weight = normalized.data_ptr<float>();
  float* to_u = new_u.data_ptr<float>();
  float* to_v = new_v.data_ptr<float>();
  float* to_sigma = sigma.data_ptr<float>();
  std::vector<at::Tensor> kept;  // contiguous copies, where they are needed
  std::vector<const float*> from;
  for (size_t i = 0; i < weights.size(); ++i) {
    kept.push_back(weights[i].contiguous());
    from.push_back(kept.back().const_data_ptr<float>());
    for (const auto& [list, to] : {std::pair{u[i], to_u + layers.u[i]}, std::pair{v[i], to_v + layers.v[i]}})
      std::memcpy(to, list.contiguous().const_data_ptr<float>(), list.numel() * sizeof(float));
  }
  layers.in_parallel(std::max<int64_t>(1, 2 * n), [&](size_t i, Scratch& scratch) {
    IRESNET_FAST_CHOOSE(iterate_layer, (layers.all[i], from[i], coeff[i], n, scratch, to_u + layers.u[i],
                                        to_v + layers.v[i], to_weight + layers.weight[i], to_sigma + i));
  });
  return {normalized, new_u, new_v, sigma};
}

at::Tensor power_iteration_backward(at::TensorList grads, const at::Tensor& normalized, const at::Tensor& u,
                                    const at::Tensor& v, const at::Tensor& sigma, at::ArrayRef<double> coeff,
                                    at::IntArrayRef sizes) {
  const Layers layers(sizes, coeff);
  check_list("grads", grads, layers.weight);
  const auto check = [](const char* name, const at::Tensor& flat, int64_t size) {
    TORCH_CHECK(flat.numel() == size && flat.is_contiguous() && flat.scalar_type() == at::kFloat, name, " must be ",
                size, " contiguous float32 values");
  };
  check("normalized", normalized, layers.weight.back());
  check("u", u, layers.u.back());
  check("v", v, layers.v.back());
  check("sigma", sigma, static_cast<int64_t>(layers.all.size()));
  const at::Tensor out = at::empty({layers.weight.back()}, normalized.options());
  float* to = out.data_ptr<float>();
  const float* weight = normalized.const_data_ptr<float>();
  const float* from_u = u.const_data_ptr<float>();
  const float* from_v = v.const_data_ptr<float>();
  const float* norms = sigma.const_data_ptr<float>();
  std::vector<at::Tensor> kept;
  for (const at::Tensor& grad : grads) kept.push_back(grad.contiguous());
  layers.in_parallel(1, [&](size_t i, Scratch& scratch) {
    const int64_t at = layers.weight[i];
    IRESNET_FAST_CHOOSE(differentiate_layer,
                        (layers.all[i], kept[i].const_data_ptr<float>(), weight + at, from_u + layers.u[i],
                         from_v + layers.v[i], norms[i], coeff[i], scratch, to + at));
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(iresnet_fast, CPU, m) {
  m.impl("power_iteration_cpu", &power_iteration);
  m.impl("power_iteration_backward_cpu", &power_iteration_backward);
}

}  // namespace iresnet_fast
