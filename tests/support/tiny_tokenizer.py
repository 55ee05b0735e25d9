"""A byte-level tokenizer made on the spot: one token a byte, BOS, EOS, and ChatML's markers if wanted."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from finetune.data.tokenizer import TextTokenizer, TokenizerSettings

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = ("<s>", "</s>", "<pad>")
CHATML = ("<|im_start|>", "<|im_end|>")


def tiny_backend(*, chatml: bool = True) -> Tokenizer:
    """256 byte tokens, then the special ones."""
    vocabulary = {character: number for number, character in enumerate(BYTES)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    names = (*SPECIAL, *(CHATML if chatml else ()))
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return backend


def tiny_tokenizer(*, adds_bos: bool = True, chatml: bool = True, chat_template: str | None = None) -> TextTokenizer:
    settings = TokenizerSettings(bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=chat_template)
    return TextTokenizer(tiny_backend(chatml=chatml), settings, adds_bos=adds_bos)
