"""Packages that only parts need."""

import tomllib
from pathlib import Path

import pytest

from iresnet_fast import optional

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize("package", optional._PACKAGES)
def test_the_extra_that_is_named_brings_the_package(package, monkeypatch):
    name, extra = optional._PACKAGES[package]
    brought = [requirement.split(">")[0].split("[")[0] for requirement in PROJECT["optional-dependencies"][extra]]
    assert name in brought
    monkeypatch.setattr(optional, "find_spec", lambda wanted: None if wanted == package else wanted)
    with pytest.raises(ModuleNotFoundError, match=rf"^drawing needs {name}, .*'iresnet_fast\[{extra}\]'$"):
        optional.require("drawing", "torch", package)


def test_packages_that_are_there_are_no_error():
    optional.require("everything", "torch", "numpy")
