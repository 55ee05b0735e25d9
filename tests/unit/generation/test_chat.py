"""What a conversation remembers."""

from collections.abc import Sequence

import pytest

from finetune.core.errors import UsageError
from finetune.data.rows import Message
from finetune.generation.chat import ChatHistory


def words(messages: Sequence[Message]) -> int:
    return sum(len(message.content.split()) for message in messages)


def said(history: ChatHistory) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in history.messages]


def test_turns_follow_the_system_message() -> None:
    history = ChatHistory("Be brief.")
    history.ask("Hello")
    history.answer("Hi")
    assert said(history) == [("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi")]


def test_reset_keeps_the_system_message_and_system_keeps_the_turns() -> None:
    history = ChatHistory("Be brief.")
    history.ask("Hello")
    history.set_system("Be long.")
    assert said(history) == [("system", "Be long."), ("user", "Hello")]
    history.reset()
    assert said(history) == [("system", "Be long.")]
    history.set_system(None)
    assert said(history) == []


def test_a_question_without_an_answer_can_be_withdrawn() -> None:
    history = ChatHistory()
    history.ask("one")
    history.answer("two")
    history.withdraw()
    assert len(history.messages) == 2
    history.ask("three")
    history.withdraw()
    assert len(history.messages) == 2


def test_the_oldest_exchanges_are_forgotten_when_the_context_is_full() -> None:
    history = ChatHistory("stay")
    for number in range(3):
        history.ask(f"question {number}")
        history.answer(f"answer {number}")
    history.ask("the last")

    assert history.fit(words, limit=8) == 2
    assert [text for _, text in said(history)] == ["stay", "question 2", "answer 2", "the last"]


def test_a_message_longer_than_the_context_is_refused_with_both_counts() -> None:
    history = ChatHistory()
    history.ask("one two three")
    with pytest.raises(UsageError, match=r"3 tokens .* context is 3"):
        history.fit(words, limit=3)
