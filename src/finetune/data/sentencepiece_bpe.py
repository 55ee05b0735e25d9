"""A `tokenizer.model` of pieces that are merged (Llama 2, Mistral, Gemma) as a tokenizer of the `tokenizers` library.

transformers 5 ranks the merges by the ids of pieces, not by their scores. Llama's runs of spaces have low ids and the
lowest scores, so that it cuts indented code unlike the model's own tokenizer: '    return' as '▁▁▁▁', 'return'.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.data.sentencepiece import SentencePieceModel, TokenKind, read_sentencepiece

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

_SPACE = "▁"
_SPECIAL = {TokenKind.CONTROL, TokenKind.UNKNOWN}


def open_sentencepiece_bpe(file: Path, config: Mapping[str, Any], added: Mapping[str, int]) -> "Tokenizer | None":
    """The tokenizer, or None where the file holds another kind of model.

    `config` is tokenizer_config.json, `added` added_tokens.json: tokens beside the pieces, with their ids. Raises
    ModelError for a file that is no SentencePiece model, and ValueError for ids that no token can have.
    """
    model = read_sentencepiece(file)
    if not model.is_bpe or model.changes_text:
        return None
    from tokenizers import Tokenizer, models

    unknown = next((piece.text for piece in model.pieces if piece.kind is TokenKind.UNKNOWN), None)
    vocabulary = {piece.text: number for number, piece in enumerate(model.pieces)}
    merges = _merges(model, vocabulary)
    bpe = models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=model.byte_fallback)
    tokenizer = Tokenizer(bpe)
    wanted = config.get("add_prefix_space")
    _set_spaces(tokenizer, adds_space=model.adds_space if wanted is None else bool(wanted), config=config)
    _add_tokens(tokenizer, model, config, added)
    _set_ends(tokenizer, config)
    return tokenizer


def _merges(model: SentencePieceModel, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, the best score first, and of one score in the order of ids."""
    usable = {piece.text for piece in model.pieces if piece.kind in {TokenKind.NORMAL, TokenKind.USER_DEFINED}}
    found = []
    for piece in model.pieces:
        if piece.text not in usable:
            continue
        halves = ((piece.text[:cut], piece.text[cut:]) for cut in range(1, len(piece.text)))
        found += [(piece.score, left, right) for left, right in halves if left in usable and right in usable]
    found.sort(key=lambda way: (-way[0], vocabulary[way[1]], vocabulary[way[2]]))
    return [(left, right) for _, left, right in found]


def _set_spaces(tokenizer: "Tokenizer", *, adds_space: bool, config: Mapping[str, Any]) -> None:
    """Spaces are ▁ inside. Unless `legacy` is false, a space comes in front after each special token, too."""
    from tokenizers import decoders, normalizers, pre_tokenizers

    if adds_space and config.get("legacy") is False:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme="first", split=False)
    else:
        in_front = [normalizers.Prepend(_SPACE)] if adds_space else []
        tokenizer.normalizer = normalizers.Sequence([*in_front, normalizers.Replace(" ", _SPACE)])
    back: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*back, decoders.Strip(" ", left=1)] if adds_space else back)


def _add_tokens(
    tokenizer: "Tokenizer", model: SentencePieceModel, config: Mapping[str, Any], added: Mapping[str, int]
) -> None:
    """Pieces that are never cut, then the tokens of other files, at their ids."""
    from tokenizers import AddedToken

    for piece in model.pieces:
        if piece.kind in _SPECIAL:
            tokenizer.add_tokens([AddedToken(piece.text, special=True, normalized=False)])
        elif piece.kind is TokenKind.USER_DEFINED:  # normalized: found where spaces are ▁ already
            tokenizer.add_tokens([AddedToken(piece.text, normalized=not model.adds_space)])
    for number, token in sorted(_added(config, added).items()):
        tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != number:
            raise ValueError(f"the added token {token.content!r} cannot have the id {number}")


def _added(config: Mapping[str, Any], added: Mapping[str, int]) -> dict[int, "AddedToken"]:
    from tokenizers import AddedToken

    flags = ("special", "normalized", "lstrip", "rstrip", "single_word")
    tokens = {number: AddedToken(text, normalized=False) for text, number in added.items()}
    for number, entry in config.get("added_tokens_decoder", {}).items():
        tokens[int(number)] = AddedToken(entry["content"], **{flag: bool(entry.get(flag)) for flag in flags})
    return tokens


def _set_ends(tokenizer: "Tokenizer", config: Mapping[str, Any]) -> None:
    """The tokens around a text: one at its start unless `add_bos_token` is false, one at its end if asked for."""
    from tokenizers import processors

    def known(name: str, default: str, *, wanted: bool) -> list[tuple[str, int]]:
        value = config.get(f"{name}_token", default)
        text = value.get("content") if isinstance(value, dict) else value
        number = tokenizer.token_to_id(text) if wanted and isinstance(text, str) else None
        return [] if number is None else [(str(text), number)]

    first = known("bos", "<s>", wanted=config.get("add_bos_token", True) is not False)
    last = known("eos", "</s>", wanted=bool(config.get("add_eos_token")))
    single = [*(text for text, _ in first), "$A", *(text for text, _ in last)]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[*first, *last])
