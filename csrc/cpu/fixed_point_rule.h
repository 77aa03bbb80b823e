// When one sample of a fixed-point inverse stops, and where it goes on: the rule of reference/fixed_point.py, in
// scalars.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace iresnet_fast {

// Picard steps that shrink the residual to less than this share are left alone: mixing has little to gain.
constexpr double kFast = 0.1;
// Longest run of Picard steps after mixed steps that were refused.
constexpr int64_t kLongestBackoff = 64;
// Room for rounding above the a-priori bound, and the iterations allowed where there is none.
constexpr int64_t kSpareIterations = 20, kMaxIterations = 1000;
// Evaluations without a smaller residual after which a sample that has converged does not try for more.
constexpr int64_t kSettled = 2;

struct FixedPointRule {
  double tol, lipschitz;  // lipschitz < 0: none is proven
  double eps;             // of the samples' type
  int64_t max_iterations, patience;
  bool mixing;

  bool proven() const { return lipschitz >= 0; }
};

// The next iterate: T = y - g(x); T - theta (T - T'), T' of the last accepted iterate; or T' itself.
enum class Step { following, mixed, target };

struct FixedPointSample {
  double threshold;
  double rounding;  // of one step: one that contracts by exactly L must not be refused for it
  int64_t cap;      // on the iterations; 0 for the a-priori bound
  double accepted = std::numeric_limits<double>::infinity(), best = accepted, residual = accepted, theta = 0;
  int64_t iterations = 0, evaluations = 0, limit = 0, since_best = 0, wait = 0, backoff = 1;
  bool is_mixed = false, done = false, converged = false;

  FixedPointSample() = default;
  FixedPointSample(const FixedPointRule& rule, double norm)
      : threshold(rule.tol * std::max(1.0, norm)),
        rounding(4 * rule.eps * std::max(1.0, norm)),
        cap(rule.max_iterations) {}

  // After an evaluation with residual f = T - x; along is the product of f with the f' of the last accepted iterate.
  Step advance(const FixedPointRule& rule, double squared, double along) {
    residual = std::sqrt(squared);
    if (evaluations++ == 0) limit = iteration_limit(rule);
    bool shrunk = residual < accepted;
    if (rule.proven()) shrunk = residual <= rule.lipschitz * accepted + rounding;
    const bool taken = shrunk || !is_mixed;
    iterations += taken;
    judge(rule, taken);
    return rule.mixing ? mix(taken, squared, along) : Step::following;
  }

 private:
  void judge(const FixedPointRule& rule, bool taken) {
    constexpr double kInfinity = std::numeric_limits<double>::infinity();
    // The solution's residual and error, as shares of the iterate's residual.
    const double shrunk = rule.proven() ? rule.lipschitz : 1;
    const double grown = rule.proven() ? rule.lipschitz / (1 - rule.lipschitz) : 1;
    converged = shrunk * residual <= threshold && threshold < kInfinity;
    const bool close = grown * residual <= threshold && threshold < kInfinity;
    since_best = residual < best ? 0 : since_best + 1;
    best = std::fmin(best, residual);
    const bool settled = converged && since_best >= kSettled;
    const bool lost = taken && !(residual < kInfinity);  // a mixed iterate that left the domain of g is only refused
    done = close || settled || lost || since_best >= rule.patience || iterations >= limit;
  }

  Step mix(bool taken, double squared, double along) {
    bool may_mix = taken && (is_mixed || residual > kFast * accepted) && !done;
    // A refusal doubles the run of Picard steps that follows, success halves it.
    wait = taken ? std::max<int64_t>(wait - 1, 0) : backoff;
    if (!taken)
      backoff = std::min(2 * backoff, kLongestBackoff);
    else if (is_mixed)
      backoff = std::max<int64_t>(backoff / 2, 1);
    may_mix = may_mix && wait == 0;
    if (may_mix) {
      const double change = squared - 2 * along + accepted * accepted;
      may_mix = change > 0 && change < std::numeric_limits<double>::infinity();
      theta = (squared - along) / change;
    }
    is_mixed = may_mix;
    if (!taken) return Step::target;
    accepted = residual;
    return may_mix ? Step::mixed : Step::following;
  }

  int64_t iteration_limit(const FixedPointRule& rule) const {
    if (cap > 0) return cap;
    if (!rule.proven()) return kMaxIterations;
    const double base = std::log(std::max(rule.lipschitz, std::numeric_limits<double>::min()));
    const double needed = std::ceil(std::log(threshold * (1 - rule.lipschitz) / residual) / base);
    return kSpareIterations + (needed > 0 && std::isfinite(needed) ? static_cast<int64_t>(needed) : 0);
  }
};

}  // namespace iresnet_fast
