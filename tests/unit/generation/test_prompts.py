"""What a model reads: one BOS, the template of training, or the text as it is."""

from pathlib import Path

import pytest
from tests.support.tiny_tokenizer import tiny_tokenizer

from finetune.core.errors import ModelError
from finetune.data.rows import Message
from finetune.data.templates import Template, choose_template
from finetune.data.tokenizer import TextTokenizer
from finetune.generation.prompts import Prompter


def test_raw_text_gets_exactly_one_bos_where_the_tokenizer_adds_one() -> None:
    prompter = Prompter(tiny_tokenizer(adds_bos=True), None)
    bos = prompter.tokenizer.bos_id

    for text in ("ab", "<s>ab"):
        ids = prompter.prompt(text).ids
        assert ids[0] == bos
        assert ids.count(bos) == 1


def test_raw_text_gets_no_bos_where_the_tokenizer_adds_none() -> None:
    tokenizer = tiny_tokenizer(adds_bos=False)
    assert tokenizer.bos_id not in Prompter(tokenizer, None).prompt("ab").ids


@pytest.mark.parametrize("adds_bos", [True, False])
def test_an_empty_prompt_is_the_token_that_begins_a_text(adds_bos: bool) -> None:
    tokenizer = tiny_tokenizer(adds_bos=adds_bos)
    assert Prompter(tokenizer, None).prompt("").ids == (tokenizer.bos_id,)


def test_raw_text_ends_at_eos_alone() -> None:
    tokenizer = tiny_tokenizer()
    assert Prompter(tokenizer, None).prompt("ab").stop_tokens == {tokenizer.eos_id}


def test_a_prompt_is_a_user_message_in_the_template_and_ends_where_its_turns_end() -> None:
    tokenizer = tiny_tokenizer()
    prompt = Prompter(tokenizer, choose_template("chatml", tokenizer)).prompt("ab", system="be")

    assert prompt.text.endswith("<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n")
    assert "<|im_start|>system\nbe<|im_end|>" in prompt.text
    assert tokenizer.token_id("<|im_end|>") in prompt.stop_tokens
    assert tokenizer.eos_id in prompt.stop_tokens


ANSWER_MARK = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }} [END]\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_an_end_of_turn_that_is_no_token_ends_the_answer_as_text() -> None:
    tokenizer = tiny_tokenizer()
    prompt = Prompter(tokenizer, choose_template(ANSWER_MARK, tokenizer)).prompt("ab")
    assert prompt.text == "user: ab [END]\nassistant: "
    assert prompt.stop_strings == ("[END]",)


def test_a_conversation_without_a_template_is_refused() -> None:
    with pytest.raises(ModelError, match="needs a template"):
        Prompter(tiny_tokenizer(), None).messages([Message("user", "ab")])


def test_the_prompt_of_generation_begins_the_row_of_training(shared: Path) -> None:
    tokenizer = TextTokenizer.open(shared / "tokenizers/qwen3")
    template: Template = choose_template(None, tokenizer)
    asked = [Message("system", "Be brief."), Message("user", "What is 2 + 2?")]

    prompt = Prompter(tokenizer, template).messages(asked)
    row = template.render([*asked, Message("assistant", "4")])

    assert row.startswith(prompt.text)
    assert tuple(tokenizer.encode(row)[0][: len(prompt.ids)]) == prompt.ids
