"""What each engine of this version can do, told without importing any engine's library.

`registry.require` refuses an option before anything is loaded and names the engine that has it, which may be one
whose library is not installed.
"""

from collections.abc import Mapping

from finetune.engines.base import Feature

FEATURES: Mapping[str, frozenset[Feature]] = {
    "mlx": frozenset(Feature),
    "pytorch": frozenset(Feature),
}
