from tests.support.engine_fixtures import engine, llama, tied_llama, wide

import finetune.engines.mlx  # noqa: F401 - loads OpenBLAS before any test file imports mlx

__all__ = ["engine", "llama", "tied_llama", "wide"]
