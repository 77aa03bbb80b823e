// Power iteration and soft normalisation of many layers at once: a layer per thread, the largest first.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/power_iteration_gradient.h"
#include "cpu/power_iteration_layer.h"

namespace iresnet_fast {
namespace {

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
    with_vectors([&](auto bytes) {
      using F = std::conditional_t<bytes == sizeof(Floats16), Floats16, Floats8>;
      run_on<bytes>(kProcessor, [&]() IRESNET_FAST_INLINED {
        iterate<F>(layers.all[i], from[i], coeff[i], n, scratch, to_u + layers.u[i], to_v + layers.v[i],
                   to_weight + layers.weight[i], to_sigma + i);
      });
    });
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
    with_vectors([&](auto bytes) {
      using F = std::conditional_t<bytes == sizeof(Floats16), Floats16, Floats8>;
      run_on<bytes>(kProcessor, [&]() IRESNET_FAST_INLINED {
        differentiate<F>(layers.all[i], kept[i].const_data_ptr<float>(), weight + at, from_u + layers.u[i],
                         from_v + layers.v[i], norms[i], coeff[i], scratch, to + at);
      });
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(iresnet_fast, CPU, m) {
  m.impl("power_iteration_cpu", &power_iteration);
  m.impl("power_iteration_backward_cpu", &power_iteration_backward);
}

}  // namespace iresnet_fast
