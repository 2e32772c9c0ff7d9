"""Tokenizers from GGUF metadata.

The token list is right: what ends a turn is found in it by text, whatever its type; a key that
points beyond it, or a usual id that it contradicts, counts for nothing; types and scores beyond it
are ignored. Where nothing is said, it is as llama.cpp takes it to be (`llama_vocab::impl::load` in
its llama-vocab.cpp): the special tokens of "llama" are those of Llama 2, scores are 0, and a token
without a text stands for nothing.
"""

import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from edgekv.errors import FETCH_AGAIN, TokenizerError
from edgekv.tokenizer.backends import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Backend,
    HuggingFaceBackend,
    SentencePieceBackend,
    library_errors,
    load_processor,
    sentencepiece_model,
)
from edgekv.tokenizer.base import Tokenizer, end_ids, fingerprint_of
from edgekv.tokenizer.chat_template import DEFAULT_TEMPLATE, ChatTemplate, chosen_template
from edgekv.tokenizer.ends import TURN_ENDS
from edgekv.tokenizer.makers import gguf_sampling
from edgekv.tokenizer.pretokenizers import BpeStyle, bpe_style
from edgekv.tokenizer.vocabulary import VOCAB_SIZE_MAX, Scheme, Vocabulary

if TYPE_CHECKING:
    import tokenizers

T = TypeVar("T")

_END_ROLES = ("eos", "eot", "eom")
# What decides the ids of a text, besides the tokens' texts and kinds.
_CONTENT_KEYS = (
    *("model", "pre", "merges", "scores"),
    *("precompiled_charsmap", "add_space_prefix", "remove_extra_whitespaces"),
)
_USUAL_IDS = {"llama": {"unknown": 0, "bos": 1, "eos": 2}}  # by tokenizer.ggml.model
_SPECIAL = (CONTROL, UNKNOWN)
_BYTE_TEXTS = [f"<0x{byte:02X}>" for byte in range(256)]
# Token roles of GGUF, and what chat templates call them.
_TEMPLATE_NAMES = {
    "bos": "bos_token",
    "eos": "eos_token",
    "unknown": "unk_token",
    "padding": "pad_token",
}


def load_tokenizer_gguf(metadata: Mapping[str, object], source: pathlib.Path) -> Tokenizer:
    """The tokenizer that a GGUF file describes, from its metadata: plain values by key.

    `tokenizer.ggml.model` "gpt2" is byte-level BPE, "llama" sentencepiece BPE with byte fallback,
    "gemma4" the same by merges instead of scores.
    Raises TokenizerError: A key is missing, of a wrong type or contradicts another one.
    """
    fields = _Fields(metadata, str(source))
    model = fields.required("ggml.model", str)
    tokens = _Tokens(fields, _USUAL_IDS.get(model, {}))
    if model == "gpt2":
        style = bpe_style(fields.optional("ggml.pre", str, "default"), fields.origin)
        bpe = _bpe_backend(fields, tokens, style)
        return _assemble(fields, tokens, bpe, "byte_level", adds_bos=style.adds_bos)
    if model == "llama":
        backend = _sentencepiece_backend(fields, tokens)
        prefixed = _space_prefix(fields)
        return _assemble(fields, tokens, backend, "sentencepiece", prefixed=prefixed)
    if model == "gemma4":
        return _assemble(fields, tokens, _merging_backend(fields, tokens), "sentencepiece")
    raise TokenizerError(
        f"{fields.origin}: unsupported tokenizer.ggml.model {model!r}",
        hint="supported: gpt2, llama, gemma4",
    )


