"""Which tokens may come next, so that an answer's text matches a grammar: llguidance, by bytes.

    begin(grammar, tokenizer) ─▶ Constraint: mask() ─▶ a token is chosen ─▶ take(token) ─▶ …
                                             forced() ─▶ tokens without a choice, taken as they are

A grammar is compiled, and its first mask computed, by whoever asks, on their thread: what cannot be
compiled or satisfied is refused there. llguidance learns of a tokenizer by its tokens' bytes, so
tokenizers of all kinds are the same to it.
"""

import functools
import json
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, get_args
from weakref import WeakKeyDictionary

import numpy as np

from edgekv.config import check_choice, check_kind
from edgekv.errors import GrammarError
from edgekv.tokenizer.base import Tokenizer
from edgekv.tokenizer.grammar import Grammar, GrammarKind
from edgekv.tokenizer.schema import parse_schema, place_of
from edgekv.tokenizer.vocabulary import Vocabulary

if TYPE_CHECKING:
    import llguidance  # by whoever asks for a first grammar, for it takes 0.1 s

GRAMMAR_BYTES_MAX = 256 << 10
AFTER_BYTES_MAX = 256
# Of a JSON schema a mask takes 0.1 ms in the median and 0.3 in the 90th percentile, with 49k tokens
# and with 152k, and 0.6 ms at most; `take` 0.01 and 0.2 ms: CPU time of one slow core of a server.
# Grammars made to be slow take up to 0.15 s for one, and mostly fail by it.
SLOW_S = 0.005
_PREAMBLES_MAX = 8  # remembered of one tokenizer
_SHOWN_CHARS_MAX = 500

# White space within JSON: as people indent it, and never without end. Models with little sense
# would else go on with blanks until their tokens are used up.
_JSON_SPACE = r" |\n[ \t]{0,32}"
# Behind "</think>" models begin a new line, or two.
_NEW_LINES = r"start: /\n{0,2}/ @text"
# Of a vocabulary whose texts begin with a space that is no part of them.
_SPACE_PREFIX = 'start: " " @text'


def begin(grammar: Grammar, tokenizer: Tokenizer) -> "Constraint":
    """What constrains one answer; takes some 3 ms, and the first of a tokenizer 1 to 3 s.

    Raises:
        GrammarError: The grammar is malformed, too large or too complex, or nothing can satisfy it.
        ConfigError: A field of it is none of what it can be.
    """
    _check(grammar)
    tokens = GrammarTokens.of(tokenizer)
    constraint = Constraint(
        tokens,
        _matcher(grammar, tokens),
        tokens.preamble(grammar.after) if grammar.after else None,
    )
    constraint.check()
    return constraint


def _check(grammar: Grammar) -> None:
    check_kind("grammar", grammar, Grammar)
    check_choice("grammar.kind", grammar.kind, get_args(GrammarKind))
    limits = {"text": GRAMMAR_BYTES_MAX, "after": AFTER_BYTES_MAX, "lead": GRAMMAR_BYTES_MAX}
    for field, bytes_max in limits.items():
        text = check_kind(f"grammar.{field}", getattr(grammar, field), str)
        try:
            size = len(text.encode())
        except UnicodeEncodeError:
            raise GrammarError(f"grammar.{field} is no valid Unicode: a lone surrogate") from None
        if size > bytes_max:
            raise GrammarError(f"grammar.{field} has {size} bytes, of at most {bytes_max}")


@functools.cache
def _limits() -> "llguidance.LLParserLimits":
    """What llguidance may take; who needs more fails. Lexer states take 1 to 2 kB each."""
    import llguidance

    return llguidance.LLParserLimits(
        initial_lexer_fuel=300_000,
        step_lexer_fuel=140_000,
        step_max_items=50_000,
        max_lexer_states=50_000,
        verbose_errors=False,
    )


def _matcher(grammar: Grammar, tokens: "GrammarTokens") -> "llguidance.LLMatcher":
    import llguidance

    is_json = grammar.kind in ("json_schema", "json_object")
    schema: Any = {"type": "object"}
    if grammar.kind == "json_schema":
        schema = parse_schema(grammar.text)
    control = tokens.control_rules(grammar.control)
    rules = _rules(grammar, schema, control)
    lead = f"{grammar.lead}\n{control}" if grammar.lead else ""
    if not lead and grammar.after:
        lead = _NEW_LINES if is_json else ""
    elif not lead and tokens.leading_space:
        lead = _SPACE_PREFIX
    if lead:
        rules = [{"lark_grammar": lead}, {"name": "text"} | rules[0]]
    source = json.dumps({"grammars": rules})
    matcher = llguidance.LLMatcher(tokens.known, source, log_level=0, limits=_limits())
    if not matcher.is_error():
        matcher.compute_bitmask()  # what cannot be satisfied shows only here
    if matcher.is_error():
        where = place_of(schema, _refusal) if grammar.kind == "json_schema" else ""
        raise GrammarError(f"{where}{_told(matcher.get_error())}")
    return matcher


