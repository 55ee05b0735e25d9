"""The registry, the choice of a template, and the tokens that end an answer."""

import pytest
from tests.support.tiny_tokenizer import tiny_tokenizer

from finetune.core.errors import UsageError
from finetune.data.rows import Message
from finetune.data.templates import TemplateError, choose_template, registered_templates

ASK = (Message("user", "Hi"),)


def test_the_tokenizers_own_template_is_the_default():
    tokenizer = tiny_tokenizer(chat_template="{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    template = choose_template(None, tokenizer)

    assert template.name == "tokenizer"
    assert template.render(ASK) == "Hi</s>"


@pytest.mark.parametrize(("conversations", "name"), [(True, "chatml"), (False, "alpaca")])
def test_without_one_conversations_are_chatml_and_single_requests_alpaca(conversations, name):
    assert choose_template(None, tiny_tokenizer(), conversations=conversations).name == name


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(
        UsageError, match=r"data\.template=chatlm: there is no template of that name\. Did you mean chatml"
    ):
        choose_template("chatlm", tiny_tokenizer())


def test_a_tokenizer_template_that_does_not_exist_is_refused():
    with pytest.raises(UsageError, match="has no chat template"):
        choose_template("tokenizer", tiny_tokenizer())


def test_a_file_and_jinja_text_are_templates_too(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("<{{ messages[0].content }}>\n", encoding="utf-8")

    assert choose_template(str(path), tiny_tokenizer()).render(ASK) == "<Hi>"
    assert choose_template("({{ messages[0].content }})", tiny_tokenizer()).render(ASK) == "(Hi)"
    with pytest.raises(UsageError, match=r"none\.jinja: the template file cannot be read"):
        choose_template(str(tmp_path / "none.jinja"), tiny_tokenizer())


def test_a_person_adds_templates_by_putting_files_into_a_directory(tmp_path, monkeypatch):
    (tmp_path / "finetune" / "templates").mkdir(parents=True)
    (tmp_path / "finetune" / "templates" / "mine.jinja").write_text("1{{ messages[0].content }}", encoding="utf-8")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "chatml.jinja").write_text("2{{ messages[0].content }}", encoding="utf-8")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("FT_TEMPLATES", str(tmp_path / "more"))

    assert {"mine", "chatml", "alpaca"} <= set(registered_templates())
    assert choose_template("mine", tiny_tokenizer()).render(ASK) == "1Hi"
    assert choose_template("chatml", tiny_tokenizer()).render(ASK) == "2Hi"


def test_a_template_that_does_not_parse_is_refused_by_name_and_line():
    with pytest.raises(TemplateError, match=r"`custom` is not valid Jinja: .*line 1"):
        choose_template("{% for m in messages %}", tiny_tokenizer())


def test_alpaca_prints_an_input_section_only_where_there_is_an_input():
    template = choose_template("alpaca", tiny_tokenizer())
    with_input = template.render_prompt((Message("user", "Add\n1 2"),), fields={"instruction": "Add", "input": "1 2"})

    assert "### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n" in with_input
    assert "### Input" not in template.render_prompt(ASK)


@pytest.mark.parametrize(
    ("name", "chatml", "ends"),
    [("chatml", True, {"<|im_end|>", "</s>"}), ("chatml", False, {"</s>"}), ("mistral", True, {"</s>"})],
)
def test_stop_ids_are_the_end_of_turn_and_eos(name, chatml, ends):
    tokenizer = tiny_tokenizer(chatml=chatml)
    template = choose_template(name, tokenizer)

    assert template.stop_ids(tokenizer) == {tokenizer.token_id(text) for text in ends}
    assert template.stop_strings == ()


def test_an_end_of_turn_that_is_no_token_is_a_stop_string():
    template = choose_template("{% for m in messages %}{{ m.content }}[end]{% endfor %}", tiny_tokenizer())

    assert template.stop_strings == ("[end]",)
    assert template.turn_end == "[end]"
