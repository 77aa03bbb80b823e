"""Builds the compiled extension, and nothing else: the metadata is in pyproject.toml."""

import os
import shlex
import subprocess
import sys
import sysconfig
from glob import glob

from setuptools import setup

try:
    import torch
    from torch.utils import cpp_extension
except ModuleNotFoundError:
    sys.exit(
        "iresnet_fast is built against the PyTorch it will run with, and there is none here. "
        "Remedy: pip install torch, then pip install --no-build-isolation ."
    )


def compiler_works() -> bool:
    """Whether the C++ compiler (CXX, by default c++) exists, knows C++20 and finds Python's headers."""
    command = [
        *shlex.split(cpp_extension.get_cxx_compiler()),
        "-std=c++20",
        f"-I{sysconfig.get_path('include')}",
        "-fsyntax-only",
        "-x",
        "c++",
        "-",
    ]
    try:
        program = "#include <Python.h>\n#include <concepts>\nint main() { static_assert(std::integral<int>); }\n"
        return subprocess.run(command, input=program, text=True, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def cuda_wanted() -> bool:
    """CUDA sources are built for a CUDA build of torch, with an nvcc, where a GPU is seen or FORCE_CUDA=1."""
    forced = os.environ.get("FORCE_CUDA", "0") == "1"
    possible = torch.version.cuda is not None and cpp_extension.CUDA_HOME is not None
    if forced and not possible:
        sys.exit(
            f"FORCE_CUDA=1, but CUDA code cannot be built: torch {torch.__version__} was built for CUDA "
            f"{torch.version.cuda}, and nvcc's folder is {cpp_extension.CUDA_HOME}. "
            "Remedy: a CUDA build of torch and an nvcc (CUDA_HOME), or no FORCE_CUDA."
        )
    return possible and (forced or torch.cuda.is_available())


def extension():
    """The extension, or none where there is no compiler: the package then works through its reference."""
    if not compiler_works():
        print(
            f"warning: no C++20 compiler ({cpp_extension.get_cxx_compiler()!r}) that finds Python.h; installing "
            "iresnet_fast without its compiled extension. It works, slower. Remedy: install g++ (or set CXX) and "
            "Python's headers (python3-dev), and install again.",
            file=sys.stderr,
        )
        return []
    sources = ["csrc/library.cpp", *sorted(glob("csrc/common/*.cpp") + glob("csrc/cpu/*.cpp"))]
    # The standard by name: torch 2.11 would choose C++17.
    flags = {"cxx": ["-std=c++20", "-O3", "-fno-math-errno", "-fopenmp", "-Wall", "-Wextra", "-Wno-psabi"]}
    make, macros = cpp_extension.CppExtension, []
    if cuda_wanted():
        sources += sorted(glob("csrc/cuda/*.cpp") + glob("csrc/cuda/*.cu"))
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
        flags["nvcc"] = ["-std=c++20", "-O3", "--expt-relaxed-constexpr"]
        make, macros = cpp_extension.CUDAExtension, [("IRESNET_FAST_CUDA", None)]
        macros.append(("IRESNET_FAST_CUDA_ARCHITECTURES", f'"{os.environ["TORCH_CUDA_ARCH_LIST"]}"'))
    root = os.path.dirname(os.path.abspath(__file__))
    return [
        make(
            "iresnet_fast._C",
            sources,
            include_dirs=[os.path.join(root, "csrc")],
            define_macros=macros,
            extra_compile_args=flags,
            extra_link_args=["-fopenmp"],
        )
    ]


setup(ext_modules=extension(), cmdclass={"build_ext": cpp_extension.BuildExtension})
