"""What a caller is told of an answer: text as tokens complete it, ahead of exact KV if it may.

    push_ahead(5) push_ahead(7) push_ahead(2)    over predicted KV: "the cat sat", provisional
    push(5) push(7)                              exact KV says the same: nothing new to see
    push(9, last=True)                           and then another token: " sat" is taken back

Ids and log-probabilities are told once, with the tokens that stay.
"""

from edgekv.engine.outbox import Delta, Outbox, TokenLogprobs
from edgekv.kv.session_kv import common_prefix
from edgekv.tokenizer import IncrementalDetokenizer, StopMatcher


class Telling:
    """One answer's text, on its way to an outbox. Owned by the engine thread."""

    def __init__(
        self,
        outbox: Outbox,
        detokenizer: IncrementalDetokenizer,
        stop_matcher: StopMatcher,
        *,
        shows_ahead: bool,
    ) -> None:
        """`shows_ahead`: whoever reads can take text back."""
        self._outbox = outbox
        self._text = _Text(detokenizer, stop_matcher)
        self._text_ahead: _Text | None = None
        self._shows_ahead = shows_ahead
        self._ahead = ""  # shown, and not confirmed
        self._unsent_ids: list[int] = []
        self._unsent_logprobs: list[TokenLogprobs] = []
        self.num_tokens = 0  # of those that stay
        self.stop: str | None = None  # the stop string that was found in the text
        self.first_visible_ms: float | None = None  # of any text
        self.first_confirmed_ms: float | None = None  # of text that stays

    @property
    def at_stop(self) -> bool:
        """Whether a stop string was found in the text."""
        return self.stop is not None

    def push_ahead(self, token: int, now_ms: float) -> bool:
        """Show what a token completes that may be taken back.

        Returns:
            False if a stop string is complete with it; then nothing is shown, and none may follow.
        """
        if self._text_ahead is None:
            self._text_ahead = self._text.fork()
        text, stop = self._text_ahead.push(token)
        if stop is not None:
            return False
        if text and self._shows_ahead:
            self._ahead += text
            self._seen(now_ms)
            self._outbox.put(Delta(text=text, provisional=True))
        return True

    def push(
        self, token: int, logprobs: TokenLogprobs | None, now_ms: float, *, last: bool = False
    ) -> bool:
        """Tell what a token completes that stays; True if that ends with a stop string.

        `last`: what was shown ahead beyond it does not hold.
        """
        assert not self.at_stop
        self.num_tokens += 1
        self._unsent_ids.append(token)
        if logprobs is not None:
            self._unsent_logprobs.append(logprobs)
        text, self.stop = self._text.push(token)
        self._put(text, now_ms, last=last or self.at_stop)
        return self.at_stop

    def end(self, now_ms: float) -> None:
        """Tell what is left of the text when the answer ends, and take back what is not of it."""
        text = ""
        if not self.at_stop:
            text, self.stop = self._text.flush()
        self._put(text, now_ms, last=True, ends=True)

    def _put(self, text: str, now_ms: float, *, last: bool, ends: bool = False) -> None:
        if last:
            self._text_ahead = None
        shown = common_prefix(self._ahead, text)
        retract = 0
        if last or shown < min(len(self._ahead), len(text)):
            retract, self._ahead = len(self._ahead) - shown, ""
        else:
            self._ahead = self._ahead[shown:]
        if text:
            self._seen(now_ms)
            self.first_confirmed_ms = self.first_confirmed_ms or now_ms
        if text or retract or self._unsent_logprobs or (ends and self._unsent_ids):
            ids, logprobs = tuple(self._unsent_ids), tuple(self._unsent_logprobs)
            self._unsent_ids.clear()
            self._unsent_logprobs.clear()
            delta = Delta(text=text[shown:], token_ids=ids, logprobs=logprobs, retract=retract)
            self._outbox.put(delta)

    def _seen(self, now_ms: float) -> None:
        if self.first_visible_ms is None:
            self.first_visible_ms = now_ms


class _Text:
    """Tokens to text, up to a stop string."""

    def __init__(self, detokenizer: IncrementalDetokenizer, stop_matcher: StopMatcher) -> None:
        self._detokenizer, self._stop_matcher = detokenizer, stop_matcher

    def fork(self) -> "_Text":
        return _Text(self._detokenizer.fork(), self._stop_matcher.fork())

    def push(self, token: int) -> tuple[str, str | None]:
        """What may be shown once the token is there, and the stop string that ended it."""
        return self._stop_matcher.push(self._detokenizer.push(token))

    def flush(self) -> tuple[str, str | None]:
        """What is left, and the stop string that ended that."""
        text, stop = self._stop_matcher.push(self._detokenizer.flush())
        return text + ("" if stop else self._stop_matcher.flush()), stop
