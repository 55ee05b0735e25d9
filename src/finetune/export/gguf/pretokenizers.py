"""llama.cpp's splittings of byte-level BPE, recognised by what they make of one text."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from finetune.core.errors import ModelError

# Contractions in both cases, runs of digits and of spaces, breaks, tabs, signs, letters of several scripts and cases,
# marks on their own, an emoji of several code points: no two known splittings treat all of them alike.
PROBE = (
    "It's THEY'RE we'll I'D 'tis\n\n \t  x\r\n  12345 7 3.14 ½ ²   end \u00a0no\u3000wide\n"
    "\t\tif (a!=b){c[i]+=1;}//\n/n camelCaseHTTPServer ÀÉ naïve e\u0301 \u0301x ДОМ дом 東京で123 العربية 한국어 "
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 ''' --- ..., $5.00 "
)
# Hash of the pieces, and whether a piece that is a token is taken whole before any merge -> llama.cpp's name.
KNOWN: Mapping[str, str] = {
    "f978d90c24b144a59cee8c59b9720c5280ecaea272097f40ba75fd30928d34c3": "gpt-2",  # GPT-2, DialoGPT
    "998bae1c1e1d7973960138dccec7e595d92925dd39335f2da1ffafd523924671": "qwen2",  # Qwen 2, 2.5, 3; the demo model
    "d62f9ccfc1b93b8f496290283e7fee0385f3cc797c61e3196fe82135a63d6d9c": "llama-bpe",  # Llama 3, 3.1, 3.2, 3.3
    "1479342bf152ff5aa2935e0ea2afea99f4ba0dcf13f1f6d7fc91e164e34b044d": "dbrx",  # Llama 3's, merging every piece
    "06529c260ddd6c494b0f9c4d3bce63a02f7c2b9f5849056a561590a5b16ee233": "tekken",  # Mistral NeMo and later
    "50bc4287ccf8ef878709d8b85b902e41ae1a78448a7d2ce0c401ceab5c97bc65": "smollm",  # SmolLM, SmolLM2
}
_ANY = "gpt-2"


def name_of_splitting(document: Mapping[str, Any], split: Callable[[str], Sequence[str]]) -> str:
    """llama.cpp's name for a tokenizer's splitting. Raises ModelError, with the rules, for an unknown one."""
    if not document["model"]["merges"]:
        return _ANY  # nothing is merged, so every splitting gives the same tokens
    key = fingerprint(split(PROBE), takes_whole=bool(document["model"].get("ignore_merges")))
    if key not in KNOWN:
        rules = json.dumps(document.get("pre_tokenizer"), ensure_ascii=False)
        raise ModelError(
            f"The tokenizer splits text in a way that is not known to llama.cpp here ({key[:12]}): {rules[:300]}. "
            "A file with another splitting would answer differently. Use --format merged."
        )
    return KNOWN[key]


def fingerprint(pieces: Sequence[str], *, takes_whole: bool) -> str:
    """A hash of how a text was cut."""
    return hashlib.sha256(json.dumps([list(pieces), takes_whole]).encode()).hexdigest()
