"""`ft chat`: a conversation with a model, with its adapter switched on or off at any time."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from finetune.core.errors import FinetuneError, UsageError
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
from finetune.workflows.opening import OpenedSubject, open_subject
from finetune.workflows.subjects import find_subject


class Conversation:
    """Turns with one model. An answer that was left unfinished stays in the history as far as it came."""

    def __init__(
        self, opened: OpenedSubject, options: AnswerOptions, system: str | None, on_notice: Callable[[str], None]
    ) -> None:
        self._opened = opened
        self._options = options
        self._on_notice = on_notice
        self.history = ChatHistory(system)
        self.adapter_is_on = opened.adapter is not None

    @property
    def has_adapter(self) -> bool:
        """Whether there is something to switch on and off."""
        return self._opened.adapter is not None

    @property
    def template(self) -> str | None:
        """The name of the template that renders the turns."""
        return self._opened.template_name

    def switch_adapter(self, on: bool) -> None:
        """Answer with the adapter, or with the base alone, from the next turn on."""
        if on and not self.has_adapter:
            raise UsageError("There is no adapter to switch on. Start `ft chat` with --adapter, or with a run.")
        self.adapter_is_on = on

    def ask(self, text: str) -> Generator[str]:
        """The answer, piece by piece. Raises UsageError, and forgets the question, where it is too long."""
        request = self._request(text, self._opened.adapter if self.adapter_is_on else None)
        said = ""
        try:
            for piece in stream(self._opened.session.generator(), [request], self._opened.tokenizer):
                said += piece.text
                yield piece.text
        finally:
            self.history.answer(said)

    def compare(self, text: str) -> tuple[Answer, Answer]:
        """The answers of the base and of the adapter to the same turn; the conversation goes on with the adapter's."""
        if not self.has_adapter:
            raise UsageError("There is no adapter to compare with. Start `ft chat` with --adapter, or with a run.")
        request = self._request(text, None)
        both = [request, replace(request, adapter=self._opened.adapter)]
        try:
            base, tuned = answer_all(self._opened.session.generator(), both, self._opened.tokenizer)
        except BaseException:
            self.history.withdraw()
            raise
        self.history.answer(tuned.text)
        return base, tuned

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
    adapter: Path | str | None = None,
    checkpoint: str | None = None,
    backend: str | None = None,
    device: str | None = None,
    options: AnswerOptions | None = None,
    template: str | None = None,
    system: str | None = None,
    on_notice: Callable[[str], None] = lambda _message: None,
) -> Iterator[Conversation]:
    """Open a conversation for as long as the block lasts."""
    options = options or AnswerOptions()
    check_options(options)
    subject = find_subject(
        None if run is None else Path(run),
        model=model,
        adapter=None if adapter is None else Path(adapter),
        checkpoint=checkpoint,
        backend=backend,
        device=device,
    )
    with open_subject(subject, template=template, on_notice=lambda _message: None) as opened:
        yield Conversation(_with_template(opened, on_notice), options, system, on_notice)


def _with_template(opened: OpenedSubject, on_notice: Callable[[str], None]) -> OpenedSubject:
    """Turns need a template: a model without one gets the default, and that is said."""
    if opened.prompter.template is not None:
        return opened
    fallback = choose_template(None, opened.tokenizer)
    on_notice(f"{opened.source.name} has no chat template of its own: turns are rendered as {fallback.name}.")
    return replace(opened, prompter=replace(opened.prompter, template=fallback))
