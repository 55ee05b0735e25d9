"""The README.md of an export: what it is, from which data, how good, how to load it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune.export.formats import ExportFormat
from finetune.export.verify import Comparison

_LOADING: Mapping[ExportFormat, str] = {
    "peft": """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base!r})
model = PeftModel.from_pretrained(base, "path/to/this/directory")
```

Or `ft generate --model {base} --adapter path/to/this/directory --prompt "..."`.""",
    "mlx": """```python
from mlx_lm import generate, load

model, tokenizer = load({base!r}, adapter_path="path/to/this/directory")
```

Or `ft generate --model {base} --adapter path/to/this/directory --prompt "..."`.""",
    "merged": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")
```

mlx-lm loads it as it is: `mlx_lm.load("path/to/this/directory")`. Or `ft generate --model path/to/this/directory
--prompt "..."`.""",
}
_PACKED = """```python
from mlx_lm import generate, load

model, tokenizer = load("path/to/this/directory")
```

Or `ft generate --model path/to/this/directory --prompt "..."`."""


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What the card says. Maps are label -> value, in the order in which they are shown; they may be empty."""

    title: str
    format: ExportFormat
    base: str
    method: Mapping[str, Any]
    comparison: Comparison | None  # None: the base was not at hand
    data: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)
    template: str | None = None
    packed: bool = False  # a whole model in MLX's quantised form


def model_card(facts: CardFacts) -> str:
    """The text, with the front matter that model hubs read."""
    base = facts.base or "BASE"
    sections = [
        _front_matter(facts),
        f"# {facts.title}\n\n" + (f"Tuned from `{base}` with finetune." if facts.base else "Written by finetune."),
        _section("Method", facts.method),
        _section("Data", facts.data),
        _section("Figures", facts.figures),
        "## How to load it\n\n" + (_PACKED if facts.packed else _LOADING[facts.format].format(base=base)),
        f"Prompts are rendered by the template `{facts.template}`." if facts.template else "",
        _checked(facts.comparison),
    ]
    return "\n\n".join(text for text in sections if text) + "\n"


def _front_matter(facts: CardFacts) -> str:
    library = "mlx" if facts.packed else {"peft": "peft", "mlx": "mlx", "merged": "transformers"}[facts.format]
    base = f"base_model: {facts.base}\n" if facts.base else ""
    return f"---\n{base}library_name: {library}\ntags:\n- finetune\n---"


def _section(title: str, facts: Mapping[str, Any]) -> str:
    lines = "\n".join(f"- {label}: {_shown(value)}" for label, value in facts.items() if value is not None)
    return f"## {title}\n\n{lines}" if lines else ""


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _checked(comparison: Comparison | None) -> str:
    if comparison is None:
        return (
            "## Not checked\n\nThe base was not on the machine of the export, so this adapter was converted without a "
            "comparison of its predictions."
        )
    return (
        "## Checked\n\n"
        f"This directory was loaded again and compared with the original on {comparison.tokens:,} tokens: "
        f"{difference(comparison)}."
    )


def difference(comparison: Comparison) -> str:
    """How far an export is from its original, beside how far the base is."""
    limit = "" if comparison.tolerance is None else f"{comparison.tolerance:.0e} allowed: "
    divergence, effect = comparison.divergence, comparison.adapter_effect
    tuning = f", where the tuning itself changes them by up to {effect:.2g}" if effect else ""
    base = f", where the untuned base has {divergence.base:.2g}" if effect else ""
    model = "tuned" if effect else "original"
    return (
        f"log-probabilities differ by at most {comparison.largest_difference:.1e} nats ({limit}{comparison.reason})"
        f"{tuning}; KL divergence from the {model} model {divergence.exported:.1e} nats a token{base}"
    )
