"""`ft chat`: a conversation with a model, with its adapter switched on or off at any time."""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from finetune.core.errors import FinetuneError, UsageError
from finetune.core.paths import CHAT_TEMPLATE
from finetune.data.rows import Message
from finetune.data.templates import choose_template
from finetune.generation.chat import ChatHistory
from finetune.generation.requests import (
    Answer,
    AnswerOptions,
    TextRequest,
    answer_all,
    check_options,
    fit_to_context,
    stream,
)
from finetune.workflows.opening import TUNED, OpenedSubject, open_subject, trained_template
from finetune.workflows.subjects import Subject, find_subject, is_run

RESULT = "adapter"  # the directory of a run that holds its result


class Conversation:
    """Turns with one model. An answer that was left unfinished stays in the history as far as it came.

    `adapters` names what may answer beside the base, by the session's names; the first of them begins.
    """

    def __init__(
        self,
        opened: OpenedSubject,
        options: AnswerOptions,
        system: str | None,
        on_notice: Callable[[str], None],
        adapters: Mapping[str, str],
    ) -> None:
        self._opened = opened
        self._options = options
        self._on_notice = on_notice
        self._adapters = adapters
        self.history = ChatHistory(system)
        self.adapter = next(iter(adapters), None)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of what may answer beside the base."""
        return tuple(self._adapters)

    @property
    def template(self) -> str | None:
        """The name of the template that renders the turns."""
        return self._opened.template_name

    def switch_adapter(self, name: str | None) -> None:
        """Answer with an adapter, or with the base alone (None), from the next turn on."""
        if name is not None and name not in self._adapters:
            known = ", ".join(self._adapters) or "none: start `ft chat` with --adapter, or with a run"
            raise UsageError(f"There is no adapter {name!r}. Adapters: {known}.")
        self.adapter = name

    def ask(self, text: str) -> Generator[str]:
        """The answer, piece by piece. Raises UsageError, and forgets the question, where it is too long."""
        request = self._request(text, self._engine_name(self.adapter))
        said = ""
        try:
            for piece in stream(self._opened.session.generator(), [request], self._opened.tokenizer):
                said += piece.text
                yield piece.text
        finally:
            self.history.answer(said)

    def compare(self, text: str) -> dict[str | None, Answer]:
        """The answers of the base (None) and of every adapter to the same turn, decoded together.

        The conversation goes on with the answer of what is switched on.
        """
        if not self._adapters:
            raise UsageError("There is no adapter to compare with. Start `ft chat` with --adapter, or with a run.")
        names = [None, *self._adapters]
        request = self._request(text, None)
        requests = [replace(request, adapter=self._engine_name(name)) for name in names]
        try:
            found = answer_all(self._opened.session.generator(), requests, self._opened.tokenizer)
        except BaseException:
            self.history.withdraw()
            raise
        answers = dict(zip(names, found, strict=True))
        self.history.answer(answers[self.adapter].text)
        return answers

    def _engine_name(self, name: str | None) -> str | None:
        return None if name is None else self._adapters[name]

    def _request(self, text: str, adapter: str | None) -> TextRequest:
        """The next prompt; the oldest exchanges are forgotten, and that is said, where the context is full."""
        self.history.ask(text)
        limit = self._opened.source.context_length
        try:
            forgotten = 0 if limit is None else self.history.fit(self._length, limit)
            prompt = self._opened.prompter.messages(self.history.messages)
            request = fit_to_context(TextRequest(prompt, self._options, adapter), limit)
        except FinetuneError:
            self.history.withdraw()
            raise
        if forgotten:
            self._on_notice(f"The context is full: the {forgotten} oldest exchanges are forgotten.")
        return request

    def _length(self, messages: Sequence[Message]) -> int:
        return len(self._opened.prompter.messages(messages).ids)


@contextmanager
def chat(
    run: Path | str | None = None,
    *,
    model: str | None = None,
    adapters: Mapping[str, Path | str] | None = None,
    checkpoint: str | None = None,
    backend: str | None = None,
    device: str | None = None,
    options: AnswerOptions | None = None,
    template: str | None = None,
    system: str | None = None,
    on_notice: Callable[[str], None] = lambda _message: None,
) -> Iterator[Conversation]:
    """Open a conversation for as long as the block lasts; `adapters`, by name, may answer beside the run's own."""
    options = options or AnswerOptions()
    check_options(options)
    named = {name: Path(path) for name, path in (adapters or {}).items()}
    first, others = _first(None if run is None else Path(run), model, named)
    subject = find_subject(
        None if run is None else Path(run),
        model=model,
        adapter=named.get(first) if first is not None else None,
        checkpoint=checkpoint,
        backend=backend,
        device=device,
    )
    with open_subject(subject, template=template, on_notice=lambda _message: None) as loaded:
        opened = _with_template(loaded, on_notice)
        names = {} if opened.adapter is None else {first or _own_name(subject): opened.adapter}
        for name, path in others.items():
            if name in names:
                raise UsageError(f"Two adapters are called {name!r}. Give one another name: --adapter NAME=PATH.")
            names[name] = _load(opened, name, find_subject(model=subject.model.name, adapter=path), on_notice)
        yield Conversation(opened, options, system, on_notice, names)


def _first(run: Path | None, model: str | None, adapters: Mapping[str, Path]) -> tuple[str | None, dict[str, Path]]:
    """The adapter that is opened with the model, where no run brings its own, and the others."""
    of_run = run is not None or (model is not None and is_run(Path(model)))
    first = None if of_run else next(iter(adapters), None)
    return first, {name: path for name, path in adapters.items() if name != first}


def _load(opened: OpenedSubject, name: str, other: Subject, on_notice: Callable[[str], None]) -> str:
    """Put another adapter beside the base; the session's name of it."""
    if other.adapter is None:
        raise UsageError(f"--adapter {name}: the run tuned every weight, so it has no adapter for this base.")
    trained, used = trained_template(other), opened.template_name
    if trained is not None and Path(trained).stem not in {used, Path(CHAT_TEMPLATE).stem}:
        on_notice(f"{name} was tuned with the template {Path(trained).stem}, and turns are rendered as {used}.")
    opened.session.load_adapter(name, other.adapter)
    return name


def _own_name(subject: Subject) -> str:
    """What to call the adapter of a run that a person named as the model."""
    return TUNED if subject.run is None else subject.run.paths.root.resolve().name


def name_of(path: Path) -> str:
    """What to call the adapter or the run at a path: the name of its directory, or of the run that it lies in."""
    whole = path.resolve()
    return whole.parent.name if whole.name == RESULT else whole.name


def _with_template(opened: OpenedSubject, on_notice: Callable[[str], None]) -> OpenedSubject:
    """Turns need a template: a model without one gets the default, and that is said."""
    if opened.prompter.template is not None:
        return opened
    fallback = choose_template(None, opened.tokenizer)
    on_notice(f"{opened.source.name} has no chat template of its own: turns are rendered as {fallback.name}.")
    return replace(opened, prompter=replace(opened.prompter, template=fallback))
