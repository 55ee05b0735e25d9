"""Text to token ids and back, with the place in the text that each token covers.

A thin wrapper over the `tokenizers` library: the fast tokenizer of a model directory, read offline, never with
the directory's own code. `tokenizer.json` is read as it is; older layouts are converted by transformers.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from finetune.core.errors import ModelError
from finetune.core.files import read_json
from finetune.core.types import IntArray
from finetune.data.buffers import joined
from finetune.data.sentencepiece_bpe import open_sentencepiece_bpe
from finetune.data.word_memory import WordMemory

_LARGEST_ID = 100_000_000
_AT_ONCE = 16  # texts; the library holds some hundred bytes for each of their tokens
SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True, slots=True)
class TokenizerSettings:
    """What the files beside the vocabulary say. Tokens are their texts; None where there is none."""

    bos_token: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None
    unk_token: str | None = None
    chat_template: str | None = None


class TextTokenizer:
    """Encodes and decodes; knows the special tokens and the chat template of its model."""

    def __init__(self, backend: Any, settings: TokenizerSettings, *, adds_bos: bool | None = None) -> None:
        backend.no_truncation()  # a limit or padding stored in tokenizer.json would cut or fill rows in silence
        backend.no_padding()
        self._backend = backend
        self.settings = settings
        self.bos_id = self._id(settings.bos_token)
        self.eos_id = self._id(settings.eos_token)
        fallbacks = (self._id(settings.pad_token), self.eos_id, self._id(settings.unk_token), 0)
        self.pad_id: int = next(token for token in fallbacks if token is not None)
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.chat_template = settings.chat_template
        self.adds_bos = self._post_processor_adds_bos() if adds_bos is None else adds_bos and self.bos_id is not None
        added = backend.get_added_tokens_decoder().values()
        self.special_tokens = frozenset(
            {token.content for token in added if token.special}
            | {text for text in (settings.bos_token, settings.eos_token) if text}
        )

    @classmethod
    def open(cls, path: Path) -> "TextTokenizer":
        """Read the tokenizer of a model directory. Raises ModelError where there is none that can be read."""
        backend = _read_backend(path)
        return cls(backend, _read_settings(path, backend))

    def encode(self, text: str) -> tuple[IntArray, IntArray]:
        """Token ids [n] and character ranges [n, 2]. Adds nothing; special tokens in the text are recognised."""
        return next(self.encode_batch([text]))

    def encode_batch(self, texts: Sequence[str]) -> Iterator[tuple[IntArray, IntArray]]:
        """`encode` for many texts, which is faster than one by one. Of few at a time are the ranges in memory."""
        for start in range(0, len(texts), _AT_ONCE):
            yield from self._encoded(texts[start : start + _AT_ONCE])

    def _encoded(self, texts: Sequence[str]) -> Iterator[tuple[IntArray, IntArray]]:
        found = [None if self._words is None else self._words.encode(text) for text in texts]
        rest = [text for text, tokens in zip(texts, found, strict=True) if tokens is None]
        others = map(_arrays, self._backend.encode_batch(rest, add_special_tokens=False) if rest else ())
        return (next(others) if tokens is None else tokens for tokens in found)

    def prompt_ids(self, text: str) -> tuple[int, ...]:
        """The ids to generate from: `text` with exactly one BOS where the model wants one."""
        return tuple(int(token) for token in self.with_one_bos(self.encode(text)[0]))

    def with_one_bos(self, ids: IntArray) -> IntArray:
        """Add the BOS that the tokenizer adds by itself, or take away one that the template doubled."""
        if self.bos_id is None:
            return ids
        leading = 0
        while leading < len(ids) and ids[leading] == self.bos_id:
            leading += 1
        if leading > 1 and self.bos_id != self.eos_id:
            return ids[leading - 1 :]
        if leading == 0 and self.adds_bos:
            return joined(np.array([self.bos_id], np.int32), ids)
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of the ids."""
        return str(self._backend.decode([int(token) for token in ids], skip_special_tokens=skip_special))

    def token_text(self, token: int) -> str:
        """The vocabulary's own name of a token, e.g. `Ġthe`."""
        return str(self._backend.id_to_token(int(token)))

    def token_id(self, text: str) -> int | None:
        """The id of a token given by its exact text; None where the vocabulary lacks it."""
        return self._id(text)

    def document(self) -> dict[str, Any]:
        """What `tokenizer.json` would hold: the vocabulary, the merges and every rule."""
        return dict(json.loads(self.to_json()))

    def split(self, text: str) -> list[str]:
        """The pieces into which the rules cut a text before any merge; the whole text where there are none."""
        splitter = self._backend.pre_tokenizer
        return [text] if splitter is None else [piece for piece, _range in splitter.pre_tokenize_str(text)]

    @cached_property
    def _words(self) -> WordMemory | None:
        return WordMemory.of(self._backend)

    def __getstate__(self) -> dict[str, Any]:  # another process remembers words of its own
        return {name: value for name, value in self.__dict__.items() if name != "_words"}

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the vocabulary and its rules."""
        return hashlib.sha256(self.to_json().encode("utf-8")).hexdigest()

    def to_json(self) -> str:
        """The vocabulary and its rules, as tokenizer.json has them."""
        return str(self._stored_form())

    def _stored_form(self) -> str:
        if self.largest_id > _LARGEST_ID:  # the library goes through all ids up to it
            raise ModelError(f"The tokenizer has token {self.largest_id}, which no model has. Copy it again.")
        return str(self._backend.to_str())

    @cached_property
    def largest_id(self) -> int:
        """The largest id that it can make; -1 without any."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)

    def _id(self, token: str | None) -> int | None:
        found = None if not token else self._backend.token_to_id(token)
        return None if found is None else int(found)

    def _post_processor_adds_bos(self) -> bool:
        ids = self._backend.encode("a", add_special_tokens=True).ids
        return self.bos_id is not None and bool(ids) and ids[0] == self.bos_id


