// The fixed-point inverse of a multilayer perceptron's residual block, whole: a thread solves its rows of the batch.
//
// The lanes of the vectors are rows: a number of a row stands beside those of its neighbours, so that a layer is
// weights times vectors and every row's arithmetic is its own, whatever else is in the batch. A row that has converged
// gives its lane to the next one that waits; when none does, the others move together and the vectors become fewer.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "common/interrupt.h"
#include "cpu/activations.h"
#include "cpu/dispatch.h"
#include "cpu/fixed_point_rule.h"
#include "cpu/packed.h"

namespace iresnet_fast {
namespace {

constexpr int kVectors = 3;  // of rows
constexpr int kTile = 4;     // outputs of a layer that are summed together
// Operations of one evaluation between two looks at Ctrl-C, and those below which a second thread costs more than it
// gains.
constexpr double kSlab = 1 << 29, kWorthThreads = 1 << 20;

template <typename T>
constexpr int kWide = kPackBytes / sizeof(T);
template <typename T>
constexpr int kLanes = kVectors * kWide<T>;

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

template <typename T>
IRESNET_FAST_INLINE PackOf<T> load(const T* from) {
  return *reinterpret_cast<const PackOf<T>*>(from);
}
template <typename T>
IRESNET_FAST_INLINE void store(T* to, PackOf<T> x) {
  *reinterpret_cast<PackOf<T>*>(to) = x;
}

template <typename T, int Vectors>
IRESNET_FAST_INLINE void apply(const Layer<T>& layer, const T* from, T* to) {
  using P = PackOf<T>;
  for (int64_t o = 0; o < layer.out; o += kTile) {
    const T* weight = layer.weights.data() + o * layer.in;
    const T* bias = layer.bias.data() + o;
    P sum[kTile][Vectors];
#pragma GCC unroll 8
    for (int m = 0; m < kTile; ++m)
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sum[m][v] = P{} + bias[m];
    const T* x = from;
    for (int64_t i = 0; i < layer.in; ++i, x += kLanes<T>, weight += kTile) {
      P value[Vectors];
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) value[v] = load(x + v * kWide<T>);
#pragma GCC unroll 8
      for (int m = 0; m < kTile; ++m)
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) sum[m][v] += weight[m] * value[v];
    }
#pragma GCC unroll 8
    for (int m = 0; m < kTile; ++m)
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) store(to + (o + m) * kLanes<T> + v * kWide<T>, sum[m][v]);
  }
}

template <typename T, int Vectors, Activation kind>
IRESNET_FAST_INLINE void activate_all(const T* parameters, int64_t features, T* values) {
  for (int64_t i = 0; i < features; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      const int64_t at = i * kLanes<T> + v * kWide<T>;
      store(values + at, activate<kind>(load(values + at), parameters[0], parameters[1]));
    }
}

// Feature i with feature i + half: the larger first.
template <typename T, int Vectors>
IRESNET_FAST_INLINE void sort_pairs(int64_t features, T* values) {
  const int64_t half = features / 2 * kLanes<T>;
  for (int64_t i = 0; i < features / 2; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      const int64_t at = i * kLanes<T> + v * kWide<T>;
      const PackOf<T> a = load(values + at), b = load(values + half + at);
      store(values + at, (a > b) | (a != a) ? a : b);
      store(values + half + at, (a < b) | (a != a) ? a : b);
    }
}

template <typename T, int Vectors>
IRESNET_FAST_INLINE void activate_all(Activation kind, const T* parameters, int64_t features, T* values) {
  switch (kind) {
    case Activation::identity:
      break;
    case Activation::relu:
      activate_all<T, Vectors, Activation::relu>(parameters, features, values);
      break;
    case Activation::elu:
      activate_all<T, Vectors, Activation::elu>(parameters, features, values);
      break;
    case Activation::softplus:
      activate_all<T, Vectors, Activation::softplus>(parameters, features, values);
      break;
    case Activation::tanh:
      activate_all<T, Vectors, Activation::tanh>(parameters, features, values);
      break;
    case Activation::lipswish:
      activate_all<T, Vectors, Activation::lipswish>(parameters, features, values);
      break;
    case Activation::maxmin:
      sort_pairs<T, Vectors>(features, values);
      break;
  }
}

