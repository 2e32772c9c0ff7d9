"""Token ids to text, one at a time, without ever showing half a character."""

import codecs

from edgekv.tokenizer.vocabulary import Vocabulary


class IncrementalDetokenizer:
    """Turns the tokens of one answer into text as they come.

    A character's bytes may be spread over tokens; they are held back until it is complete. The
    texts returned by `push` and `flush`, joined, equal `Tokenizer.decode` of the same ids. Each
    token costs time proportional to its own bytes. Owned by whoever streams the answer.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._drop_space = vocabulary.leading_space

    def push(self, token_id: int) -> str:
        """Text that this token completes; often "" inside a character."""
        return self._begin(self._decoder.decode(self._vocabulary.token_bytes(token_id)))

    def flush(self) -> str:
        """What is left when the answer ends; an unfinished character becomes U+FFFD."""
        return self._begin(self._decoder.decode(b"", True))

    def _begin(self, text: str) -> str:
        if self._drop_space and text:
            self._drop_space = False
            return text.removeprefix(" ")
        return text
