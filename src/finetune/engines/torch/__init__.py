"""The PyTorch engine: transformers' models on CPU, CUDA or MPS."""
