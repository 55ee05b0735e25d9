"""The demo model's tokenizer: byte-level BPE whose tokens never join a space with a word.

A name then has the same tokens after a space and after a quotation mark, so that copying it from a
request into JSON is copying tokens. Merges are learned with spaces, words, digits and punctuation kept
apart; the file then names Qwen2's splitting, which other programs know and which gives the same tokens.
"""

from collections.abc import Iterable
from itertools import chain
from typing import Any

from finetune.demo.words import POOLS, words_of

END_OF_TEXT, TURN_START, TURN_END = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 3072
_WORD_WEIGHT = 600
_KEPT_APART = r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+|\s"
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str]) -> Any:
    """A `tokenizers.Tokenizer` of VOCABULARY tokens learned from `texts`.

    The words of the pools are repeated so often that most of them become one token, which is copied more surely.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _splitting(_KEPT_APART)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = [word for pool in POOLS for word in words_of(pool)] * _WORD_WEIGHT
    tokenizer.train_from_iterator(chain(texts, words), trainer)
    tokenizer.pre_tokenizer = _splitting(_QWEN2)
    return tokenizer


def _splitting(pattern: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def tokenizer_config(context: int) -> dict[str, object]:
    """The content of tokenizer_config.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
