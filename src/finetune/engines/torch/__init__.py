"""The PyTorch engine: transformers' models on CPU, CUDA or MPS."""

import os

# On a CPU, in bfloat16 and where weights lie in its order, oneDNN compiles a product for each shape that it meets. Both
# it and PyTorch keep the last 1,024 of them, some 800 MB; keeping 128 costs no time. Read once, by `torch`.
for _cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_cache, "128")
