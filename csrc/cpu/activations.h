// Activations of vectors of numbers, to the accuracy of their type.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "common/inline.h"

namespace iresnet_fast {

template <typename P>
using Element = std::remove_cvref_t<decltype(P{}[0])>;

// The order is that of iresnet_fast/reference/branches.py.
enum class Activation : int64_t { identity, relu, elu, softplus, tanh, lipswish, maxmin };
constexpr int64_t kActivations = 7;

template <typename P>
IRESNET_FAST_INLINE P at_least(P x, Element<P> bound) {
  return x < bound ? P{} + bound : x;  // NaN stays
}

template <typename P>
IRESNET_FAST_INLINE P magnitude(P x) {
  return x < 0 ? -x : x;
}

// c0 + x (c1 + x (c2 + ...))
template <typename P>
IRESNET_FAST_INLINE P polynomial(P, Element<P> c) {
  return P{} + c;
}
template <typename P, typename... Rest>
IRESNET_FAST_INLINE P polynomial(P x, Element<P> c, Rest... rest) {
  return x * polynomial(x, static_cast<Element<P>>(rest)...) + c;
}

// e^x = scale (1 + part) of x <= 0, so that e^x - 1 = scale part + (scale - 1) loses nothing near 0.
template <typename P>
IRESNET_FAST_INLINE void exponential(P x, P& scale, P& part) {
  using T = Element<P>;
  constexpr bool kDouble = sizeof(T) == sizeof(double);
  using Bits = std::conditional_t<kDouble, int64_t, int32_t>;
  typedef Bits Integers __attribute__((vector_size(sizeof(P))));
  constexpr T kMagic = kDouble ? 6755399441055744.0 : 12582912.0;  // 1.5 times 2 to the bits of the mantissa
  constexpr T kHigh = kDouble ? 6.93147180369123816490e-01 : 0.693359375;
  constexpr T kLow = kDouble ? 1.90821492927058770002e-10 : -2.12194440054690583e-4;
  x = at_least(x, static_cast<T>(kDouble ? -708 : -87));
  const P shifted = x * static_cast<T>(1.44269504088896340736) + kMagic;
  const P n = shifted - kMagic;
  const P r = (x - n * kHigh) - n * kLow;
  // The lowest bits of shifted are n; moved into the exponent, they scale by 2^n.
  const Integers bits = (Integers)shifted;  // of vectors, a cast keeps the bits
  const Integers power =
      (bits << (kDouble ? 52 : 23)) + (static_cast<Bits>(kDouble ? 1023 : 127) << (kDouble ? 52 : 23));
  scale = (P)power;
  P series;
  if constexpr (kDouble)
    series = polynomial(r, 1 / 2.0, 1 / 6.0, 1 / 24.0, 1 / 120.0, 1 / 720.0, 1 / 5040.0, 1 / 40320.0, 1 / 362880.0,
                        1 / 3628800.0, 1 / 39916800.0, 1 / 479001600.0, 1 / 6227020800.0);
  else
    series = polynomial(r, 1 / 2.f, 1 / 6.f, 1 / 24.f, 1 / 120.f, 1 / 720.f, 1 / 5040.f);
  part = r * r * series + r;
}

// log(1 + z) of 0 <= z <= 1, by 2 artanh(z / (2 + z)).
template <typename P>
IRESNET_FAST_INLINE P log_one_plus(P z) {
  const P s = z / (z + 2), q = s * s;
  if constexpr (sizeof(Element<P>) == sizeof(double))
    return 2 * s *
           polynomial(q, 1.0, 1 / 3.0, 1 / 5.0, 1 / 7.0, 1 / 9.0, 1 / 11.0, 1 / 13.0, 1 / 15.0, 1 / 17.0, 1 / 19.0,
                      1 / 21.0, 1 / 23.0, 1 / 25.0, 1 / 27.0, 1 / 29.0, 1 / 31.0, 1 / 33.0);
  else
    return 2 * s * polynomial(q, 1.f, 1 / 3.f, 1 / 5.f, 1 / 7.f, 1 / 9.f, 1 / 11.f, 1 / 13.f);
}

// One activation of one vector; a and b are its parameters: alpha of ELU; beta and threshold of softplus; the slope
// softplus(beta) of LipSwish.
template <Activation kind, typename P>
IRESNET_FAST_INLINE P activate(P x, Element<P> a, Element<P> b) {
  P scale, part;
  if constexpr (kind == Activation::relu) {
    return at_least(x, Element<P>(0));
  } else if constexpr (kind == Activation::elu) {
    exponential(x < 0 ? x : x * 0, scale, part);
    return x > 0 ? x : a * (scale * part + (scale - 1));
  } else if constexpr (kind == Activation::softplus) {
    const P z = x * a;
    exponential(-magnitude(z), scale, part);
    const P smooth = (at_least(z, Element<P>(0)) + log_one_plus(scale * part + scale)) / a;
    return z > b ? x : smooth;
  } else if constexpr (kind == Activation::tanh) {
    exponential(-2 * magnitude(x), scale, part);
    const P below = scale * part + (scale - 1);  // e^(-2|x|) - 1
    const P size = -below / (below + 2);
    return x < 0 ? -size : size;
  } else if constexpr (kind == Activation::lipswish) {
    const P z = x * a;
    exponential(-magnitude(z), scale, part);
    const P e = scale * part + scale;
    const P swish = x * static_cast<Element<P>>(1 / 1.1) / (e + 1);
    return z < 0 ? swish * e : swish;
  } else {
    return x;
  }
}

}  // namespace iresnet_fast