// g(x) of the first Vectors vectors, in one of the two buffers.
template <typename T, int Vectors>
IRESNET_FAST_INLINE const T* evaluate(const Branch<T>& branch, const T* x, T* one, T* other) {
  const T* from = x;
  if (branch.activations[0] != Activation::identity) {
    std::copy_n(x, branch.features * kLanes<T>, one);
    activate_all<T, Vectors>(branch.activations[0], branch.parameters.data(), branch.features, one);
    from = one;
  }
  for (size_t i = 0; i < branch.layers.size(); ++i) {
    T* to = from == other ? one : other;
    apply<T, Vectors>(branch.layers[i], from, to);
    activate_all<T, Vectors>(branch.activations[i + 1], branch.parameters.data() + 2 * (i + 1), branch.layers[i].out,
                             to);
    from = to;
  }
  return from;
}

// What a row's lane goes on with, as vectors: theta, and which of the three steps.
template <typename T>
struct Steps {
  alignas(kPackBytes) T theta[kLanes<T>], mixed[kLanes<T>], refused[kLanes<T>];
};

// Rows begin to end of a batch, in the lanes of one thread.
template <typename T>
class Lanes {
 public:
  struct Batch {
    const T *y, *start;
    T *x, *residual;
    int64_t *iterations, *evaluations;
    bool* converged;
  };

  Lanes(const Branch<T>& branch, const FixedPointRule& rule, const Batch& batch)
      : branch_(branch),
        rule_(rule),
        batch_(batch),
        size_(branch.features * kLanes<T>),
        y_(size_),
        x_(size_),
        following_(size_),
        target_(size_),
        before_(size_),
        one_(branch.widest * kLanes<T>),
        other_(branch.widest * kLanes<T>) {}

  IRESNET_FAST_INLINE void solve(int64_t begin, int64_t end) {
    next_ = begin, end_ = end, used_ = 0;
    for (Packed<T>* part : {&y_, &x_, &target_, &before_}) std::fill(part->data(), part->data() + size_, T(0));
    while (used_ < kLanes<T> && next_ < end_) enter(used_++);
    while (used_ > 0) {
      if (used_ > 2 * kWide<T>)
        advance<3>();
      else if (used_ > kWide<T>)
        advance<2>();
      else
        advance<1>();
      leave();
    }
  }