@dataclass(frozen=True)
class _Fields:
    """Metadata under `tokenizer.`; every key is given without that prefix.

    All methods raise TokenizerError, naming the file and the key, for a value of a wrong type.
    """

    metadata: Mapping[str, object]
    origin: str

    def has(self, key: str) -> bool:
        return f"tokenizer.{key}" in self.metadata

    def optional(self, key: str, kind: type[T], default: T) -> T:
        value = self.metadata.get(f"tokenizer.{key}", default)
        if type(value) is not kind:  # bool is no int here
            raise self.wrong(key, f"is no {kind.__name__}: {str(value)[:40]!r}")
        return value

    def required(self, key: str, kind: type[T]) -> T:
        if not self.has(key):
            raise self.wrong(key, "is missing")
        return self.optional(key, kind, kind())

    def values(self, key: str, *kinds: type[T], length: int | None = None) -> list[T]:
        """A list whose items are of `kinds`; of `length` at least, and what is beyond is left."""
        values: list[T] = self.required(key, list)
        if strange := set(map(type, values)) - set(kinds):
            names = ", ".join(sorted(kind.__name__ for kind in strange))
            raise self.wrong(key, f"holds values of type {names}")
        if length is not None and len(values) < length:
            raise self.wrong(key, f"has {len(values)} entries for {length} tokens")
        return values[:length]

    def wrong(self, key: str, what: str) -> TokenizerError:
        return TokenizerError(
            f"{self.origin}: tokenizer.{key} {what}",
            hint=f"the GGUF file is damaged: {FETCH_AGAIN}",
        )


class _Tokens:
    """The token table: all by id. `usual_ids` are those of roles that no key names."""

    def __init__(self, fields: _Fields, usual_ids: Mapping[str, int]) -> None:
        self.texts = fields.values("ggml.tokens", str)  # as stored
        size = len(self.texts)
        if not 0 < size <= VOCAB_SIZE_MAX:
            raise fields.wrong("ggml.tokens", f"has {size} entries")
        self.kinds = [NORMAL] * size
        self.typed = fields.has("ggml.token_type")
        if self.typed:
            self.kinds = fields.values("ggml.token_type", int, length=size)
        for token_id, text in enumerate(self.texts):
            if not text:
                self.texts[token_id], self.kinds[token_id] = f"[EMPTY_{token_id}]", UNUSED
            elif text in TURN_ENDS:
                self.kinds[token_id] = CONTROL
        self.ids = {text: token_id for token_id, text in enumerate(self.texts)}
        if len(self.ids) < size:
            twice = next(text for i, text in enumerate(self.texts) if self.ids[text] != i)
            raise fields.wrong("ggml.tokens", f"holds {twice[:40]!r} twice")
        self.roles = self._roles(fields, usual_ids)

    def _roles(self, fields: _Fields, usual_ids: Mapping[str, int]) -> dict[str, int]:
        """Ids by role; those of BOS and of ends are control tokens, whatever their type says."""
        roles: dict[str, int] = {}
        size, kinds = len(self.texts), list(self.kinds)
        for role in ("bos", *_END_ROLES, "unknown", "padding"):
            token_id = fields.optional(f"ggml.{role}_token_id", int, -1)
            if not 0 <= token_id < size:  # as "none" is sometimes written
                token_id = usual_ids.get(role, size)
                if token_id >= size or kinds[token_id] not in self._usual_kinds(role):
                    continue
            roles[role] = token_id
            if role == "bos" or role in _END_ROLES:
                self.kinds[token_id] = CONTROL
        return roles

    def _usual_kinds(self, role: str) -> tuple[int, ...]:
        """What the token list may say of a token that has its role by custom only."""
        kinds = (UNKNOWN, CONTROL) if role == "unknown" else (CONTROL,)
        return kinds if self.typed else (NORMAL, *kinds)

    @property
    def ends(self) -> set[int]:
        """Ids after which an answer is over, by their roles."""
        return {self.roles[role] for role in _END_ROLES if role in self.roles}

    def ids_of(self, *kinds: int) -> list[int]:
        """Ids of the tokens of these kinds."""
        return [i for i, kind in enumerate(self.kinds) if kind in kinds]


