"""Which models a server has: a base, what was tuned on it, and how the prompts of each are made.

Every model gets the template that it was tuned with, and a run's record says whether it still is that one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from finetune.adapters.store import adapter_files
from finetune.config.schema import ModelConfig
from finetune.core.errors import ModelError, UsageError
from finetune.core.files import sha256_of
from finetune.core.paths import CHAT_TEMPLATE, RunPaths
from finetune.data.templates import Template, choose_template
from finetune.data.tokenizer import TextTokenizer
from finetune.generation.prompts import Prompter
from finetune.models.source import ModelSource, resolve_model
from finetune.serving.adapters import OpenedAdapter
from finetune.serving.catalogue import Catalogue, ServedModel
from finetune.workflows.opening import find_template, resolve_base, say_what_was_assumed, trained_template, whole_model
from finetune.workflows.record import read_record
from finetune.workflows.subjects import Subject, find_subject, is_run

OnNotice = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ServedBase:
    """The weights that stay in memory, and what can be said about them without loading them."""

    source: ModelSource
    config: ModelConfig
    tokenizer: TextTokenizer


@dataclass(slots=True)
class ServedModels:
    """What is served from the start; `adapters` by the engine's names, which are the clients' names here."""

    base: ServedBase
    catalogue: Catalogue
    adapters: dict[str, Path] = field(default_factory=dict)

    def add_adapter(self, name: str, subject: Subject, template: str | None, on_notice: OnNotice) -> None:
        """Serve an adapter. Raises UsageError for a name that is taken, and where its prompts would be others."""
        if name in self.catalogue.names:
            raise UsageError(f"Two models are called {name!r}. Give one of them another name (--name, --adapter).")
        assert subject.adapter is not None
        say_what_was_assumed(subject, on_notice)
        prompter = Prompter(self.base.tokenizer, checked_template(subject, self.base.tokenizer, template, on_notice))
        if subject.run is not None and (difference := other_base(subject.run.info, self.base.source)):
            on_notice(f"{name}: {difference}.")
        parent = self.catalogue.base.id
        root = subject.adapter.name if subject.run is None else _run_name(subject)
        self.catalogue.add(ServedModel(name, prompter, root, adapter=name, parent=parent))
        self.adapters[name] = subject.adapter


def models_to_serve(
    subject: Subject, *, name: str | None, adapters: Mapping[str, Path], template: str | None, on_notice: OnNotice
) -> ServedModels:
    """The base first, then what was tuned on it, then the adapters that were given by name.

    A run in a directory that is called like its base keeps that name, and the base is NAME-base.
    """
    has_adapter = subject.adapter is not None
    if subject.tuned_model is None:
        base_name = public_name(subject.model.name)
        if has_adapter and name is None and base_name == _run_name(subject):
            base_name += "-base"
        base = _open_base(resolve_base(subject), subject.model)
    else:
        base_name = name or _run_name(subject)
        base = _open_base(resolve_model(str(subject.tuned_model)), whole_model(subject.model))
    model = ServedModel(
        base_name if has_adapter or name is None else name,
        Prompter(base.tokenizer, _base_template(subject, base.tokenizer, template, on_notice)),
        base_name,
    )
    models = ServedModels(base, Catalogue(model, context_length=base.source.context_length))
    if has_adapter:
        models.add_adapter(name or _run_name(subject), subject, template, on_notice)
    for other, path in adapters.items():
        models.add_adapter(other, find_subject(adapter=path, model=subject.model.name), None, on_notice)
    return models


def _open_base(source: ModelSource, config: ModelConfig) -> ServedBase:
    return ServedBase(source, config, TextTokenizer.open(source.path))


def public_name(model: str) -> str:
    """What clients call a model: a directory's name without the path to it, or the name on the hub."""
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else model


def _run_name(subject: Subject) -> str:
    assert subject.run is not None
    return subject.run.paths.root.resolve().name


def _base_template(
    subject: Subject, tokenizer: TextTokenizer, wanted: str | None, on_notice: OnNotice
) -> Template | None:
    """A whole model has the template that it was tuned with; a bare base its own, else that of what was tuned on it."""
    if subject.tuned_model is not None:
        return checked_template(subject, tokenizer, wanted, on_notice)
    if wanted is None and tokenizer.chat_template is None and subject.adapter is not None:
        wanted = trained_template(subject)
    return find_template(Subject(subject.model), tokenizer, wanted, on_notice)


def checked_template(
    subject: Subject, tokenizer: TextTokenizer, wanted: str | None, on_notice: OnNotice
) -> Template | None:
    """The template of a tuned model. Raises UsageError where it or the tokenizer is not what the run trained with."""
    template = find_template(subject, tokenizer, wanted, on_notice)
    if subject.run is not None:
        require_same_tokens(subject.run.info, tokenizer, template, where=str(subject.run.paths.root))
    return template


def require_same_tokens(
    record: Mapping[str, Any], tokenizer: TextTokenizer, template: Template | None, *, where: str
) -> None:
    """Raises UsageError where prompts would be other tokens than in the training that `record` (run.json) is of."""
    problems = []
    if record["tokenizer"]["sha256"] != tokenizer.fingerprint:
        problems.append("the tokenizer is another one: serve it on the base that it was tuned on")
    if template is not None and record["template"]["sha256"] != template.sha256:
        name = record["template"]["name"]
        problems.append(f"the template {template.name!r} is not the one that it was tuned with ({name!r}): restore it")
    if problems:
        head = f"{where} cannot be served, because its prompts would not be training's:"
        raise UsageError("\n  ".join([head, *problems]))


def other_base(record: Mapping[str, Any], source: ModelSource) -> str | None:
    """How the base differs from the one that `record` (run.json) trained on; None where it does not."""
    if Path(str(record["model"]["path"])).resolve() == source.path.resolve():
        return None
    files: Mapping[str, str] = record["model"]["files"]
    changed = [name for name, digest in files.items() if _digest(source.path / name) != digest]
    if not changed:
        return None
    return f"it was tuned on {record['model']['name']}, and this base differs from that one ({', '.join(changed[:3])})"


@lru_cache(maxsize=64)
def _digest(file: Path) -> str | None:
    return sha256_of(file) if file.is_file() else None


def open_below(base: ServedBase, fallback: Prompter, path: Path, root: Path) -> OpenedAdapter:
    """An adapter that a client names, with nothing read from outside `root`. Raises FinetuneError.

    Its template is the file beside its weights, else the base's: a run's own configuration may name other files.
    """
    directory = RunPaths(path).adapter if is_run(path) else path
    beside = directory / CHAT_TEMPLATE
    for file in (*adapter_files(directory), beside):
        _require_below(root, file)
    prompter = fallback
    if beside.is_file():
        prompter = Prompter(base.tokenizer, choose_template(str(beside), base.tokenizer))
    for parent in list(directory.resolve().parents)[:2]:
        if parent.is_relative_to(root) and is_run(parent):
            _require_below(root, RunPaths(parent).run_info)
            record = read_record(RunPaths(parent))
            require_same_tokens(record, base.tokenizer, prompter.template, where=directory.name)
            if difference := other_base(record, base.source):
                raise ModelError(f"{difference}.")
    return OpenedAdapter(directory, prompter)


def _require_below(root: Path, file: Path) -> None:
    if not file.resolve().is_relative_to(root):
        raise UsageError(f"{file.name} is a link out of the server's adapter directory.")
