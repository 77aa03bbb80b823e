// Plain entry points of the CUDA kernels: no torch headers, so nvcc takes seconds and can check them on any machine.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/phase.h"

namespace iresnet_fast {

// The Gram matrices of a convolution at some frequencies, group by group of channels; both pointers are to device
// memory, and one of them is null.
struct GramMatrices {
  int order;
  int64_t groups;
  // From the kernel's autocorrelation: (groups, 1 + 2 shifts, order (order + 1) / 2), the coefficients of 1 and, for
  // each shift, of its cosine (real part) and sine (imaginary part).
  const double* coefficients;
  int shifts;
  const int64_t* shift;        // (shifts, 3)
  const int64_t* frequencies;  // flat indices on the grid
  SymbolShape shape;
  // Formed before: (count, groups, order, order), row-major.
  const double2* formed;
};

// Shifts whose phases a thread block holds beside its matrix.
constexpr int kMaxShifts = 128;

// Matrices of one launch.
constexpr int64_t kMaxMatrices = int64_t{1} << 30;

// The largest order whose matrix a thread block of this device can hold.
cudaError_t largest_gram_order(int device, int* order);

// values[f, g * order + i]: square roots of the eigenvalues, descending in i, for `count` frequencies. *wrong, in
// device memory, becomes 1 where eigenvalues do not match the trace and the Frobenius norm of their matrix.
cudaError_t launch_gram_values(const GramMatrices& gram, int64_t count, double* values, int* wrong,
                               cudaStream_t stream);

// *failed, in device memory, becomes 1 where shift * I - G has no Cholesky factorisation.
cudaError_t launch_gram_below(const GramMatrices& gram, int64_t count, double shift, int* failed, cudaStream_t stream);

}  // namespace iresnet_fast
