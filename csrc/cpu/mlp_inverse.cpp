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
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "common/interrupt.h"
#include "cpu/dispatch.h"
#include "cpu/fixed_point_rule.h"
#include "cpu/mlp_branch.h"
#include "cpu/packed.h"

namespace iresnet_fast {
namespace {

using namespace mlp;

// Operations of one evaluation between two looks at Ctrl-C, and those below which a second thread costs more than it
// gains.
constexpr double kSlab = 1 << 29, kWorthThreads = 1 << 20;

// Rows to solve, and where their solutions go.
template <typename T>
struct Batch {
  const T *y, *start;
  T *x, *residual;
  int64_t *iterations, *evaluations;
  bool* converged;
};

// What a proof needs besides, and what it finds of each row; nothing without one.
struct Proof {
  LayerNorms norms;
  double lipschitz = 0;
  const double* goal = nullptr;    // what bounds are to reach
  const int64_t* steps = nullptr;  // how many a row may take; null for the a-priori bound
  double *rounding = nullptr, *bound = nullptr;
};

// A residual below this share of its rounding has nothing to gain.
constexpr double kNegligible = 0.125;
// Of the constant by which steps are accepted: a branch that is constant is solved by one step, which must be taken.
constexpr double kLeast = 1e-3;

// What a row's lane goes on with, as vectors: theta, and which of the three steps.
template <typename P>
struct Steps {
  alignas(P) Element<P> theta[kLanes<P>], mixed[kLanes<P>], refused[kLanes<P>];
};

// Rows begin to end of a batch, in the lanes of one thread. A proof bounds the distance of every iterate to the exact
// solution, and keeps the best.
template <typename P, bool kProving>
class Lanes {
 public:
  using T = Element<P>;
  Lanes(const Branch<T>& branch, const FixedPointRule& rule, const Batch<T>& batch, const Proof& proof)
      : branch_(branch),
        rule_(rule),
        batch_(batch),
        proof_(proof),
        size_(branch.features * kLanes<P>),
        y_(size_),
        x_(size_),
        following_(size_),
        target_(size_),
        before_(size_),
        one_(branch.widest * kLanes<P>),
        other_(branch.widest * kLanes<P>) {}

  IRESNET_FAST_INLINE void solve(int64_t begin, int64_t end) {
    next_ = begin, end_ = end, used_ = 0;
    for (Packed<T>* part : {&y_, &x_, &target_, &before_}) std::fill(part->data(), part->data() + size_, T(0));
    while (used_ < kLanes<P> && next_ < end_) enter(used_++);
    while (used_ > 0) {
      if (used_ > 2 * kWide<P>)
        advance<3>();
      else if (used_ > kWide<P>)
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
    const T* image;
    [[maybe_unused]] P errors[Vectors];
    if constexpr (kProving)
      image = evaluate_bounding<P, Vectors>(branch_, proof_.norms, x_.data(), one_.data(), other_.data(), errors);
    else
      image = evaluate<P, Vectors>(branch_, x_.data(), one_.data(), other_.data());
    T* step = one_.data() == image ? other_.data() : one_.data();
    // In double precision: squares of a small residual vanish in float32.
    alignas(P) double squared[kLanes<P>] = {}, along[kLanes<P>] = {}, moved[kLanes<P>] = {};
    for (int64_t at = 0; at < size_; at += kLanes<P>)
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) {
        const int64_t i = at + v * kWide<P>;
        const P following = load<P>(&y_[i]) - load<P>(image + i), f = following - load<P>(&x_[i]);
        store(&following_[i], following);
        store(step + i, f);
        accumulate(f, f, squared + v * kWide<P>);
        accumulate(f, load<P>(&before_[i]), along + v * kWide<P>);
        if constexpr (kProving) {
          const P apart = load<P>(&y_[i]) - load<P>(&x_[i]);
          accumulate(apart, apart, moved + v * kWide<P>);
        }
      }
    Steps<P> steps;
    for (int lane = 0; lane < Vectors * kWide<P>; ++lane) {
      const Step next = lane < used_ ? samples_[lane].advance(rule_, squared[lane], along[lane]) : Step::following;
      steps.theta[lane] = static_cast<T>(samples_[lane].theta);
      steps.mixed[lane] = next == Step::mixed;
      steps.refused[lane] = next == Step::target;
      if constexpr (kProving)
        if (lane < used_) prove(lane, squared[lane], moved[lane], errors[lane / kWide<P>][lane % kWide<P>]);
      if (lane < used_ && samples_[lane].done) write(lane);
    }
    for (int64_t at = 0; at < size_; at += kLanes<P>)
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) {
        const int64_t i = at + v * kWide<P>, lane = v * kWide<P>;
        const P following = load<P>(&following_[i]), target = load<P>(&target_[i]);
        const P mixed = following + load<P>(steps.theta + lane) * (target - following);
        const auto refused = load<P>(steps.refused + lane) > 0;
        const P onward = load<P>(steps.mixed + lane) > 0 ? mixed : following;
        store(&x_[i], refused ? target : onward);
        store(&target_[i], refused ? target : following);
        store(&before_[i], refused ? load<P>(&before_[i]) : load<P>(step + i));
      }
  }

