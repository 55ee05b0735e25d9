"""A tokenizer as llama.cpp needs it: tokens with their kinds, scores or merges, and the splitting that it shall use.

llama.cpp does not read the rules of a tokenizer, it knows splittings by name. The name is found by what the
tokenizer's own splitting makes of a fixed text: no two of the known ones cut it alike. So a vocabulary of one's own
with a known splitting is known too, and an unknown splitting is refused.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.core.errors import ModelError
from finetune.data.sentencepiece import TokenKind, read_scores
from finetune.data.tokenizer import TextTokenizer
from finetune.export.gguf.pretokenizers import name_of_splitting

_SPACE = "\u2581"
_ADDED_SCORE = -1000.0
_UNUSED_SCORE = -10000.0
_NO_MERGE = "<none> <none>"  # llama.cpp insists on a list, and symbols start as single characters: this never applies


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens by id, and how texts become them. BPE has merges and no scores, SentencePiece scores and no merges."""

    model: str  # "gpt2" or "llama"
    splitting: str
    tokens: tuple[str, ...]
    kinds: tuple[TokenKind, ...]
    scores: tuple[float, ...] = ()
    merges: tuple[str, ...] = ()
    adds_space: bool | None = None  # in front of a text; None where that has no meaning
    notices: tuple[str, ...] = ()


def read_vocabulary(model: Path, tokenizer: TextTokenizer, rows: int, *, opens_special: bool = False) -> Vocabulary:
    """The vocabulary of a model directory, as long as its embedding of `rows`.

    `opens_special`: prompts begin with a special token. Raises ModelError for rules that llama.cpp does not have.
    """
    document = tokenizer.document()
    if not _is_sentencepiece(document):
        found = _byte_level(document, tokenizer, rows)
    else:
        found = _sentencepiece(model, document, rows)
        if _puts_space_first(document) and opens_special:  # llama.cpp would put it behind that token, too
            found = replace(found, adds_space=False)
    return replace(found, notices=(*_known_differences(document, found), *_surplus(document, rows)))


def _is_sentencepiece(document: Mapping[str, Any]) -> bool:
    kind = document["model"].get("type", "BPE")
    if kind != "BPE":
        raise ModelError(
            f"The tokenizer's model is {kind}; llama.cpp's vocabularies that can be written here are byte-level BPE "
            "and SentencePiece's BPE. Use --format merged."
        )
    return bool(document["model"].get("byte_fallback"))


def _byte_level(document: Mapping[str, Any], tokenizer: TextTokenizer, rows: int) -> Vocabulary:
    splitting = name_of_splitting(document, tokenizer.split)
    tokens, kinds = _tokens(document, rows)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in document["model"]["merges"]]
    return Vocabulary("gpt2", splitting, tokens, kinds, merges=tuple(merges) or (_NO_MERGE,))


def _sentencepiece(model: Path, document: Mapping[str, Any], rows: int) -> Vocabulary:
    tokens, kinds = _tokens(document, rows)
    kinds = tuple(
        TokenKind.BYTE if kind is TokenKind.NORMAL and len(text) == 6 and text.startswith("<0x") else kind
        for text, kind in zip(tokens, kinds, strict=True)
    )
    file = model / "tokenizer.model"
    known = read_scores(file) if file.is_file() else _scores_of_merges(document)
    scores = tuple(_score(text, kind, known) for text, kind in zip(tokens, kinds, strict=True))
    return Vocabulary("llama", "default", tokens, kinds, scores=scores, adds_space=_adds_space(document))


def _score(text: str, kind: TokenKind, known: Mapping[str, float]) -> float:
    if kind is TokenKind.UNUSED:
        return _UNUSED_SCORE
    if kind is TokenKind.CONTROL:
        return _ADDED_SCORE
    if kind is TokenKind.USER_DEFINED:  # such as runs of spaces, which merges make too
        return known.get(text, _ADDED_SCORE)
    return known.get(text, _UNUSED_SCORE if kind is TokenKind.NORMAL else 0.0)


def _scores_of_merges(document: Mapping[str, Any]) -> Mapping[str, float]:
    """Scores by the first merge that makes a piece: llama.cpp merges what has the best score first."""
    scores: dict[str, float] = {}
    for rank, pair in enumerate(document["model"]["merges"]):
        parts = pair.split(" ") if isinstance(pair, str) else pair
        scores.setdefault("".join(parts), -float(rank))
    return scores


