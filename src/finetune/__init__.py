"""Fine-tune language models on the machine you own: LoRA, QLoRA, DoRA or in full, on MLX and PyTorch.

The verbs of `ft` as functions: `finetune.train`, `resume`, `evaluate`, `generate`, `generate_all`, `chat`,
`export_model`. Each is imported when it is first used, so that `import finetune` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.config.load import load_config
    from finetune.config.schema import RunConfig
    from finetune.core.errors import FinetuneError
    from finetune.core.types import Sampling
    from finetune.generation.requests import AnswerOptions
    from finetune.workflows.chat import chat
    from finetune.workflows.evaluate import evaluate
    from finetune.workflows.export import export as export_model
    from finetune.workflows.generate import generate, generate_all
    from finetune.workflows.train import TrainingResult, resume, train

__version__ = "0.1.0"

# name: where it is, and what it is called there. `export` is the name of a subpackage, hence `export_model`.
_LAZY = {
    "AnswerOptions": ("finetune.generation.requests", "AnswerOptions"),
    "FinetuneError": ("finetune.core.errors", "FinetuneError"),
    "RunConfig": ("finetune.config.schema", "RunConfig"),
    "Sampling": ("finetune.core.types", "Sampling"),
    "TrainingResult": ("finetune.workflows.train", "TrainingResult"),
    "chat": ("finetune.workflows.chat", "chat"),
    "evaluate": ("finetune.workflows.evaluate", "evaluate"),
    "export_model": ("finetune.workflows.export", "export"),
    "generate": ("finetune.workflows.generate", "generate"),
    "generate_all": ("finetune.workflows.generate", "generate_all"),
    "load_config": ("finetune.config.load", "load_config"),
    "resume": ("finetune.workflows.train", "resume"),
    "train": ("finetune.workflows.train", "train"),
}
__all__ = [
    "AnswerOptions",
    "FinetuneError",
    "RunConfig",
    "Sampling",
    "TrainingResult",
    "__version__",
    "chat",
    "evaluate",
    "export_model",
    "generate",
    "generate_all",
    "load_config",
    "resume",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _LAZY[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
