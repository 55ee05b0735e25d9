from tests.support.engine_fixtures import engine

import finetune.engines.mlx  # noqa: F401 - loads OpenBLAS before any test file imports mlx

__all__ = ["engine"]
