"""The cases: every module here has a ``CASE``, which goes by the module's name."""

from importlib import import_module
from pkgutil import iter_modules

from ..case import Case

CASES: dict[str, Case] = {
    module.name: import_module(f".{module.name}", __name__).CASE for module in iter_modules(__path__)
}
