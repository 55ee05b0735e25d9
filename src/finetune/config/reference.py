"""`docs/configuration.md`, made from the schema: an option is documented where it is defined, and nowhere else.

`python -m finetune.config.reference > docs/configuration.md` writes it; a test compares the two.
"""

import sys
import types
import typing
from importlib import resources
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from finetune.config.layers import profile_names, short
from finetune.config.options import Option, options, sections
from finetune.config.yaml_lines import read_yaml

INTRODUCTION = """# Configuration

This page is made from the schema (`src/finetune/config/schema.py`); do not edit it by hand.

One YAML file describes a run. `ft train` reads `config/train.yml`, `ft train --config FILE` another one, and
`ft train validate FILE` checks it together with the data before anything is trained. Unknown keys are refused.

```yaml
{example}```

A value is taken from the last of these places that gives it; errors say which one it was:

1. the default, in the tables below
2. a profile: `--profile {profiles}`
3. the file
4. the environment: `FT_TRAINING__LEARNING_RATE=1e-4` sets `training.learning_rate`
5. `--set training.learning_rate=1e-4`
6. a named option: `--learning-rate 1e-4`

Values in the environment and after `--set` are read as YAML: `null`, `true`, `1e-4`, `[q_proj, v_proj]`. Paths
are relative to the directory that the command runs in. An option that has no effect beside the others (a
`min_learning_rate` of a constant schedule) is an error, not a surprise. `ft train schema` prints a JSON schema
for editors.
"""

EXAMPLE = """model:
  name: demo
lora:
  rank: 16
training:
  learning_rate: 1e-4
  epochs: 3
data:
  train_file: data/train.jsonl
output:
  output_dir: outputs/first
"""


def reference() -> str:
    """The whole page as Markdown."""
    parts = [INTRODUCTION.format(example=EXAMPLE, profiles=" | ".join(profile_names()))]
    parts += [_section(name, model) for name, model in sections().items()]
    parts.append(_profiles())
    return "\n".join(parts)


def _section(name: str, model: type[BaseModel]) -> str:
    rows = [_row(option) for option in options().values() if option.section == name]
    head = [f"## {name}", "", (model.__doc__ or "").strip(), "", "| key | values | default | |", "|---|---|---|---|"]
    return "\n".join([*head, *rows, ""])


def _row(option: Option) -> str:
    default = "**required**" if option.required else _default(option.default)
    return f"| `{option.name}` | {values_of(option.field)} | {default} | {option.description} |"


def _default(value: Any) -> str:
    if value is None or value == {}:
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def values_of(field: FieldInfo) -> str:
    """What an option takes, in words: `whole number > 0`, `linear, cosine`, `text`."""
    bounds = [
        f"{sign} {bound:g}" if isinstance(bound, float) else f"{sign} {bound}"
        for item in field.metadata
        for sign, name in ((">", "gt"), (">=", "ge"), ("<", "lt"), ("<=", "le"))
        if (bound := getattr(item, name, None)) is not None
    ]
    return " ".join([_type(field.annotation), ", ".join(bounds)]).strip()


def _type(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(member) for member in arguments if member is not type(None))
    if origin is typing.Annotated:
        return values_of(FieldInfo.from_annotation(annotation))
    if origin is tuple:
        return "list"
    words = {int: "whole number", float: "number", bool: "`true`, `false`", str: "text"}
    return words.get(annotation, "mapping")


def _profiles() -> str:
    lines = ["## Profiles", "", "A profile is a starting point; whatever you give yourself goes before it.", ""]
    for name in profile_names():
        text = (resources.files("finetune.config") / "profiles" / f"{name}.yml").read_text(encoding="utf-8")
        purpose = text.partition("\n")[0].removeprefix("# ")
        values = read_yaml(text).value
        settings = ", ".join(
            f"`{section}.{key}: {short(value)}`" for section in values for key, value in values[section].items()
        )
        lines.append(f"- **{name}** {purpose} {settings}")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.stdout.write(reference())