def _arrays(encoding: Any) -> tuple[IntArray, IntArray]:
    try:
        ids = np.array(encoding.ids, dtype=np.int32)
    except OverflowError:
        raise ModelError(f"The tokenizer makes token {max(encoding.ids)}, which no model has. Copy it again.") from None
    offsets = np.array(encoding.offsets, dtype=np.int32).reshape(-1, 2)
    if len(ids):
        # Some tokenizers trim spaces from the ranges: a gap belongs to the token that follows it.
        reached = np.concatenate([[0], np.maximum.accumulate(offsets[:-1, 1])])
        offsets[:, 0] = np.minimum(offsets[:, 0], reached)
    return ids, offsets


def _read_backend(path: Path) -> Any:
    from tokenizers import Tokenizer

    stored = path / "tokenizer.json"
    try:
        if stored.is_file():
            return Tokenizer.from_file(str(stored))
        if (path / "merges.txt").is_file() and not (path / "tokenizer_config.json").is_file():
            return _byte_level_bpe(path)
        return _converted(path)
    except Exception as error:
        # `tokenizers` raises plain Exception for every fault of a file.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{path}: no tokenizer could be read ({reason}). A model directory needs tokenizer.json, "
            "or vocab.json with merges.txt, or tokenizer.model."
        ) from error


def _byte_level_bpe(path: Path) -> Any:
    """GPT-2's layout from before tokenizer_config.json."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    backend = Tokenizer(models.BPE.from_file(str(path / "vocab.json"), str(path / "merges.txt")))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if backend.token_to_id("<|endoftext|>") is not None:
        backend.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    return backend


def _converted(path: Path) -> Any:
    if not any((path / name).is_file() for name in ("merges.txt", "tokenizer.model", "spiece.model", "vocab.txt")):
        raise FileNotFoundError("there is no tokenizer file")
    if (path / "tokenizer.model").is_file():
        config, added = _json(path / "tokenizer_config.json"), _json(path / "added_tokens.json")
        backend = open_sentencepiece_bpe(path / "tokenizer.model", config, added)
        if backend is not None:
            return backend
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} has no fast version, which character ranges need")
    return tokenizer.backend_tokenizer


def _read_settings(path: Path, backend: Any) -> TokenizerSettings:
    config = _json(path / "special_tokens_map.json") | _json(path / "tokenizer_config.json")
    tokens: dict[str, str | None] = {name: _token_text(config.get(name)) for name in SPECIAL_NAMES}
    model = _json(path / "config.json") | _json(path / "generation_config.json")
    for name in ("bos_token", "eos_token", "pad_token"):
        if tokens[name] is None and name not in config:
            tokens[name] = _text_of_id(backend, model.get(f"{name}_id"))
    if tokens["eos_token"] is None and backend.token_to_id("<|endoftext|>") is not None:
        tokens["eos_token"] = "<|endoftext|>"
    return TokenizerSettings(**tokens, chat_template=_chat_template(path, config))


def _chat_template(path: Path, config: dict[str, Any]) -> str | None:
    beside = path / "chat_template.jinja"
    if beside.is_file():
        return beside.read_text(encoding="utf-8")
    template = config.get("chat_template") or _json(path / "chat_template.json").get("chat_template")
    if isinstance(template, list):  # several named templates; `default` is the one for conversations
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) and template else None


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not valid JSON ({error}). Copy the file again from where the model is.") from error
    return content if isinstance(content, dict) else {}


def _token_text(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) and text else None


def _text_of_id(backend: Any, token: Any) -> str | None:
    first = token[0] if isinstance(token, list) and token else token
    return backend.id_to_token(first) if isinstance(first, int) and first >= 0 else None