def _rules(grammar: Grammar, schema: Any, control: str) -> list[dict[str, Any]]:
    """As llguidance reads it, with the rules of control tokens."""
    import llguidance

    match grammar.kind:
        case "json_schema" | "json_object":
            if isinstance(schema, dict):
                schema = {"x-guidance": {"whitespace_pattern": _JSON_SPACE}} | schema
            return [{"json_schema": schema}]
        case "regex":
            return [{"lark_grammar": f"start: /{llguidance.regex_to_lark(grammar.text, '')}/"}]
        case "lark":
            return [{"lark_grammar": f"{grammar.text}\n{control}"}]


def _refusal(schema: Any) -> str:
    """Why a schema cannot be compiled, by whatever references it was come to; "" if it can be."""
    import llguidance

    source = json.dumps({"grammars": [{"json_schema": schema}]})
    why = llguidance.LLMatcher.validate_grammar(source, None, limits=_limits())
    return why.partition("while processing")[0].strip()


def _told(message: str) -> str:
    """The part of llguidance's message that is for whoever wrote the grammar, in one line."""
    text = message.partition("<backtrace>")[0].partition("<non-verbose/>")[0]
    return " ".join(text.split())[:_SHOWN_CHARS_MAX] or "nothing satisfies it"


class GrammarTokens:
    """A tokenizer's tokens as llguidance knows them. Immutable but for its memory, which is locked.

    Of every tokenizer there is one, for as long as its vocabulary is there.
    """

    _all: ClassVar[WeakKeyDictionary[Vocabulary, "GrammarTokens"]] = WeakKeyDictionary()
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, tokenizer: Tokenizer) -> None:
        import llguidance

        vocabulary = tokenizer.vocabulary
        size = tokenizer.vocab_size
        self.leading_space = vocabulary.leading_space
        self.spelled = [vocabulary.spelled_bytes(i) for i in range(size)]
        self.eos_ids = sorted(i for i in tokenizer.eos_ids if i < size)
        special_ids = sorted(vocabulary.hidden_ids | tokenizer.eos_ids)
        eos_ids = self.eos_ids or [size]  # llguidance wants one: a token that the model lacks
        self.known = llguidance.LLTokenizer(
            _Encoder(tokenizer, self.spelled, special_ids, eos_ids[0]),  # type: ignore[arg-type]
            n_vocab=max(size, eos_ids[0] + 1),
            eos_token=eos_ids,
        )
        self._hidden = vocabulary.hidden_tokens
        self._preambles: dict[str, _Preamble] = {}

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "GrammarTokens":
        """Those of this tokenizer, made once."""
        with cls._lock:
            known = cls._all.get(tokenizer.vocabulary)
            if known is None:
                known = cls._all[tokenizer.vocabulary] = cls(tokenizer)
            return known

    def control_rules(self, control: Sequence[str]) -> str:
        """Rules of `Grammar.control`; one that is no control token here is its text."""
        ids = {text: f"<[{self._hidden[text]}]>" for text in control if text in self._hidden}
        spelled = (ids.get(text, json.dumps(text, ensure_ascii=False)) for text in control)
        return "".join(f"control_{index}: {what}\n" for index, what in enumerate(spelled))

    def preamble(self, after: str) -> "_Preamble":
        """What may be said before such a text, made once."""
        with self._lock:
            preamble = self._preambles.get(after)
            if preamble is None:
                if len(self._preambles) >= _PREAMBLES_MAX:
                    self._preambles.clear()
                preamble = self._preambles[after] = _Preamble(after, self)
            return preamble


