"""A conversation over a bigram model: history, adapter on and off, a context that fills up."""

import itertools
from pathlib import Path

import pytest
from tests.support.fake_inference import BigramSession, table
from tests.support.tiny_tokenizer import tiny_tokenizer

from finetune.core.errors import FinetuneError, UsageError
from finetune.data.templates import choose_template
from finetune.generation.prompts import Prompter
from finetune.generation.requests import AnswerOptions
from finetune.models.source import ModelSource
from finetune.workflows.chat import Conversation
from finetune.workflows.opening import OpenedSubject

TOKENIZER = tiny_tokenizer()
END = TOKENIZER.token_id("<|im_end|>")


def spelling(text: str) -> object:
    """A bigram table that answers `text` after the newline that ends a prompt of ChatML."""
    ids = TOKENIZER.encode(f"\n{text}")[0].tolist()
    return table({**dict(itertools.pairwise(ids)), ids[-1]: END})


def conversation(*, context: int | None = None, adapter: bool = True, system: str | None = None) -> Conversation:
    tables = {"tuned": spelling("tuned"), "other": spelling("othr")} if adapter else {}
    session = BigramSession(spelling("base"), tables)  # type: ignore[arg-type]
    source = ModelSource("fake", Path(), {}, "fake", 261, context)
    prompter = Prompter(TOKENIZER, choose_template("chatml", TOKENIZER))
    opened = OpenedSubject(source, TOKENIZER, session, prompter, "tuned" if adapter else None)
    names = {"mine": "tuned", "other": "other"} if adapter else {}
    return Conversation(opened, AnswerOptions(max_tokens=20), system, NOTICES.append, names)


NOTICES: list[str] = []


def turns(chat: Conversation) -> list[str]:
    return [message.content for message in chat.history.messages]


def test_turns_and_answers_are_remembered() -> None:
    chat = conversation(system="Be brief.")
    assert "".join(chat.ask("Hello")) == "tuned"
    assert "".join(chat.ask("Again")) == "tuned"
    assert turns(chat) == ["Be brief.", "Hello", "tuned", "Again", "tuned"]


def test_the_adapter_is_switched_between_turns() -> None:
    chat = conversation()
    chat.switch_adapter(None)
    assert "".join(chat.ask("Hello")) == "base"
    chat.switch_adapter("other")
    assert "".join(chat.ask("Hello")) == "othr"
    with pytest.raises(UsageError, match=r"no adapter 'tuned'\. Adapters: mine, other"):
        chat.switch_adapter("tuned")
    assert "".join(chat.ask("Hello")) == "othr"


def test_comparing_shows_all_and_goes_on_with_what_is_switched_on() -> None:
    chat = conversation()
    answers = chat.compare("Hello")
    assert {name: answer.text for name, answer in answers.items()} == {None: "base", "mine": "tuned", "other": "othr"}
    assert turns(chat) == ["Hello", "tuned"]
    chat.switch_adapter(None)
    chat.compare("Again")
    assert turns(chat)[2:] == ["Again", "base"]


def test_without_an_adapter_there_is_nothing_to_switch_or_compare() -> None:
    chat = conversation(adapter=False)
    assert "".join(chat.ask("Hello")) == "base"
    with pytest.raises(UsageError, match="no adapter"):
        chat.switch_adapter("mine")
    with pytest.raises(UsageError, match="no adapter"):
        chat.compare("Hello")
    assert turns(chat) == ["Hello", "base"]


def test_an_answer_that_is_left_early_stays_as_far_as_it_came() -> None:
    chat = conversation()
    pieces = chat.ask("Hello")
    shown = next(pieces)
    pieces.close()
    assert turns(chat) == ["Hello", shown]


def test_a_full_context_forgets_the_oldest_exchange_and_says_so() -> None:
    NOTICES.clear()
    chat = conversation(context=75)
    for question in ("one", "two", "three"):
        "".join(chat.ask(question))
    assert turns(chat)[0] == "two"
    assert "1 oldest" in NOTICES[0]


def test_a_message_that_is_too_long_is_refused_and_not_remembered() -> None:
    chat = conversation(context=60)
    with pytest.raises(FinetuneError, match="context is 60"):
        next(chat.ask("x" * 100))
    assert turns(chat) == []
    assert "".join(chat.ask("Hello")) == "tuned"