 private:
  // One evaluation of the branch, and the next iterate of every lane that goes on.
  template <int Vectors>
  IRESNET_FAST_INLINE void advance() {
    using P = PackOf<T>;
    const T* image = evaluate<T, Vectors>(branch_, x_.data(), one_.data(), other_.data());
    T* step = one_.data() == image ? other_.data() : one_.data();
    // In double precision: squares of a small residual vanish in float32.
    alignas(kPackBytes) double squared[kLanes<T>] = {}, along[kLanes<T>] = {};
    for (int64_t at = 0; at < size_; at += kLanes<T>)
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) {
        const int64_t i = at + v * kWide<T>;
        const P following = load(&y_[i]) - load(image + i), f = following - load(&x_[i]);
        store(&following_[i], following);
        store(step + i, f);
        accumulate(f, f, squared + v * kWide<T>);
        accumulate(f, load(&before_[i]), along + v * kWide<T>);
      }
    Steps<T> steps;
    for (int lane = 0; lane < Vectors * kWide<T>; ++lane) {
      const Step next = lane < used_ ? samples_[lane].advance(rule_, squared[lane], along[lane]) : Step::following;
      steps.theta[lane] = static_cast<T>(samples_[lane].theta);
      steps.mixed[lane] = next == Step::mixed;
      steps.refused[lane] = next == Step::target;
      if (lane < used_ && samples_[lane].done) write(lane);
    }
    for (int64_t at = 0; at < size_; at += kLanes<T>)
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) {
        const int64_t i = at + v * kWide<T>, lane = v * kWide<T>;
        const P following = load(&following_[i]), target = load(&target_[i]);
        const P mixed = following + load(steps.theta + lane) * (target - following);
        const auto refused = load(steps.refused + lane) > 0;
        const P onward = load(steps.mixed + lane) > 0 ? mixed : following;
        store(&x_[i], refused ? target : onward);
        store(&target_[i], refused ? target : following);
        store(&before_[i], refused ? load(&before_[i]) : load(step + i));
      }
  }

  static IRESNET_FAST_INLINE void accumulate(Floats a, Floats b, double* sum) {
    for (int half = 0; half < 2; ++half) {
      typedef float Half __attribute__((vector_size(kPackBytes / 2)));
      const Half p = reinterpret_cast<const Half*>(&a)[half], q = reinterpret_cast<const Half*>(&b)[half];
      store(sum + half * 4,
            load(sum + half * 4) + __builtin_convertvector(p, Doubles) * __builtin_convertvector(q, Doubles));
    }
  }
  static IRESNET_FAST_INLINE void accumulate(Doubles a, Doubles b, double* sum) { store(sum, load(sum) + a * b); }

  // The lanes whose rows are done take others, or are closed.
  IRESNET_FAST_INLINE void leave() {
    for (int lane = 0; lane < used_;) {
      if (!samples_[lane].done) {
        ++lane;
      } else if (next_ < end_) {
        enter(lane++);
      } else if (--used_ != lane) {
        move(used_, lane);
      }
    }
  }

  IRESNET_FAST_INLINE void enter(int lane) {
    const int64_t row = next_++, at = row * branch_.features;
    double squares = 0;
    for (int64_t i = 0; i < branch_.features; ++i) {
      const T y = batch_.y[at + i];
      y_[i * kLanes<T> + lane] = y;
      x_[i * kLanes<T> + lane] = batch_.start[at + i];
      before_[i * kLanes<T> + lane] = 0;
      squares += static_cast<double>(y) * y;
    }
    rows_[lane] = row;
    samples_[lane] = FixedPointSample(rule_, std::sqrt(squares));
  }

  IRESNET_FAST_INLINE void move(int from, int to) {
    for (Packed<T>* part : {&y_, &x_, &target_, &before_})
      for (int64_t at = 0; at < size_; at += kLanes<T>) (*part)[at + to] = (*part)[at + from];
    rows_[to] = rows_[from];
    samples_[to] = samples_[from];
  }

  // With a proven constant the solution is y - g(x), which is closer; else the x that was evaluated.
  IRESNET_FAST_INLINE void write(int lane) {
    const int64_t row = rows_[lane];
    const FixedPointSample& sample = samples_[lane];
    T* from = rule_.proven() ? following_.data() : x_.data();
    for (int64_t i = 0; i < branch_.features; ++i) batch_.x[row * branch_.features + i] = from[i * kLanes<T> + lane];
    batch_.residual[row] = static_cast<T>(sample.residual);
    batch_.iterations[row] = sample.iterations;
    batch_.evaluations[row] = sample.evaluations;
    batch_.converged[row] = sample.converged;
  }

  const Branch<T>& branch_;
  const FixedPointRule rule_;
  const Batch batch_;
  const int64_t size_;
  Packed<T> y_, x_, following_, target_, before_, one_, other_;
  FixedPointSample samples_[kLanes<T>];
  int64_t rows_[kLanes<T>];
  int64_t next_ = 0, end_ = 0;
  int used_ = 0;
};

IRESNET_FAST_DISPATCH(void, solve_floats, (Lanes<float> & lanes, int64_t begin, int64_t end), lanes.solve(begin, end))
IRESNET_FAST_DISPATCH(void, solve_doubles, (Lanes<double> & lanes, int64_t begin, int64_t end), lanes.solve(begin, end))

void solve(Lanes<float>& lanes, int64_t begin, int64_t end) { IRESNET_FAST_CHOOSE(solve_floats, (lanes, begin, end)); }
void solve(Lanes<double>& lanes, int64_t begin, int64_t end) {
  IRESNET_FAST_CHOOSE(solve_doubles, (lanes, begin, end));
}

