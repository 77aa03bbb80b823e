"""The docstrings' examples hold."""

import doctest
import importlib
import pkgutil

import pytest
import torch

import iresnet_fast
import iresnet_fast as irf

MODULES = [
    module.name for module in pkgutil.walk_packages(iresnet_fast.__path__, "iresnet_fast.") if module.name[-2:] != "_C"
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    module = importlib.import_module(name)
    names = {"torch": torch, "irf": irf, **vars(irf.nn), **vars(module)}
    for example in doctest.DocTestFinder(exclude_empty=True).find(module, name, globs=names):
        if example.examples:
            torch.manual_seed(0)
            results = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example)
            assert results.failed == 0, example.name
