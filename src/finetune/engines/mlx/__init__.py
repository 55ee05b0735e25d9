"""The MLX engine. Importing the package loads OpenBLAS, which has to come before the first `import mlx`."""

from finetune.engines.mlx.blas import load_openblas

load_openblas()
