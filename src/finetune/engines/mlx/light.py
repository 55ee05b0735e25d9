"""mlx-lm without its tokenizers.

`import mlx_lm` brings transformers, and PyTorch with it where that is installed: two seconds of a processor and 200 MB.
None of it is needed to build and run models; text is read by `data/tokenizer.py`.
"""

import importlib
import sys
from functools import cache
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

_PACKAGE, _UTILS, _TOKENIZERS = "mlx_lm", "mlx_lm.utils", "mlx_lm.tokenizer_utils"


def import_lightly() -> None:
    """Put a package `mlx_lm` in place whose modules can be imported, and which imports nothing by itself.

    Who asks it for anything else, as in `mlx_lm.load`, gets the whole package then.
    """
    spec = find_spec(_PACKAGE)
    if _PACKAGE in sys.modules or spec is None or spec.loader is None:
        return
    package, loader = module_from_spec(spec), spec.loader

    def complete(name: str) -> Any:
        if name.startswith("__") and name != "__version__":  # inspection asks every module for such names
            raise AttributeError(name)
        vars(package).pop("__getattr__", None)
        loader.exec_module(package)
        return getattr(package, name)

    vars(package)["__getattr__"] = complete
    sys.modules[_PACKAGE] = package


@cache
def utils() -> ModuleType:
    """`mlx_lm.utils` with nothing in place of tokenizers. Who imports that module later gets one with them."""
    if _UTILS in sys.modules:
        return sys.modules[_UTILS]
    stand_in = ModuleType(_TOKENIZERS)
    vars(stand_in).update(TokenizerWrapper=object, load=None)
    present = sys.modules.setdefault(_TOKENIZERS, stand_in)
    try:
        return importlib.import_module(_UTILS)
    finally:
        if present is stand_in:
            _forget(_TOKENIZERS, _UTILS)


def _forget(*names: str) -> None:
    for name in names:
        sys.modules.pop(name, None)
        vars(sys.modules[_PACKAGE]).pop(name.removeprefix(f"{_PACKAGE}."), None)
