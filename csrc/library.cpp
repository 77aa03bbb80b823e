// Every schema of the compiled ops, in one place, and the facts of this build for `iresnet-fast doctor`.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>
#include <torch/version.h>

#ifdef IRESNET_FAST_CUDA
#include <cuda_runtime_api.h>
#endif

#include <map>
#include <string>

#include "common/interrupt.h"
#include "cpu/dispatch.h"

TORCH_LIBRARY(iresnet_fast, m) {
  m.def("checksum(Tensor[] tensors) -> int");
  m.def("fixed_point_update(Tensor y, Tensor image, Tensor x) -> (Tensor, Tensor)");
  m.def(
      "power_iteration_cpu(Tensor[] weights, Tensor[] u, Tensor[] v, float[] coeff, int[] sizes, int n) -> (Tensor, "
      "Tensor, Tensor, Tensor)");
  m.def(
      "power_iteration_backward_cpu(Tensor[] grads, Tensor normalized, Tensor u, Tensor v, Tensor sigma, float[] "
      "coeff, "
      "int[] sizes) -> Tensor");
  m.def(
      "mlp_inverse(Tensor y, Tensor x0, Tensor[] weights, Tensor?[] biases, int[] activations, Tensor parameters, "
      "float tol, float lipschitz, int max_iterations, int patience, bool mixing, bool low) -> (Tensor, Tensor, "
      "Tensor, "
      "Tensor, Tensor)");
  m.def(
      "mlp_finish(Tensor y, Tensor x0, Tensor[] weights, Tensor?[] biases, int[] activations, Tensor parameters, "
      "float[] norms, float[] sums, float lipschitz, Tensor goal, Tensor? steps, int patience) -> (Tensor, Tensor, "
      "Tensor, "
      "Tensor, Tensor)");
  m.def("conv_symbol(Tensor weight, int[] grid, int[] stride, int[] dilation, int groups) -> Tensor");
  m.def(
      "conv_singular_values(Tensor weight, int[] grid, int[] stride, int[] dilation, int groups, str driver) -> "
      "Tensor");
  m.def(
      "conv_norm_below(Tensor weight, int[] grid, int[] stride, int[] dilation, int groups, float bound, float margin) "
      "-> Tensor");
}

void iresnet_fast::check_interrupt() {
  const pybind11::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
}

namespace {

std::map<std::string, std::string> build_info() {
  return {
      {"compiler", __VERSION__},
      {"torch", TORCH_VERSION},
      {"vectors", iresnet_fast::name_of(iresnet_fast::kProcessor)},
#ifdef IRESNET_FAST_CUDA
      {"cuda", std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10)},
      {"cuda architectures", IRESNET_FAST_CUDA_ARCHITECTURES},
#endif
  };
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled ops of iresnet_fast: they are registered as torch.ops.iresnet_fast when this module is loaded.";
  m.def("build_info", &build_info, "Compiler, torch and CUDA versions this library was built with, and its vectors.");
}
