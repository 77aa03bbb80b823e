// Singular values of batched symbols through ATen, checked; for tensors of any device.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/linalg_eigvalsh.h>
#include <ATen/ops/linalg_svdvals.h>
#include <ATen/ops/view_as_real.h>

namespace iresnet_fast {

// A batched solver that went wrong must not pass for an answer: the sum of the squares it found, of singular values
// or of eigenvalues, is the squared Frobenius norm of the matrix it was given.
inline void check_frobenius(const at::Tensor& values, const at::Tensor& matrix) {
  const at::Tensor expected = at::view_as_real(matrix).square().sum({-3, -2, -1});
  const at::Tensor found = values.square().sum(-1);
  const double deviation = ((found - expected).abs() / expected.clamp_min(1e-300)).max().item<double>();
  TORCH_CHECK(deviation < 1e-11,
              "conv_singular_values: the solver's values do not match the operator's Frobenius norm ",
              "(relative deviation ", deviation, "); this is a fault of the linear algebra library. ",
              "Remedy: the other driver, or IRESNET_FAST_BACKEND=reference.");
}

// Of a batched eigensolver of our own, by trace and Frobenius norm.
inline void check_eigenvalues(bool wrong) {
  TORCH_CHECK(!wrong, "conv_singular_values: eigenvalues do not match the trace and the Frobenius norm of their ",
              "matrix. Remedy: driver=\"svd\", and please report the weight.");
}

// F F^H or F^H F, whichever is smaller.
inline at::Tensor smaller_gram(const at::Tensor& symbol) {
  return symbol.size(-2) <= symbol.size(-1) ? symbol.matmul(symbol.mH()) : symbol.mH().matmul(symbol);
}

// Descending, from the Gram matrix on the smaller side: fast, and exact to sqrt(eps) times the largest.
inline at::Tensor values_by_gram(const at::Tensor& symbol) {
  const at::Tensor gram = smaller_gram(symbol);
  const at::Tensor eigenvalues = at::linalg_eigvalsh(gram);
  check_frobenius(eigenvalues, gram);
  return eigenvalues.flip({-1}).clamp_min_(0.0).sqrt_();
}

// (count, groups * rank), descending in the last axis, of a symbol (count, groups, rows, columns).
inline at::Tensor checked_singular_values(const at::Tensor& symbol, bool gram) {
  at::Tensor values = gram ? values_by_gram(symbol) : at::linalg_svdvals(symbol);
  check_frobenius(values, symbol);
  values = values.flatten(1);
  return symbol.size(1) == 1 ? values : std::get<0>(values.sort(-1, /*descending=*/true));
}

}  // namespace iresnet_fast