  // Bound the distance of the evaluated x to the exact solution, from its residual and what bounds its rounding.
  IRESNET_FAST_INLINE void prove(int lane, double squared, double moved, double error) {
    const int64_t row = rows_[lane];
    const double residual = std::sqrt(squared), rounding = error + kUnit * (std::sqrt(moved) + residual) + kTiny;
    const double up = 1 + static_cast<double>(branch_.features + 16) * kUnit;  // the rounding of these norms and sums
    const double bound = up * (residual + rounding) / (1 - proof_.lipschitz);
    if (bound < proof_.bound[row]) {
      proof_.bound[row] = bound, proof_.rounding[row] = rounding, batch_.residual[row] = residual;
      for (int64_t i = 0; i < branch_.features; ++i) batch_.x[row * branch_.features + i] = x_[i * kLanes<P> + lane];
    }
    if (bound <= proof_.goal[row] || residual <= kNegligible * rounding) samples_[lane].done = true;
  }

  static IRESNET_FAST_INLINE void accumulate(P a, P b, double* sum) {
    using Doubles = typename VectorOf<double, sizeof(P)>::type;
    if constexpr (sizeof(T) == sizeof(double)) {
      store<P>(sum, load<P>(sum) + a * b);
    } else {
      typedef float Half __attribute__((vector_size(sizeof(P) / 2)));
      for (int half = 0; half < 2; ++half) {
        const Half p = reinterpret_cast<const Half*>(&a)[half], q = reinterpret_cast<const Half*>(&b)[half];
        double* to = sum + half * kWide<Doubles>;
        store<Doubles>(to,
                       load<Doubles>(to) + __builtin_convertvector(p, Doubles) * __builtin_convertvector(q, Doubles));
      }
    }
  }

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
      y_[i * kLanes<P> + lane] = y;
      x_[i * kLanes<P> + lane] = batch_.start[at + i];
      before_[i * kLanes<P> + lane] = 0;
      squares += static_cast<double>(y) * y;
    }
    rows_[lane] = row;
    samples_[lane] = FixedPointSample(rule_, std::sqrt(squares));
    if constexpr (kProving) {
      samples_[lane].threshold = rule_.lipschitz * (1 - rule_.lipschitz) / 2 * proof_.goal[row];
      if (proof_.steps != nullptr) samples_[lane].cap = proof_.steps[row] + 1;  // the first evaluation counts as one
    }
  }

  IRESNET_FAST_INLINE void move(int from, int to) {
    for (Packed<T>* part : {&y_, &x_, &target_, &before_})
      for (int64_t at = 0; at < size_; at += kLanes<P>) (*part)[at + to] = (*part)[at + from];
    rows_[to] = rows_[from];
    samples_[to] = samples_[from];
  }

  // With a proven constant the solution is y - g(x), which is closer; else the x that was evaluated.
  IRESNET_FAST_INLINE void write(int lane) {
    const int64_t row = rows_[lane];
    const FixedPointSample& sample = samples_[lane];
    batch_.evaluations[row] = sample.evaluations;
    if constexpr (kProving) return;
    T* from = rule_.proven() ? following_.data() : x_.data();
    for (int64_t i = 0; i < branch_.features; ++i) batch_.x[row * branch_.features + i] = from[i * kLanes<P> + lane];
    batch_.residual[row] = static_cast<T>(sample.residual);
    batch_.iterations[row] = sample.iterations;
    batch_.converged[row] = sample.converged;
  }

  const Branch<T>& branch_;
  const FixedPointRule rule_;
  const Batch<T> batch_;
  const Proof& proof_;
  const int64_t size_;
  Packed<T> y_, x_, following_, target_, before_, one_, other_;
  FixedPointSample samples_[kLanes<P>];
  int64_t rows_[kLanes<P>];
  int64_t next_ = 0, end_ = 0;
  int used_ = 0;
};

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

