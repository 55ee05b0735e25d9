"""Fine-tune language models on the machine you own: LoRA, QLoRA, DoRA or in full, on MLX and PyTorch."""

__version__ = "0.1.0"
