// A multilayer perceptron of rows that stand in the lanes of vectors: weights times vectors, activations of vectors.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include "cpu/activations.h"
#include "cpu/packed.h"

namespace iresnet_fast::mlp {

constexpr int kVectors = 3;  // of rows
constexpr int kTile = 4;     // outputs of a layer that are summed together

// P below is a vector of T, the type of the samples.
template <typename T, int kBytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes)));
};
template <typename P>
constexpr int kWide = sizeof(P) / sizeof(Element<P>);
template <typename P>
constexpr int kLanes = kVectors * kWide<P>;

constexpr int64_t padded(int64_t features) { return (features + kTile - 1) / kTile * kTile; }

// A layer's weights by tiles of outputs, so that they are read in order; zeros fill the last tile.
template <typename T>
struct Layer {
  int64_t in, out;
  Packed<T> weights, bias;

  Layer(const at::Tensor& weight, const std::optional<at::Tensor>& offset)
      : in(weight.size(1)), out(weight.size(0)), weights(in * padded(out)), bias(padded(out)) {
    const at::Tensor dense = weight.contiguous();
    const T* from = dense.const_data_ptr<T>();
    for (int64_t o = 0; o < padded(out); ++o)
      for (int64_t i = 0; i < in; ++i)
        weights[(o / kTile * in + i) * kTile + o % kTile] = o < out ? from[o * in + i] : T(0);
    std::fill(bias.data(), bias.data() + padded(out), T(0));
    if (offset) {
      const at::Tensor values = offset->contiguous();
      std::copy_n(values.const_data_ptr<T>(), out, bias.data());
    }
  }
};

// Activation, layer, activation, layer, ..., activation.
template <typename T>
struct Branch {
  std::vector<Layer<T>> layers;
  std::vector<Activation> activations;
  std::vector<T> parameters;  // two of each activation
  int64_t features, widest;

  double operations() const {
    double sum = 0;
    for (const auto& layer : layers) sum += 2.0 * layer.in * layer.out;
    return sum;
  }
};

template <typename P>
IRESNET_FAST_INLINE P load(const Element<P>* from) {
  return *reinterpret_cast<const P*>(from);
}
template <typename P>
IRESNET_FAST_INLINE void store(Element<P>* to, P x) {
  *reinterpret_cast<P*>(to) = x;
}

template <typename P, int Vectors>
IRESNET_FAST_INLINE void apply(const Layer<Element<P>>& layer, const Element<P>* from, Element<P>* to) {
  for (int64_t o = 0; o < layer.out; o += kTile) {
    const Element<P>* weight = layer.weights.data() + o * layer.in;
    const Element<P>* bias = layer.bias.data() + o;
    P sum[kTile][Vectors];
#pragma GCC unroll 8
    for (int m = 0; m < kTile; ++m)
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sum[m][v] = P{} + bias[m];
    const Element<P>* x = from;
    for (int64_t i = 0; i < layer.in; ++i, x += kLanes<P>, weight += kTile) {
      P value[Vectors];
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) value[v] = load<P>(x + v * kWide<P>);
#pragma GCC unroll 8
      for (int m = 0; m < kTile; ++m)
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) sum[m][v] += weight[m] * value[v];
    }
#pragma GCC unroll 8
    for (int m = 0; m < kTile; ++m)
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) store(to + (o + m) * kLanes<P> + v * kWide<P>, sum[m][v]);
  }
}

template <typename P, int Vectors, Activation kind>
IRESNET_FAST_INLINE void activate_all(const Element<P>* parameters, int64_t features, Element<P>* values) {
  for (int64_t i = 0; i < features; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      const int64_t at = i * kLanes<P> + v * kWide<P>;
      store(values + at, activate<kind>(load<P>(values + at), parameters[0], parameters[1]));
    }
}

// Feature i with feature i + half: the larger first.
template <typename P, int Vectors>
IRESNET_FAST_INLINE void sort_pairs(int64_t features, Element<P>* values) {
  const int64_t half = features / 2 * kLanes<P>;
  for (int64_t i = 0; i < features / 2; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      const int64_t at = i * kLanes<P> + v * kWide<P>;
      const P a = load<P>(values + at), b = load<P>(values + half + at);
      store(values + at, (a > b) | (a != a) ? a : b);
      store(values + half + at, (a < b) | (a != a) ? a : b);
    }
}

template <typename P, int Vectors>
IRESNET_FAST_INLINE void activate_all(Activation kind, const Element<P>* parameters, int64_t features,
                                      Element<P>* values) {
  switch (kind) {
    case Activation::identity:
      break;
    case Activation::relu:
      activate_all<P, Vectors, Activation::relu>(parameters, features, values);
      break;
    case Activation::elu:
      activate_all<P, Vectors, Activation::elu>(parameters, features, values);
      break;
    case Activation::softplus:
      activate_all<P, Vectors, Activation::softplus>(parameters, features, values);
      break;
    case Activation::tanh:
      activate_all<P, Vectors, Activation::tanh>(parameters, features, values);
      break;
    case Activation::lipswish:
      activate_all<P, Vectors, Activation::lipswish>(parameters, features, values);
      break;
    case Activation::maxmin:
      sort_pairs<P, Vectors>(features, values);
      break;
  }
}

