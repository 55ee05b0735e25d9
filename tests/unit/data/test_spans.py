"""Masks: every answer with its end token, nothing else, for templates of every kind."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.tiny_tokenizer import tiny_tokenizer

from finetune.data.rows import Example, Message, Origin
from finetune.data.spans import render_example
from finetune.data.templates import Template, TemplateError, choose_template
from finetune.data.tokenize import EncodedExample, covered, encode_each

ORIGIN = Origin("f", 1)
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "look", "arguments": {"city": "Oslo"}}}
DIALOGUE = (
    Message("user", "Hi?"),
    Message("assistant", "Hello."),
    Message("user", "More"),
    Message("assistant", "Sure\nthing"),
)
TOOLS = (
    Message("user", "Weather?"),
    Message("assistant", "", (CALL,)),
    Message("tool", '{"t": 3}', name="look", tool_call_id="abcdefghi"),
    Message("assistant", "3 degrees"),
)
THINKS = (
    Message("user", "a"),
    Message("assistant", "<think>\nhm\n</think>\n\nHello."),
    Message("user", "b"),
    Message("assistant", "<think>\nwell\n</think>\n\nBye"),
)

REASONING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1].lstrip('\n') }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GENERATION = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }}{% endgeneration %}</s>\n"
    "{% else %}U:{{ m.content }}\n{% endif %}{% endfor %}"
)
SPEAKERS = (
    "{% for m in messages %}{{ m.role.upper() }}: {{ m.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def rendered(source: str, messages, **settings):
    template = Template("custom", source, tiny_tokenizer(**settings))
    return render_example(template, Example(ORIGIN, tuple(messages)))


def answers(row) -> list[str]:
    return [row.text[start:end] for start, end in row.spans]


def encoded(name: str | None, messages, *, train_on_prompt=False, **settings) -> tuple[EncodedExample, str]:
    tokenizer = tiny_tokenizer(**settings)
    template = choose_template(name, tokenizer)
    [row] = encode_each(
        [Example(ORIGIN, tuple(messages))], template=template, tokenizer=tokenizer, train_on_prompt=train_on_prompt
    )
    assert row.refusal is None
    return row, tokenizer.decode(row.ids[row.mask], skip_special=False)


@pytest.mark.parametrize(
    ("name", "trained"),
    [
        ("chatml", "Hello.<|im_end|>Sure\nthing<|im_end|>"),
        ("alpaca", "Hello.</s>Sure\nthing</s>"),
        ("llama2", " Hello. </s> Sure\nthing </s>"),
        ("llama3", "Hello.</s>Sure\nthing</s>"),
        ("mistral", " Hello.</s> Sure\nthing</s>"),
        ("plain", "Hello.</s>Sure\nthing</s>"),
    ],
)
def test_mask_covers_exactly_the_answers_and_their_end_tokens(name, trained):
    row, text = encoded(name, DIALOGUE)

    assert text == trained
    assert not row.mask[0]


@pytest.mark.parametrize("name", ["chatml", "alpaca", "llama2", "llama3", "mistral", "plain"])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_row_never_starts_with_two_bos(name, adds_bos):
    row, _ = encoded(name, DIALOGUE, adds_bos=adds_bos)
    bos = tiny_tokenizer().bos_id

    leading = row.ids[:2] == bos
    assert not leading[1]
    assert leading[0] or not adds_bos


def test_end_token_is_trained_where_padding_is_eos():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_id = tokenizer.eos_id
    template = choose_template("alpaca", tokenizer)
    [row] = encode_each([Example(ORIGIN, DIALOGUE[:2])], template=template, tokenizer=tokenizer)

    assert row.ids[-1] == tokenizer.eos_id
    assert row.mask[-1]


def test_plain_text_is_trained_in_full_and_ends_with_eos():
    tokenizer = tiny_tokenizer()
    template = choose_template("plain", tokenizer)
    [row] = encode_each([Example(ORIGIN, text="Once")], template=template, tokenizer=tokenizer)

    assert row.ids[0] == tokenizer.bos_id
    assert tokenizer.decode(row.ids[row.mask], skip_special=False) == "Once</s>"


def test_train_on_prompt_trains_everything_but_the_first_token():
    row, _ = encoded("chatml", DIALOGUE, train_on_prompt=True)

    assert row.mask.tolist() == [False] + [True] * (len(row.ids) - 1)


def test_tool_calls_are_trained_and_results_are_not():
    _, text = encoded("chatml", TOOLS)

    assert text == (
        '<tool_call>\n{"name": "look", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>3 degrees<|im_end|>'
    )


def test_a_template_that_drops_earlier_reasoning_keeps_its_mask():
    row = rendered(REASONING, THINKS)

    assert answers(row) == ["Hello.<|im_end|>", "<think>\nwell\n</think>\n\nBye<|im_end|>"]


def test_generation_blocks_are_taken_at_their_word_and_grow_to_the_end_token():
    assert answers(rendered(GENERATION, DIALOGUE)) == ["Hello.</s>", "Sure\nthing</s>"]


def test_a_template_without_end_tokens_gets_eos_after_the_last_answer():
    row = rendered(SPEAKERS, DIALOGUE)

    assert answers(row) == [" Hello.", " Sure\nthing"]
    assert row.needs_eos
    assert row.text.endswith("Sure\nthing")


def test_white_space_that_the_template_strips_does_not_shift_the_mask():
    spaced = (Message("user", " Hi? \n"), Message("assistant", "\n Hello. "))

    assert answers(rendered(SPEAKERS, spaced)) == [" Hello."]


def test_equal_words_in_prompt_and_answer_are_told_apart():
    parrot = (Message("user", "Hello."), Message("assistant", "Hello."))
    row = rendered(SPEAKERS, parrot)

    assert row.spans == ((len("USER: Hello.\nASSISTANT:"), len("USER: Hello.\nASSISTANT: Hello.")),)


def test_a_conversation_that_ends_with_a_request_trains_what_stands_before():
    _, text = encoded("chatml", DIALOGUE[:3])

    assert text == "Hello.<|im_end|>"


@pytest.mark.parametrize(
    ("source", "messages", "reason"),
    [
        (SPEAKERS, TOOLS, "`custom` has no place for tool calls"),
        (GENERATION, TOOLS, "`custom` has no place for tool calls"),
        ("{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}{% endif %}{% endfor %}", DIALOGUE,
         "leaves out what the user says"),
        ("{{ raise_exception('no') }}", DIALOGUE, "`custom` cannot render this: no"),
        ("{{ messages[9].content }}", DIALOGUE, "cannot render this"),
        (SPEAKERS, (Message("user", "a\ufdd1"), Message("assistant", "b")), "noncharacters"),
    ],
    ids=["calls", "calls in generation", "no user", "raises", "fails", "marks in the data"],
)  # fmt: skip
def test_a_template_that_cannot_be_masked_for_certain_is_refused_by_name(source, messages, reason):
    with pytest.raises(TemplateError, match=reason):
        rendered(source, messages)


def test_content_that_a_template_leaves_out_is_reported():
    no_system = (
        "{% for m in messages %}{% if m.role != 'system' %}{{ m.role }}: {{ m.content }}</s>\n{% endif %}{% endfor %}"
    )

    assert rendered(no_system, (Message("system", "Be brief."), *DIALOGUE)).unseen_roles == ("system",)


def test_a_token_that_straddles_prompt_and_answer_is_trained():
    offsets = np.array([[0, 3], [3, 5], [5, 5], [5, 9]])

    assert covered(offsets, [(4, 6)]).tolist() == [False, True, False, True]


def test_prompt_of_a_generation_is_the_beginning_of_the_trained_text():
    tokenizer = tiny_tokenizer()
    for name in ("chatml", "alpaca", "llama2", "llama3", "mistral", "plain"):
        template = choose_template(name, tokenizer)
        text = render_example(template, Example(ORIGIN, DIALOGUE)).text
        assert text.startswith(template.render_prompt(DIALOGUE[:1]))
        assert text.startswith(template.render_prompt(DIALOGUE[:3]))


def test_a_header_that_a_template_forgets_in_prompts_is_added():
    forgetful = "{% for m in messages %}[{{ m.role }}]\n{{ m.content }}</s>\n{% endfor %}"
    template = Template("custom", forgetful, tiny_tokenizer())

    assert template.render_prompt(DIALOGUE[:1]) == "[user]\nHi?</s>\n[assistant]\n"
    assert answers(rendered(forgetful, DIALOGUE)) == ["Hello.</s>", "Sure\nthing</s>"]


WORDS = st.text(st.characters(exclude_categories=("Cs", "Cn"), exclude_characters="<"), min_size=1, max_size=12).filter(
    lambda text: text.strip()
)


@settings(max_examples=80)
@given(
    st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4),
    st.sampled_from(["chatml", "llama2", "llama3", "mistral"]),
)
def test_trained_tokens_decode_to_the_answers_and_their_ends_whatever_is_said(pairs, name):
    messages = [Message(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)]
    _, trained = encoded(name, messages)
    end = "<|im_end|>" if name == "chatml" else "</s>"
    expected = "".join(f"{answer if name == 'chatml' else answer.strip()}{end}" for _, answer in pairs)

    assert trained.replace(" ", "") == expected.replace(" ", "")