def _assemble(
    fields: _Fields,
    tokens: _Tokens,
    backend: Backend,
    scheme: Scheme,
    *,
    adds_bos: bool = True,
    prefixed: bool = False,
) -> Tokenizer:
    """`adds_bos`: where no key says it; `prefixed`: encoding puts a space before a text."""
    texts = [t if k != UNUSED else None for t, k in zip(tokens.texts, tokens.kinds, strict=True)]
    vocabulary = Vocabulary(
        tokens=texts,
        scheme=scheme,
        hidden_ids=frozenset(tokens.ids_of(*_SPECIAL)),
        literal_ids=frozenset(tokens.ids_of(USER_DEFINED)),
        leading_space=prefixed,
    )
    bos_id, templates = tokens.roles.get("bos"), _templates(fields, tokens)
    wants_bos = fields.optional("ggml.add_bos_token", bool, adds_bos)
    prefix_ids = (bos_id,) if wants_bos and bos_id is not None else ()
    content = [fields.metadata.get(f"tokenizer.ggml.{key}") for key in _CONTENT_KEYS]
    try:
        fingerprint = fingerprint_of([content, tokens.texts, tokens.kinds, prefix_ids])
    except (TypeError, ValueError) as error:
        raise fields.wrong("*", f"holds no plain value: {error}") from error
    sampling, remarks = gguf_sampling(fields.metadata)
    if scheme == "byte_level" and not fields.has("ggml.pre"):
        remarks.append(
            "tokenizer.ggml.pre is missing: words are cut in llama.cpp's default way, which is "
            "wrong for most models, and answers may suffer; a newer conversion has it"
        )
    return Tokenizer(
        backend=backend,
        vocabulary=vocabulary,
        bos_id=bos_id,
        eos_ids=end_ids(vocabulary) | tokens.ends,
        prefix_ids=prefix_ids,
        chat_template=chosen_template(templates),
        templates=templates,
        fingerprint=fingerprint,
        sampling=sampling,
        warnings=tuple(f"{fields.origin}: {remark}" for remark in remarks),
    )


def _templates(fields: _Fields, tokens: _Tokens) -> dict[str, ChatTemplate]:
    """The chat templates by name: `chat_templates` lists those of `chat_template.NAME`."""
    names = fields.values("chat_templates", str) if fields.has("chat_templates") else []
    sources = {name: fields.optional(f"chat_template.{name}", str, "") for name in names}
    sources[DEFAULT_TEMPLATE] = fields.optional("chat_template", str, "") or sources.get(
        DEFAULT_TEMPLATE, ""
    )
    special = {
        name: tokens.texts[tokens.roles[role]]
        for role, name in _TEMPLATE_NAMES.items()
        if role in tokens.roles
    }
    return {
        name: ChatTemplate(source, origin=fields.origin, special_tokens=special)
        for name, source in sources.items()
        if source.strip()
    }


def _bpe_backend(fields: _Fields, tokens: _Tokens, style: BpeStyle) -> HuggingFaceBackend:
    from tokenizers import normalizers

    tokenizer = _merging(fields, tokens.ids, ignore_merges=style.ignore_merges)
    tokenizer.pre_tokenizer = style.pre_tokenizer()
    if style.nfc:
        tokenizer.normalizer = normalizers.NFC()
    return _with_added(fields, tokens, tokenizer)


def _merging_backend(fields: _Fields, tokens: _Tokens) -> HuggingFaceBackend:
    """Gemma 4's: a text is one word, its spaces U+2581, what is no token its bytes.

    As transformers' `GemmaTokenizer`. ASCII that has a token for its byte only, as the tabulator,
    is in merges by itself, so it goes by that name here.
    """
    from tokenizers import normalizers

    ids = dict(tokens.ids)
    if missing := [text for text in _BYTE_TEXTS if text not in ids]:
        raise fields.wrong("ggml.tokens", f"lacks {missing[0]!r}: not all text could be encoded")
    for byte, text in enumerate(_BYTE_TEXTS[:0x80]):
        if chr(byte) not in ids:
            ids[chr(byte)] = ids.pop(text)
    tokenizer = _merging(fields, ids, byte_fallback=True)
    tokenizer.normalizer = normalizers.Replace(" ", "\N{LOWER ONE EIGHTH BLOCK}")
    return _with_added(fields, tokens, tokenizer)


