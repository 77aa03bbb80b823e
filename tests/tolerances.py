"""The only table of tolerances: what is promised, and the tests hold the code to it."""

import torch

# Singular values, relative to the largest (numerics: gram at worst 3e-8, svd 1e-12).
SPECTRUM = {"gram": 3e-8, "svd": 1e-12}
# gram on random kernels of full rank.
SPECTRUM_FULL_RANK = 1e-12
# A proven bound may lie this far below a dense norm that was itself computed in float64.
NORM_ROUNDING = 1e-12
# The bound of a zero-padded operator at n = 32 above its true norm.
BOUND_TIGHTNESS = 1.08
# Round trips, relative, by dtype.
ROUND_TRIP = {torch.float64: 1e-10, torch.float32: 2e-6}
# Power iteration run to convergence against the dense norm.
POWER_ITERATION = 1e-6
# Operators against each other in float64 (adjoints, layers against matrices).
FLOAT64 = 1e-12
# enforce: dense norm over coeff.
ENFORCED = 1e-6
# Implicit gradients, and gradients over recomputed inputs, against plain backward, relative.
GRADIENT = {torch.float64: 1e-10, torch.float32: 1e-5}
# Latents and logits of the official code's weights, relative to their norm, float32.
OFFICIAL_AGREEMENT = 1e-5
# Grouped power iteration against float64, relative, float32.
GROUPED = 1e-5
# Residuals of the fused step, relative, by accumulation dtype.
UPDATE = {torch.float64: 1e-13, torch.float32: 1e-5}
# Whole-block inverses: ‖x + g(x) − y‖ evaluated in float64, relative to max(1, ‖y‖), at tol 1e-12 and 1e-6.
WHOLE_BLOCK = {torch.float64: 2e-6, torch.float32: 2e-6}
# A transformed, compiled, exported or copied model against the eager one, in float64; inverses to 1e-12.
CLOSE_TO_EAGER = 1e-9
# The norm of a weight whose u and v have settled above coeff, relative.
SETTLED = 2e-4
