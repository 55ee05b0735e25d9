"""Log-probabilities of tokens in the shapes of the two endpoints."""

from collections.abc import Iterable, Sequence
from typing import Any

from finetune.generation.answers import Token
from finetune.serving.vocabulary import Vocabulary

# What JSON can say about a probability of zero, and about none (NaN): `max(_LEAST, ...)` covers both.
_LEAST = -9999.0


def chat_logprobs(tokens: Iterable[Token], vocabulary: Vocabulary) -> dict[str, Any]:
    """`choices[].logprobs` of a chat completion."""
    return {"content": [_chat_token(token, vocabulary) for token in tokens], "refusal": None}


def _chat_token(token: Token, vocabulary: Vocabulary) -> dict[str, Any]:
    likeliest = [_named(other, logprob, vocabulary) for other, logprob in token.alternatives]
    return {**_named(token.id, token.logprob, vocabulary), "top_logprobs": likeliest}


def _named(token: int, logprob: float, vocabulary: Vocabulary) -> dict[str, Any]:
    content = vocabulary.bytes_of(token)
    text = content.decode("utf-8", errors="replace")
    return {"token": text, "logprob": max(_LEAST, logprob), "bytes": list(content)}


def text_logprobs(tokens: Sequence[Token], vocabulary: Vocabulary, *, top: int) -> dict[str, Any]:
    """`choices[].logprobs` of a completion."""
    likeliest = [
        {vocabulary.text_of(other): max(_LEAST, logprob) for other, logprob in reversed(token.alternatives)}
        for token in tokens
    ]
    return {
        "tokens": [vocabulary.text_of(token.id) for token in tokens],
        "token_logprobs": [max(_LEAST, token.logprob) for token in tokens],
        "top_logprobs": likeliest if top else None,
        "text_offset": [token.start for token in tokens],
    }
