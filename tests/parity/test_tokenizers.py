"""Real vocabularies: ids as published, ranges that cover the text, masks that decode to the answers."""

import json
import shutil
from pathlib import Path
from random import Random

import pytest

from finetune.core.errors import ModelError
from finetune.core.types import TokenEvent
from finetune.data.rows import Example, Message, Origin
from finetune.data.templates import choose_template
from finetune.data.tokenize import encode_each
from finetune.data.tokenizer import TextTokenizer
from finetune.generation.answers import AnswerText

FOLDERS = {
    "qwen3": "tokenizers/qwen3",
    "gpt2": "tokenizers/gpt2_117M",
    "dialogpt": "tokenizers/dialogpt_small",
    "llama2": "tokenizers/llama2",
    "stories": "models/stories260K",
}
DIALOGUE = (
    Message("user", "Na\u00efve caf\u00e9?"),
    Message("assistant", "Yes \U0001f642, \u65e5\u672c!"),
    Message("user", "  More "),
    Message("assistant", "def f(x):\n    return x"),
)


@pytest.fixture(scope="module")
def tokenizers(shared) -> dict[str, TextTokenizer]:
    return {name: TextTokenizer.open(shared / folder) for name, folder in FOLDERS.items()}


def squeezed(text: str) -> str:
    return "".join(text.split())


def test_gpt2_ids_are_those_that_were_published(shared, tokenizers):
    published = json.loads((shared / "tokenizers/reference_encodings/tokenizer_tests.json").read_text(encoding="utf-8"))
    cases = published["distilgpt2"]
    for case in cases:
        ids, _ = tokenizers["gpt2"].encode(case["input"])
        assert ids.tolist() == case["encoded"]["input_ids"], case["input"]
    assert cases


def test_llama_ids_are_those_that_were_published(shared, tokenizers):
    published = json.loads((shared / "tokenizers/reference_encodings/llama_encoded.json").read_text(encoding="utf-8"))
    ids = tokenizers["llama2"].prompt_ids(published["text"])

    assert list(ids) == published["token_ids"]


def test_a_sentencepiece_model_without_other_files_is_read(shared, tmp_path):
    shutil.copyfile(shared / "tokenizers/mistral/tokenizer.model.v1", tmp_path / "tokenizer.model")
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    tokenizer = TextTokenizer.open(tmp_path)

    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (32000, 1, 2)
    assert tokenizer.decode(tokenizer.encode("Hello there")[0]) == "Hello there"


@pytest.mark.parametrize("name", FOLDERS)
def test_ranges_cover_the_whole_text_in_order(tokenizers, name):
    text = "Na\u00efve caf\u00e9 \U0001f642\n\n  \u65e5\u672c  x\t1234 "
    _, offsets = tokenizers[name].encode(text)
    reached = 0
    for start, end in offsets.tolist():
        assert start <= reached
        assert end >= start
        reached = max(reached, end)
    assert reached == len(text)


@pytest.mark.parametrize("template", [None, "chatml", "alpaca", "llama2", "llama3", "mistral", "plain"])
@pytest.mark.parametrize("name", FOLDERS)
def test_trained_tokens_decode_to_the_answers_and_their_ends(tokenizers, name, template):
    tokenizer = tokenizers[name]
    chosen = choose_template(template, tokenizer)
    [row] = encode_each([Example(Origin("f", 1), DIALOGUE)], template=chosen, tokenizer=tokenizer)
    trained = tokenizer.decode(row.ids[row.mask], skip_special=False)
    answers = [DIALOGUE[1].content, DIALOGUE[3].content]
    reasoning = "<think></think>" if chosen.name == "tokenizer" and name == "qwen3" else ""

    assert squeezed(trained) == squeezed(f"{answers[0]}{chosen.turn_end}{reasoning}{answers[1]}{chosen.turn_end}")
    assert not row.mask[0]
    bos_starts = [int(token) for token in row.ids[:2]].count(tokenizer.bos_id)
    assert bos_starts == (1 if tokenizer.adds_bos or tokenizer.bos_id == row.ids[0] else 0)


SENTENCEPIECE = [
    "llama2/tokenizer.model",
    "mistral/tokenizer.model.v1",
    "mistral/mistral_instruct_tokenizer_240323.model.v3",
]
INDENTED = "def f():\n    return 1\n\ta  b   c" + " " * 17 + "d"
TEXTS = [
    INDENTED,
    " ",
    "  ",
    "   lead",
    "x\r\n\r\n y  ",
    "caf\u00e9 \U0001f642 \u65e5\u672c \u0928\u093f \u2581_",
    "Hello  there",
    "",
]


