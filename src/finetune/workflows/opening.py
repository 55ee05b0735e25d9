"""Load what a person named: the model with its adapter, the tokenizer, and the template that training used."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from finetune.adapters.store import read_adapter
from finetune.config.schema import ModelConfig
from finetune.core.errors import UsageError
from finetune.core.paths import CHAT_TEMPLATE
from finetune.data.templates import Template, choose_template, template_source
from finetune.data.tokenizer import TextTokenizer
from finetune.engines.base import InferenceSession
from finetune.engines.registry import choose_engine
from finetune.generation.prompts import Prompter
from finetune.models.source import ModelSource, resolve_model
from finetune.workflows.subjects import Subject

PLAIN = "plain"  # the template of plain text, whose prompts are texts to continue
TUNED = "tuned"  # the adapter's name inside a session

OnNotice = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class OpenedSubject:
    """A model in memory, ready for prompts."""

    source: ModelSource
    tokenizer: TextTokenizer
    session: InferenceSession
    prompter: Prompter
    adapter: str | None  # to pass with each request; None where the model itself is what was asked for

    @property
    def template_name(self) -> str | None:
        """None where prompts are raw text."""
        return None if self.prompter.template is None else self.prompter.template.name


@contextmanager
def open_subject(
    subject: Subject, *, template: str | None = None, raw: bool = False, on_notice: OnNotice
) -> Iterator[OpenedSubject]:
    """Load a subject for as long as the block lasts; `raw` leaves the template out."""
    if raw and template is not None:
        raise UsageError(f"--raw and --template {template} contradict each other. Give one of them.")
    if subject.tuned_model is None:
        source, config = resolve_base(subject), subject.model
    else:
        source, config = resolve_model(str(subject.tuned_model)), whole_model(subject.model)
    say_what_was_assumed(subject, on_notice)
    tokenizer = TextTokenizer.open(source.path)
    chosen = None if raw else find_template(subject, tokenizer, template, on_notice)
    adapters = {} if subject.adapter is None else {TUNED: subject.adapter}
    with open_session(config, source.path, adapters) as session:
        name = None if subject.adapter is None else TUNED
        yield OpenedSubject(source, tokenizer, session, Prompter(tokenizer, chosen), name)


def say_what_was_assumed(subject: Subject, on_notice: OnNotice) -> None:
    """What the adapter's files leave open; those of a run leave nothing open."""
    if subject.adapter is not None and subject.run is None:
        for notice in read_adapter(subject.adapter).notices:
            on_notice(notice)


def resolve_base(subject: Subject) -> ModelSource:
    """The base; a run that started from random weights needs no weight files of it."""
    model = subject.model
    return resolve_model(model.name, revision=model.revision, weights=model.init == "pretrained")


def whole_model(base: ModelConfig) -> ModelConfig:
    """How to load a model that was written from `base`: with its type, and with the weights that are there."""
    return base.model_copy(update={"init": "pretrained", "quantization": None})


@contextmanager
def open_session(
    config: ModelConfig, model: Path, adapters: Mapping[str, Path] | None = None
) -> Iterator[InferenceSession]:
    """The engine's session over a model directory, with adapters by name."""
    session = choose_engine(config).open_inference(model, model_config=config, adapters=adapters or {})
    with closing(session):
        yield session


def find_template(
    subject: Subject, tokenizer: TextTokenizer, wanted: str | None, on_notice: OnNotice
) -> Template | None:
    """The template asked for, the one that training used, or the tokenizer's; None: the prompt is raw text."""
    name = wanted or trained_template(subject)
    if name is not None or tokenizer.chat_template is not None:
        template = choose_template(name, tokenizer)
        if template.source.strip() != template_source(PLAIN).strip():
            return template
        on_notice("The model was tuned on plain text: the prompt is given to it as raw text.")
        return None
    on_notice(f"{subject.model.name} has no chat template: the prompt is given to it as raw text.")
    return None


def trained_template(subject: Subject) -> str | None:
    """The template that the adapter or the model was tuned with, as far as it says so; a name or a path."""
    if subject.run is not None:
        return subject.run.template
    folder: Path | None = subject.adapter
    if folder is not None and (folder / CHAT_TEMPLATE).is_file():
        return str(folder / CHAT_TEMPLATE)
    return None