// g(x) of the first Vectors vectors, in one of the two buffers.
template <typename P, int Vectors>
IRESNET_FAST_INLINE const Element<P>* evaluate(const Branch<Element<P>>& branch, const Element<P>* x, Element<P>* one,
                                               Element<P>* other) {
  using T = Element<P>;
  const T* from = x;
  if (branch.activations[0] != Activation::identity) {
    std::copy_n(x, branch.features * kLanes<P>, one);
    activate_all<P, Vectors>(branch.activations[0], branch.parameters.data(), branch.features, one);
    from = one;
  }
  for (size_t i = 0; i < branch.layers.size(); ++i) {
    T* to = from == other ? one : other;
    apply<P, Vectors>(branch.layers[i], from, to);
    activate_all<P, Vectors>(branch.activations[i + 1], branch.parameters.data() + 2 * (i + 1), branch.layers[i].out,
                             to);
    from = to;
  }
  return from;
}

// Unit roundoff of double precision, and a little more for the rounding of the bounds themselves; rounding of an
// activation, in units of its value and its argument: the formulas of activations.h lose less than 4.
constexpr double kUnit = 1.001 * 0x1p-53, kElementary = 8;
// Squares of smaller numbers vanish, and norms with them: what they leave out.
constexpr double kTiny = 1e-150;

// What bounds the rounding of a branch: of each layer a norm, that of its absolute values, and that of its bias.
struct LayerNorms {
  std::vector<double> norm, sums, offset;
};

// Euclidean norms of the rows in the lanes.
template <typename P, int Vectors>
IRESNET_FAST_INLINE void row_norms(const double* values, int64_t features, P* norms) {
  P squares[Vectors] = {};
  for (int64_t i = 0; i < features; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      const P x = load<P>(values + i * kLanes<P> + v * kWide<P>);
      squares[v] += x * x;
    }
  for (int v = 0; v < Vectors; ++v)
    for (int lane = 0; lane < kWide<P>; ++lane) norms[v][lane] = std::sqrt(squares[v][lane]);
}

// How far softplus is from what it stands for: beyond its threshold it is the identity.
template <typename P, int Vectors>
IRESNET_FAST_INLINE void add_jumps(const double* parameters, const double* values, int64_t features, P* errors) {
  const double beta = parameters[0], threshold = parameters[1];
  const double jump = std::log1p(std::exp(-threshold)) / std::abs(beta);
  for (int lane = 0; lane < Vectors * kWide<P>; ++lane) {
    int64_t count = 0;
    for (int64_t i = 0; i < features; ++i) count += beta * values[i * kLanes<P> + lane] > threshold - 1;
    errors[lane / kWide<P>][lane % kWide<P>] += jump * std::sqrt(static_cast<double>(count));
  }
}

// An activation, and the bound of the error of its values; sizes are the norms of the values, before and after.
template <typename P, int Vectors>
IRESNET_FAST_INLINE void activate_bounding(Activation kind, const double* parameters, int64_t features, double* values,
                                           P* sizes, P* errors) {
  if (kind == Activation::identity) return;
  if (kind == Activation::softplus) add_jumps<P, Vectors>(parameters, values, features, errors);
  activate_all<P, Vectors>(kind, parameters, features, values);
  P after[Vectors];
  row_norms<P, Vectors>(values, features, after);
  const double slope = kind == Activation::elu ? std::max(1.0, std::abs(parameters[0])) : 1;
  const double rounding = kind == Activation::relu || kind == Activation::maxmin ? 0 : kElementary * kUnit;
  for (int v = 0; v < Vectors; ++v) {
    errors[v] = slope * errors[v] + rounding * (sizes[v] + after[v]);
    sizes[v] = after[v];
  }
}

// g(x) as evaluate has it, and the bounds of its rounding: of each layer that of its sums of products, grown by what
// comes after it.
template <typename P, int Vectors>
IRESNET_FAST_INLINE const double* evaluate_bounding(const Branch<double>& branch, const LayerNorms& norms,
                                                    const double* x, double* one, double* other, P* errors) {
  P sizes[Vectors];
  row_norms<P, Vectors>(x, branch.features, sizes);
  for (int v = 0; v < Vectors; ++v) errors[v] = P{};
  std::copy_n(x, branch.features * kLanes<P>, one);
  activate_bounding<P, Vectors>(branch.activations[0], branch.parameters.data(), branch.features, one, sizes, errors);
  const double* from = one;
  for (size_t i = 0; i < branch.layers.size(); ++i) {
    const auto& layer = branch.layers[i];
    double* to = from == other ? one : other;
    apply<P, Vectors>(layer, from, to);
    const double terms = static_cast<double>(layer.in + 1) * kUnit, gamma = terms / (1 - terms);
    for (int v = 0; v < Vectors; ++v)
      errors[v] = norms.norm[i] * errors[v] + gamma * (norms.sums[i] * sizes[v] + norms.offset[i]);
    row_norms<P, Vectors>(to, layer.out, sizes);
    activate_bounding<P, Vectors>(branch.activations[i + 1], branch.parameters.data() + 2 * (i + 1), layer.out, to,
                                  sizes, errors);
    from = to;
  }
  return from;
}

}  // namespace iresnet_fast::mlp