class _Encoder:
    """How llguidance asks which tokens a text has that the grammar forces: these are then forced.

    It wants to be given exactly the text's bytes; where a tokenizer changes texts (lower case, a
    space in front) they are cut into the longest tokens there are.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(
        self, tokenizer: Tokenizer, tokens: list[bytes], special_ids: list[int], eos_id: int
    ) -> None:
        ordinary = {*range(len(tokens))}.difference(special_ids)
        self.tokens = [*tokens, b""] if eos_id == len(tokens) else tokens
        self.special_token_ids = special_ids
        self.eos_token_id = eos_id
        hidden = tokenizer.vocabulary.hidden_tokens
        self._backend = tokenizer.backend.plain(hidden, "middle")
        self._ids = {tokens[i]: i for i in sorted(ordinary, reverse=True) if tokens[i]}
        self._length_max = max(map(len, self._ids), default=0)

    def __call__(self, text: str) -> list[int]:
        data = text.encode()
        ids = self._backend.encode(text)
        if b"".join(self.tokens[i] for i in ids) == data:
            return ids
        return self._longest(data)

    def _longest(self, data: bytes) -> list[int]:
        ids, at = [], 0
        while at < len(data):
            ends = range(min(len(data), at + self._length_max), at, -1)
            end = next((end for end in ends if data[at:end] in self._ids), None)
            if end is None:
                break  # no token has this byte: the grammar cannot go on here
            ids.append(self._ids[data[at:end]])
            at = end
        return ids


class _Preamble:
    """What may be said before a grammar begins: anything, but that the text which ends it ends it.

    A token in which more follows than that text would begin the answer unconstrained, and is left
    out. So are ends of the answer. Control tokens count as what they are spelled like. Immutable.
    """

    def __init__(self, after: str, tokens: GrammarTokens) -> None:
        self.after = after.encode()
        self._spelled = tokens.spelled
        usual = np.array([bool(token) for token in tokens.spelled])
        usual[tokens.eos_ids] = False
        last = self.after[-1:]
        longer = [i for i, token in enumerate(tokens.spelled) if last in token[:-1]]
        self._masks = []  # by how many bytes of it are there
        for held in range(len(self.after)):
            mask = usual.copy()
            mask[[i for i in longer if self._overshoots(held, tokens.spelled[i])]] = False
            self._masks.append(mask)

    def _overshoots(self, held: int, token: bytes) -> bool:
        text = self.after[:held] + token
        return 0 <= text.find(self.after) < len(text) - len(self.after)

    def mask(self, held: int) -> np.ndarray:
        """Which tokens may follow, `(vocab,)` bool, where so many bytes of its end are there."""
        return self._masks[held]

    def taken(self, held: int, token: int) -> int:
        """How many bytes of its end are there behind one more token; all of them end it."""
        text = self.after[:held] + self._spelled[token]
        if self.after in text:
            return len(self.after)
        lengths = range(min(len(self.after) - 1, len(text)), 0, -1)
        return next((n for n in lengths if text.endswith(self.after[:n])), 0)


class Constraint:
    """Where an answer is in its grammar. Made on a caller's thread, then the engine thread's.

    Attributes:
        error: Why no token can follow, once that is so.
        is_slow: A mask took long; the next ones may, too.
    """

    def __init__(
        self, tokens: GrammarTokens, matcher: "llguidance.LLMatcher", preamble: _Preamble | None
    ) -> None:
        self.error: GrammarError | None = None
        self.is_slow = False
        self._tokens = tokens
        self._matcher = matcher
        self._preamble = preamble  # None once the grammar has begun
        self._held = 0  # bytes that are there of what ends it

    def check(self) -> None:
        """Raise GrammarError if nothing can be said at all."""
        self.mask(len(self._tokens.spelled))
        if self.error is not None:
            raise self.error

    @property
    def may_end(self) -> bool:
        """Whether what was said is whole."""
        return self._preamble is None and self._matcher.is_accepting()

    @property
    def ended(self) -> bool:
        """Whether what was said is whole, and nothing can be added to it."""
        return self._preamble is None and self.may_end and self._matcher.is_stopped()

    def mask(self, num_rows: int) -> np.ndarray:
        """Which tokens may come next, `(num_rows,)` bool as the logits; none once it has failed.

        A model may have more rows of logits than tokens: these are none.
        """
        start_s = time.thread_time()
        mask = np.zeros(num_rows, dtype=np.bool_)
        size = min(num_rows, len(self._tokens.spelled))
        if self.error is None and self._preamble is not None:
            mask[:size] = self._preamble.mask(self._held)[:size]
        elif self.error is None:
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            mask[:size] = np.unpackbits(bits, count=size, bitorder="little")
            if self._matcher.is_error():  # the bits are those of EOS
                self._fail(self._matcher.get_error())
                mask[:] = False
        self.is_slow |= time.thread_time() - start_s > SLOW_S
        if not mask.any():
            self._fail("no token of the model is what the grammar wants next")
        return mask

    def take(self, token: int) -> None:
        """The next token of the answer is this one, one of those that might come."""
        if self.error is not None:
            return
        if self._preamble is None:
            if not self._matcher.consume_token(token):
                self._fail(self._matcher.get_error())
            return
        self._held = self._preamble.taken(self._held, token)
        if self._held == len(self._preamble.after):
            self._preamble = None

    def forced(self, count_max: int) -> list[int]:
        """Tokens that must come next, in order, where the grammar leaves no choice of them.

        Their bytes are what `mask` would allow alone, mostly token by token: where a tokenizer cuts
        what is left in another way once one was taken, tokens may differ, and the text does not.
        There may be more; of a slow grammar none are sought.
        """
        if self._preamble is not None or self.error is not None or self.is_slow or self.ended:
            return []
        start_s = time.thread_time()
        tokens = self._matcher.compute_ff_tokens()
        self.is_slow |= time.thread_time() - start_s > SLOW_S
        return tokens[:count_max]

    def _fail(self, message: str) -> None:
        if self.error is None:
            self.error = GrammarError(f"the answer cannot go on by its grammar: {_told(message)}")