def opened_alone(model: Path, directory: Path, **settings: object) -> TextTokenizer:
    """The tokenizer of a directory that has `tokenizer.model` and settings."""
    shutil.copyfile(model, directory / "tokenizer.model")
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return TextTokenizer.open(directory)


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_a_sentencepiece_model_alone_gives_the_ids_of_its_own_library(name, shared, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(shared / "tokenizers" / name))
    tokenizer = opened_alone(shared / "tokenizers" / name, tmp_path)
    random = Random(0)
    parts = [
        "the",
        " ",
        "  ",
        "    ",
        "\n",
        "\t",
        "return",
        "\u65e5\u672c",
        "\U0001f642",
        "12",
        "\u0301",
        "\ufb01",
        "\xa0",
        "[",
    ]
    for text in [*TEXTS, *("".join(random.choices(parts, k=10)) for _ in range(500))]:
        ids = tokenizer.encode(text)[0].tolist()
        assert ids == reference.encode(text), text
        assert tokenizer.decode(ids) == reference.decode(ids)


def test_user_defined_pieces_are_never_cut_and_no_space_is_added_where_none_was(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "text").write_text("\n".join(f"some words  and {n} numbers <b>" for n in range(300)), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "made"),
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        user_defined_symbols=["<b>", "\u2581\u2581", "\u2581\u2581\u2581\u2581"],
        minloglevel=2,
    )
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "made.model"))
    tokenizer = opened_alone(tmp_path / "made.model", tmp_path)
    for text in [*TEXTS, "some<b>words<b>  7", "     numbers"]:
        assert tokenizer.encode(text)[0].tolist() == reference.encode(text), text


def test_tokens_beside_a_sentencepiece_model_have_their_ids(shared, tmp_path):
    model = shared / "tokenizers/llama2/tokenizer.model"
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 32000}', encoding="utf-8")
    added = {"32001": {"content": "<|im_end|>", "special": True}}
    tokenizer = opened_alone(model, tmp_path, added_tokens_decoder=added, bos_token="<s>", add_bos_token=True)
    assert tokenizer.encode("a<|im_end|>\n<pad>")[0].tolist() == [263, 32001, 29871, 13, 32000]
    assert tokenizer.prompt_ids("a") == (1, 263)
    assert "<|im_end|>" in tokenizer.special_tokens
    assert opened_alone(model, tmp_path, add_bos_token=False, bos_token="<s>").prompt_ids("a") == (263,)
    assert opened_alone(model, tmp_path, bos_token=None).prompt_ids("a") == (263,)  # "None" is a piece of its own
    assert opened_alone(model, tmp_path, add_prefix_space=False).encode("a")[0].tolist() == [29874]
    with pytest.raises(ModelError, match="cannot have the id 40000"):
        opened_alone(model, tmp_path, added_tokens_decoder={"40000": {"content": "<far>"}})


@pytest.mark.parametrize("name", ["qwen3", "dialogpt", "stories"])
def test_ids_are_those_of_transformers(shared, tokenizers, name):
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(str(shared / FOLDERS[name]), local_files_only=True)
    for text in ("Hello  there", "caf\u00e9 \U0001f642\n", "<s>a</s>", "<|im_start|>user\nHi<|im_end|>\n"):
        assert tokenizers[name].encode(text)[0].tolist() == reference(text, add_special_tokens=False).input_ids


def test_a_broken_tokenizer_directory_is_refused_by_name(tmp_path: Path):
    (tmp_path / "tokenizer.model").write_bytes(b"not a sentencepiece model")
    with pytest.raises(ModelError, match="no tokenizer could be read"):
        TextTokenizer.open(tmp_path)


@pytest.mark.parametrize("name", FOLDERS)
def test_an_answer_streamed_token_by_token_adds_up_to_its_text(tokenizers, name):
    tokenizer = tokenizers[name]
    prompt = tokenizer.prompt_ids("The prompt:")
    text = " e\u0301\u0323 \U0001f469\u200d\U0001f469\u200d\U0001f467 \u0928\u092e\u0938\u094d\u0924\u0947 \U0001d54f\n"
    ids = [*prompt, *tokenizer.prompt_ids("The prompt:" + text)[len(prompt) :]]
    answer = AnswerText(tokenizer, prompt)

    pieces = [answer.take(TokenEvent(0, token, 0.0)).text for token in ids[len(prompt) :]]
    pieces.append(answer.take(TokenEvent(0, None, 0.0, "stop")).text)

    assert "".join(pieces) == tokenizer.decode(ids)[len(tokenizer.decode(prompt)) :]
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