def _tokens(document: Mapping[str, Any], rows: int) -> tuple[tuple[str, ...], tuple[TokenKind, ...]]:
    """Texts and kinds for every row of the embedding; ids without a token are `[PADi]`."""
    tokens = [f"[PAD{row}]" for row in range(rows)]
    kinds = [TokenKind.UNUSED] * rows
    unknown = document["model"].get("unk_token")
    for text, token in document["model"]["vocab"].items():
        if token < rows:
            tokens[token] = text
            kinds[token] = TokenKind.UNKNOWN if text == unknown else TokenKind.NORMAL
    for added in document["added_tokens"]:
        if added["id"] < rows:
            tokens[added["id"]] = added["content"]
            if kinds[added["id"]] is not TokenKind.UNKNOWN and added["content"] != "<unk>":
                kinds[added["id"]] = TokenKind.CONTROL if added["special"] else TokenKind.USER_DEFINED
            else:
                kinds[added["id"]] = TokenKind.UNKNOWN
    return tuple(tokens), tuple(kinds)


def _adds_space(document: Mapping[str, Any]) -> bool:
    return any(
        part.get("type") == "Prepend"
        or (part.get("type") == "Metaspace" and part.get("prepend_scheme", "always") != "never")
        for part in (*_parts(document.get("normalizer")), *_parts(document.get("pre_tokenizer")))
    )


def _parts(rule: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """The steps of a normaliser or a splitting, one by one."""
    if rule is None:
        return
    nested: Sequence[Mapping[str, Any]] = rule.get("normalizers") or rule.get("pretokenizers") or ()
    if not nested:
        yield rule
    for part in nested:
        yield from _parts(part)


def _puts_space_first(document: Mapping[str, Any]) -> bool:
    """Whether only the beginning of a text gets a space, and not what follows a special token."""
    return any(part.get("prepend_scheme") == "first" for part in _parts(document.get("pre_tokenizer")))


def _known_differences(document: Mapping[str, Any], found: Vocabulary) -> Iterator[str]:
    """What this tokenizer does and llama.cpp does not, one sentence each."""
    if found.splitting == "tekken":
        yield "llama.cpp cuts marks off their letters (Hindi, Thai, accents of their own): tokens there differ."
    kinds = {part.get("type") for part in _parts(document.get("normalizer"))}
    if kinds & {"NFC", "NFKC"}:
        yield "llama.cpp composes no accents (NFC): a letter and an accent of its own become other tokens than here."
    if _puts_space_first(document) and found.adds_space:
        yield "llama.cpp puts a space behind every special token, not only in front of a text: tokens there differ."
    elif _puts_space_first(document):
        yield "llama.cpp puts no space in front of a text that no special token opens: raw prompts differ in one token."
    greedy = sorted(
        added["content"] for added in document["added_tokens"] if added.get("lstrip") or added.get("rstrip")
    )
    if greedy:
        yield f"llama.cpp keeps the spaces beside {', '.join(greedy[:5])}, which this tokenizer swallows."


def _surplus(document: Mapping[str, Any], rows: int) -> Iterator[str]:
    beyond = sum(token >= rows for token in document["model"]["vocab"].values())
    beyond += sum(added["id"] >= rows for added in document["added_tokens"])
    if beyond:
        yield f"{beyond} tokens without a row in the embedding were left out: the model cannot read them."


def add_vocabulary(writer: Any, vocabulary: Vocabulary, tokenizer: TextTokenizer, template: "TemplateFacts") -> None:
    """Write the vocabulary, the special ids and the chat template to a `gguf.GGUFWriter`."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.splitting)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types([int(kind) for kind in vocabulary.kinds])
    if vocabulary.scores:
        writer.add_token_scores(list(vocabulary.scores))
    if vocabulary.model == "gpt2":
        writer.add_token_merges(list(vocabulary.merges))
    if vocabulary.adds_space is not None:
        writer.add_add_space_prefix(vocabulary.adds_space)
    _add_special_ids(writer, tokenizer, template)
    if template.source is not None:
        writer.add_chat_template(template.source)


@dataclass(frozen=True, slots=True)
class TemplateFacts:
    """The chat template of the prompts, and the token that ends an answer where it is not EOS."""

    source: str | None = None
    turn_end: int | None = None


def _add_special_ids(writer: Any, tokenizer: TextTokenizer, template: TemplateFacts) -> None:
    eos = tokenizer.eos_id
    # llama.cpp takes ids of its own for what a file leaves out. BOS is only named here: `add_bos` puts it.
    bos = tokenizer.bos_id if tokenizer.bos_id is not None else eos
    if bos is not None:
        writer.add_bos_token_id(bos)
    if eos is not None:
        writer.add_eos_token_id(eos)
    if template.turn_end is not None and template.turn_end != eos:
        writer.add_eot_token_id(template.turn_end)
    unknown = tokenizer.token_id(tokenizer.settings.unk_token or "")
    if unknown is not None:
        writer.add_unk_token_id(unknown)
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_add_bos_token(tokenizer.adds_bos)
    writer.add_add_eos_token(False)
