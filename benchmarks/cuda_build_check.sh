#!/usr/bin/env bash
# The whole extension, CUDA included, compiles, links and loads: in an environment of its own with a CUDA build of torch.
# Needs nvcc and a few GB; no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
folder=${2:-.venv-cuda}
PATH="${CUDA_HOME:+$CUDA_HOME/bin:}$PATH"
command -v nvcc >/dev/null || { echo "cuda-build-check needs nvcc on the PATH (or in CUDA_HOME)" >&2; exit 2; }
[ -e "$folder/.packages" ] || {
  "$python" -m venv "$folder"
  # An index that only has CPU builds of this version would defeat the purpose.
  PIP_FIND_LINKS= "$folder/bin/pip" install --quiet --disable-pip-version-check torch==2.11.0 "setuptools>=77,<82" ninja==1.13.2 numpy==2.4.6
  touch "$folder/.packages"
}
# Where nvcc itself says it lives; the nvcc on the PATH may be a wrapper.
touch "$folder/empty.cu"
top=$(nvcc --dryrun -c "$folder/empty.cu" -o /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p')
export CUDA_HOME=${CUDA_HOME:-$(realpath "$top")}
export FORCE_CUDA=1
rm -rf "$folder/site"  # pip does not replace what lies in a target folder
PATH="$PWD/$folder/bin:$PATH" "$folder/bin/pip" install --quiet --disable-pip-version-check --no-build-isolation --no-deps \
  --force-reinstall --target "$folder/site" .
cd "$folder"
PYTHONPATH=site bin/python - <<'PROGRAM'
import torch
from iresnet_fast import _extension

assert _extension.loaded, _extension.missing_reason
for op in ("conv_symbol", "conv_singular_values", "conv_norm_below"):
    for device in ("cpu", "cuda"):
        assert _extension.serves(op, device), (op, device)
print(f"built, linked and loaded beside torch {torch.__version__}:", _extension.build_info())
PROGRAM