// All rows of a batch, by all threads, in slabs between which Ctrl-C is seen.
template <bool kProving, typename T>
void solve_rows(const Branch<T>& branch, const FixedPointRule& rule, const Batch<T>& batch, const Proof& proof,
                int64_t rows) {
  const double operations = std::max(1.0, branch.operations());
  with_vectors([&](auto bytes) {
    using P = typename VectorOf<T, bytes>::type;
    const auto grain = std::max<int64_t>(kWide<P>, static_cast<int64_t>(kWorthThreads / operations));
    const auto step = std::max<int64_t>(kLanes<P> * at::get_num_threads(), static_cast<int64_t>(kSlab / operations));
    for (int64_t slab = 0; slab < rows; slab += step) {
      check_interrupt();
      at::parallel_for(slab, std::min(rows, slab + step), grain, [&](int64_t begin, int64_t end) {
        Lanes<P, kProving> lanes(branch, rule, batch, proof);
        run_on<bytes>(kProcessor, [&]() IRESNET_FAST_INLINED { lanes.solve(begin, end); });
      });
    }
  });
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
    const Batch<scalar_t> batch{
        target.const_data_ptr<scalar_t>(), start.const_data_ptr<scalar_t>(), x.data_ptr<scalar_t>(),
        residual.data_ptr<scalar_t>(),     iterations.data_ptr<int64_t>(),   evaluations.data_ptr<int64_t>(),
        converged.data_ptr<bool>()};
    solve_rows<false>(branch, rule, batch, Proof{}, rows);
  });
  return {x, residual, iterations, evaluations, converged};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> mlp_finish(
    const at::Tensor& y, const at::Tensor& x0, at::TensorList weights,
    const c10::List<std::optional<at::Tensor>>& biases, at::IntArrayRef activations, const at::Tensor& parameters,
    at::ArrayRef<double> norms, at::ArrayRef<double> sums, double lipschitz, const at::Tensor& goal,
    const std::optional<at::Tensor>& steps, int64_t patience) {
  TORCH_CHECK(
      y.dim() == 2 && y.scalar_type() == at::kDouble && x0.sizes() == y.sizes() && x0.scalar_type() == at::kDouble,
      "y and x0 must be float64 of one shape (B, D), got ", y.sizes(), " and ", x0.sizes());
  const int64_t rows = y.size(0);
  TORCH_CHECK(goal.dim() == 1 && goal.size(0) == rows && goal.scalar_type() == at::kDouble, "goal must be (", rows,
              ",) in float64, got ", goal.sizes());
  TORCH_CHECK(!steps || (steps->dim() == 1 && steps->size(0) == rows && steps->scalar_type() == at::kLong),
              "steps must be (", rows, ",) in int64");
  TORCH_CHECK(norms.size() == weights.size() && sums.size() == weights.size(), "each of ", weights.size(),
              " layers needs a norm and that of its absolute values, got ", norms.size(), " and ", sums.size());
  TORCH_CHECK(0 <= lipschitz && lipschitz < 1, "lipschitz must be in [0, 1), got ", lipschitz);
  const at::Tensor target = y.contiguous(), goals = goal.contiguous();
  const std::optional<at::Tensor> limits = steps ? std::optional(steps->contiguous()) : std::nullopt;
  const at::Tensor x = x0.clone(at::MemoryFormat::Contiguous), start = x.clone();
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const at::Tensor residual = at::full({rows}, kInfinity, y.options()), rounding = residual.clone(),
                   bound = residual.clone(), evaluations = at::zeros({rows}, y.options().dtype(at::kLong));
  const Branch<double> branch = read_branch<double>(y, weights, biases, activations, parameters);
  Proof proof{.norms = {norms.vec(), sums.vec(), {}},
              .lipschitz = lipschitz,
              .goal = goals.const_data_ptr<double>(),
              .steps = limits ? limits->const_data_ptr<int64_t>() : nullptr,
              .rounding = rounding.data_ptr<double>(),
              .bound = bound.data_ptr<double>()};
  for (const auto& layer : branch.layers) {
    double squares = 0;
    for (int64_t o = 0; o < layer.out; ++o) squares += layer.bias.data()[o] * layer.bias.data()[o];
    proof.norms.offset.push_back(std::sqrt(squares));
  }
  const FixedPointRule rule{1, std::max(lipschitz, kLeast), std::numeric_limits<double>::epsilon(), 0, patience, true};
  const Batch<double> batch{target.const_data_ptr<double>(),
                            start.const_data_ptr<double>(),
                            x.data_ptr<double>(),
                            residual.data_ptr<double>(),
                            nullptr,
                            evaluations.data_ptr<int64_t>(),
                            nullptr};
  solve_rows<true>(branch, rule, batch, proof, rows);
  return {x, residual, rounding, bound, evaluations};
}

}  // namespace

TORCH_LIBRARY_IMPL(iresnet_fast, CPU, m) {
  m.impl("mlp_inverse", &mlp_inverse);
  m.impl("mlp_finish", &mlp_finish);
}

}  // namespace iresnet_fast
