"""What each token stands for, in bytes: for log-probabilities, and for answers that must match a grammar."""

import threading
from typing import Any

from finetune.data.tokenizer import TextTokenizer


class Vocabulary:
    """Built on first use, because a large one takes seconds. Any thread may ask."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._table: Any = None

    def bytes_of(self, token: int) -> bytes:
        """The bytes that a token adds to a text; parts of a character have no text of their own."""
        return bytes(self.table().decode_bytes([token]))

    def text_of(self, token: int) -> str:
        """The same for people; incomplete characters become U+FFFD."""
        return self.bytes_of(token).decode("utf-8", errors="replace")

    def table(self) -> Any:
        """llguidance's view of the tokenizer."""
        with self._lock:
            if self._table is None:
                import llguidance

                self._table = llguidance.LLTokenizer(self._tokenizer.to_json(), eos_token=self._tokenizer.eos_id)
            return self._table