def _merging(fields: _Fields, ids: Mapping[str, int], **options: bool) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer, models

    pairs = (merge.partition(" ") for merge in fields.values("ggml.merges", str))
    # Without a space `right` is "", which no vocabulary has.
    merges = [(left, right) for left, _, right in pairs]
    with library_errors(f"{fields.origin}: tokenizer.ggml.merges"):
        model = models.BPE(vocab=dict(ids), merges=merges, **options)
    return Tokenizer(model)


def _with_added(
    fields: _Fields, tokens: _Tokens, tokenizer: "tokenizers.Tokenizer"
) -> HuggingFaceBackend:
    """With the tokens that are matched before anything else."""
    from tokenizers import AddedToken

    for add, special, kinds in (
        (tokenizer.add_special_tokens, True, _SPECIAL),
        (tokenizer.add_tokens, False, (USER_DEFINED,)),
    ):
        texts = [tokens.texts[i] for i in tokens.ids_of(*kinds)]
        add([AddedToken(text, special=special, normalized=False) for text in texts])
    return HuggingFaceBackend(tokenizer, origin=fields.origin)


def _sentencepiece_backend(fields: _Fields, tokens: _Tokens) -> SentencePieceBackend:
    charsmap: list[int] = []
    if fields.has("ggml.precompiled_charsmap"):
        charsmap = fields.values("ggml.precompiled_charsmap", int)
    # Converters write user-defined spaces plainly.
    pieces = list(tokens.texts)
    for token_id in tokens.ids_of(USER_DEFINED):
        pieces[token_id] = pieces[token_id].replace(" ", "\N{LOWER ONE EIGHTH BLOCK}")
    scores: list[float] = [0.0] * len(pieces)
    if fields.has("ggml.scores"):
        scores = fields.values("ggml.scores", float, int, length=len(pieces))
    kinds, space_prefix = _piece_kinds(fields, tokens), _space_prefix(fields)
    squeeze_spaces = fields.optional("ggml.remove_extra_whitespaces", bool, False)
    try:
        proto = sentencepiece_model(
            pieces,
            scores,
            kinds,
            space_prefix=space_prefix,
            squeeze_spaces=squeeze_spaces,
            charsmap=bytes(value & 0xFF for value in charsmap),
        )
    except (OverflowError, ValueError) as error:
        raise fields.wrong("ggml.scores", f"or token_type is out of range: {error}") from error
    return SentencePieceBackend(
        load_processor(proto, origin=fields.origin),
        added={tokens.texts[i]: i for i in tokens.ids_of(*_SPECIAL)},
        origin=fields.origin,
    )


def _piece_kinds(fields: _Fields, tokens: _Tokens) -> list[int]:
    """Kinds as sentencepiece wants them: exactly one UNKNOWN, which some converters forget."""
    kinds = [CONTROL if kind == UNKNOWN else kind for kind in tokens.kinds]
    if BYTE not in kinds and all(text in tokens.ids for text in _BYTE_TEXTS):
        for text in _BYTE_TEXTS:  # whatever their type is, as llama.cpp looks them up by text
            kinds[tokens.ids[text]] = BYTE
    unknown = [*tokens.ids_of(UNKNOWN), tokens.roles.get("unknown", 0)][0]
    if BYTE not in kinds and (tokens.texts[unknown] in TURN_ENDS or unknown in tokens.ends):
        raise fields.wrong(
            "ggml.unknown_token_id", "is missing: unknown characters would end an answer"
        )
    kinds[unknown] = UNKNOWN
    return kinds


def _space_prefix(fields: _Fields) -> bool:
    return fields.optional("ggml.add_space_prefix", bool, True)