template <typename T>
Branch<T> read_branch(const at::Tensor& y, at::TensorList weights, const c10::List<std::optional<at::Tensor>>& biases,
                      at::IntArrayRef activations, const at::Tensor& parameters) {
  TORCH_CHECK(biases.size() == weights.size() && activations.size() == weights.size() + 1,
              "mlp_inverse needs a bias or None for each of ", weights.size(), " weights and one activation more, got ",
              biases.size(), " and ", activations.size());
  TORCH_CHECK(
      parameters.numel() == 2 * static_cast<int64_t>(activations.size()) && parameters.scalar_type() == y.scalar_type(),
      "parameters must be two numbers of y's dtype for each activation");
  Branch<T> branch;
  branch.features = y.size(1);
  int64_t width = y.size(1);
  branch.widest = padded(width);
  for (size_t i = 0; i < weights.size(); ++i) {
    const at::Tensor& weight = weights[i];
    const std::optional<at::Tensor> bias = biases.get(i);
    TORCH_CHECK(weight.dim() == 2 && weight.size(1) == width && weight.scalar_type() == y.scalar_type(), "weight ", i,
                " must have shape (*, ", width, ") and y's dtype, got ", weight.sizes());
    width = weight.size(0);
    TORCH_CHECK(!bias || (bias->numel() == width && bias->scalar_type() == y.scalar_type()), "bias ", i, " must have ",
                width, " values of y's dtype");
    branch.layers.emplace_back(weight, bias);
    branch.widest = std::max(branch.widest, padded(width));
  }
  TORCH_CHECK(width == y.size(1), "the branch must keep its ", y.size(1), " features, but has ", width, " outputs");
  for (const int64_t kind : activations) {
    TORCH_CHECK(0 <= kind && kind < kActivations, "activation ", kind, " is unknown");
    branch.activations.push_back(static_cast<Activation>(kind));
  }
  const at::Tensor dense = parameters.contiguous();
  branch.parameters.assign(dense.const_data_ptr<T>(), dense.const_data_ptr<T>() + dense.numel());
  return branch;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> mlp_inverse(
    const at::Tensor& y, const at::Tensor& x0, at::TensorList weights,
    const c10::List<std::optional<at::Tensor>>& biases, at::IntArrayRef activations, const at::Tensor& parameters,
    double tol, double lipschitz, int64_t max_iterations, int64_t patience, bool mixing, bool low) {
  TORCH_CHECK(!low, "mlp_inverse has no products of float16 on a CPU");
  TORCH_CHECK(y.dim() == 2 && x0.sizes() == y.sizes() && x0.scalar_type() == y.scalar_type(),
              "y and x0 must be of one shape (B, D) and dtype, got ", y.sizes(), " and ", x0.sizes());
  const at::Tensor target = y.contiguous(), start = x0.contiguous();
  const int64_t rows = y.size(0);
  const at::Tensor x = at::empty_like(target), residual = at::empty({rows}, y.options()),
                   iterations = at::empty({rows}, y.options().dtype(at::kLong)),
                   evaluations = at::empty_like(iterations),
                   converged = at::empty({rows}, y.options().dtype(at::kBool));
  AT_DISPATCH_FLOATING_TYPES(y.scalar_type(), "mlp_inverse", [&] {
    const Branch<scalar_t> branch = read_branch<scalar_t>(y, weights, biases, activations, parameters);
    const FixedPointRule rule{tol,      lipschitz, std::numeric_limits<scalar_t>::epsilon(), max_iterations,
                              patience, mixing};
    const typename Lanes<scalar_t>::Batch batch{
        target.const_data_ptr<scalar_t>(), start.const_data_ptr<scalar_t>(), x.data_ptr<scalar_t>(),
        residual.data_ptr<scalar_t>(),     iterations.data_ptr<int64_t>(),   evaluations.data_ptr<int64_t>(),
        converged.data_ptr<bool>()};
    const double operations = std::max(1.0, branch.operations());
    const auto grain = std::max<int64_t>(kWide<scalar_t>, static_cast<int64_t>(kWorthThreads / operations));
    const auto step =
        std::max<int64_t>(kLanes<scalar_t> * at::get_num_threads(), static_cast<int64_t>(kSlab / operations));
    for (int64_t slab = 0; slab < rows; slab += step) {
      check_interrupt();
      at::parallel_for(slab, std::min(rows, slab + step), grain, [&](int64_t begin, int64_t end) {
        Lanes<scalar_t> lanes(branch, rule, batch);
        solve(lanes, begin, end);
      });
    }
  });
  return {x, residual, iterations, evaluations, converged};
}

}  // namespace

TORCH_LIBRARY_IMPL(iresnet_fast, CPU, m) { m.impl("mlp_inverse", &mlp_inverse); }

}  // namespace iresnet_fast
