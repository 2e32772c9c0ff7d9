"""Tokenizers from Hugging Face folders."""

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from edgekv.errors import FETCH_AGAIN, TokenizerError
from edgekv.tokenizer.backends import (
    CONTROL,
    UNKNOWN,
    UNUSED,
    Backend,
    HuggingFaceBackend,
    Place,
    SentencePieceBackend,
    library_errors,
    load_processor,
    read_pieces,
)
from edgekv.tokenizer.base import Tokenizer, end_ids, fingerprint_of
from edgekv.tokenizer.chat_template import ChatTemplate, chosen_template
from edgekv.tokenizer.ends import TURN_ENDS
from edgekv.tokenizer.folder_config import (
    FolderConfig,
    parse_object,
    read_bytes,
    read_folder_config,
)
from edgekv.tokenizer.piece_kinds import as_control
from edgekv.tokenizer.vocabulary import VOCAB_SIZE_MAX, Scheme, Vocabulary

if TYPE_CHECKING:
    import tokenizers

# Parts that decide the ids of a text; what the post-processor puts before it is known as prefix.
CONTENT_KEYS = ("added_tokens", "normalizer", "pre_tokenizer")


def load_tokenizer_folder(path: pathlib.Path) -> Tokenizer:
    """The tokenizer in a Hugging Face folder: tokenizer.json, or else tokenizer.model.

    Special tokens, BOS, EOS, the chat template and how to sample come from the files beside it, as
    far as they exist; which is heard of what says `edgekv.tokenizer.folder_config`.

    Raises:
        TokenizerError: There is no tokenizer, or a file is damaged or of an unsupported kind.
    """
    config = read_folder_config(path)
    if (path / "tokenizer.json").is_file():
        return _load_json(path / "tokenizer.json", config)
    if (path / "tokenizer.model").is_file():
        return _load_sentencepiece(path / "tokenizer.model", config)
    raise TokenizerError(
        f"{path} holds neither tokenizer.json nor tokenizer.model",
        hint=f"{FETCH_AGAIN}, if it has one",
    )


def _load_json(path: pathlib.Path, config: FolderConfig) -> Tokenizer:
    data, origin = read_bytes(path), str(path)
    spec = parse_object(data, path)
    tokenizer = _read_tokenizer(data, config, origin)
    _check_added_tokens(spec, tokenizer, origin)
    scheme, leading_space = _decoding(spec, origin)
    added = tokenizer.get_added_tokens_decoder()
    special_ids = {token_id for token_id, token in added.items() if token.special}
    vocabulary = Vocabulary(
        tokens=_tokens_by_id(tokenizer.get_vocab(), origin),
        scheme=scheme,
        hidden_ids=frozenset(special_ids),
        literal_ids=frozenset(added.keys() - special_ids),
        leading_space=leading_space,
    )
    prefix_ids = _prefix_ids(tokenizer, origin)
    tokenizer.post_processor = None  # it would trim the places of tokens
    return _assemble(
        config,
        vocabulary=vocabulary,
        backend=HuggingFaceBackend(tokenizer, origin=origin),
        prefix_ids=prefix_ids,
        content=[*(spec.get(key) for key in CONTENT_KEYS), _one_spelling(spec.get("model"))],
    )


def _read_tokenizer(data: bytes, config: FolderConfig, origin: str) -> "tokenizers.Tokenizer":
    import tokenizers

    with library_errors(origin):
        tokenizer = tokenizers.Tokenizer.from_buffer(data)
        # A prompt must be neither cut nor filled up.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        special = {t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special}
        # Some fine-tunes name control tokens in tokenizer_config.json that tokenizer.json holds as
        # plain ones, or have plain ones that end a turn; `add_special_tokens` then changes the kind
        # and keeps the id.
        tokenizer.add_special_tokens(
            [
                tokenizers.AddedToken(text, special=True, normalized=False)
                for text in sorted({*config.special_tokens.values(), *TURN_ENDS} - special)
                if tokenizer.token_to_id(text) is not None
            ]
        )
    return tokenizer


def _prefix_ids(tokenizer: "tokenizers.Tokenizer", origin: str) -> tuple[int, ...]:
    """Ids that the post-processor puts before a text; mostly BOS or none."""
    with library_errors(origin):
        encoding = tokenizer.encode("a")
    mask = encoding.special_tokens_mask
    return tuple(encoding.ids[: mask.index(0)]) if 0 in mask else ()


def _load_sentencepiece(path: pathlib.Path, config: FolderConfig) -> Tokenizer:
    data, origin = read_bytes(path), str(path)
    processor = load_processor(data, origin=origin)
    named = {*config.special_tokens.values(), *TURN_ENDS}
    changed = as_control(data, named)
    if changed != data:
        processor = load_processor(changed, origin=origin)
    pieces = read_pieces(processor, origin=origin)
    ids = {text: token_id for token_id, (text, _) in enumerate(pieces)}
    special = {t: ids[t] for t, kind in pieces if kind in (CONTROL, UNKNOWN) or t in TURN_ENDS}
    literal: dict[str, int] = {}
    for token_id, (text, is_special) in config.added_tokens.items():
        if is_special or text in named:
            special[text] = token_id
        elif token_id >= len(pieces):
            literal[text] = token_id
    tokens = _tokens_by_id(ids | special | literal, origin)
    for token_id, (text, kind) in enumerate(pieces):
        if kind == UNUSED and text not in special:
            tokens[token_id] = None
    vocabulary = Vocabulary(
        tokens=tokens,
        scheme="sentencepiece",
        hidden_ids=frozenset(special.values()),
        literal_ids=frozenset(literal.values()),
        # sentencepiece does not tell its settings, but shows them.
        leading_space=config.first_space is not False and processor.normalize("a") != "a",
    )
    # As transformers has it: the original Llama's way is "legacy".
    first: Place = "middle" if config.first_space is False else "start"
    later: Place = first if config.every_space else "middle"
    return _assemble(
        config,
        vocabulary=vocabulary,
        backend=SentencePieceBackend(
            processor, added={**special, **literal}, origin=origin, first=first, later=later
        ),
        prefix_ids=tuple(i for i in (processor.bos_id(),) if i >= 0),
        eos_ids=frozenset(i for i in (processor.eos_id(),) if i >= 0),
        content=[data.hex(), special, literal, first, later],
    )


def _assemble(
    config: FolderConfig,
    *,
    vocabulary: Vocabulary,
    backend: Backend,
    prefix_ids: tuple[int, ...],
    eos_ids: frozenset[int] = frozenset(),
    content: list[object],
) -> Tokenizer:
    """Join a tokenizer with its folder's config, which has the last word on BOS."""
    hidden, vocab_size = vocabulary.hidden_tokens, len(vocabulary.tokens)
    bos_id = hidden.get(config.special_tokens.get("bos_token", ""), config.bos_id)
    if bos_id is None or not 0 <= bos_id < vocab_size:
        bos_id = next(iter(prefix_ids), None)
    if config.adds_bos is not None:
        prefix_ids = (bos_id,) if config.adds_bos and bos_id is not None else ()
    eos_ids |= config.eos_ids | end_ids(vocabulary)
    if (eos_token := config.special_tokens.get("eos_token")) in hidden:
        eos_ids |= {hidden[eos_token]}
    templates = {
        name: ChatTemplate(source, origin=origin, special_tokens=config.special_tokens)
        for name, (source, origin) in config.templates.items()
    }
    return Tokenizer(
        backend=backend,
        vocabulary=vocabulary,
        bos_id=bos_id,
        eos_ids=frozenset(i for i in eos_ids if 0 <= i < vocab_size),
        prefix_ids=prefix_ids,
        chat_template=chosen_template(templates),
        templates=templates,
        fingerprint=fingerprint_of([content, sorted(vocabulary.hidden_ids), prefix_ids]),
        sampling=config.sampling,
        warnings=config.warnings,
    )


# --- what the `tokenizers` library does not tell of a tokenizer.json ---


def _decoding(spec: Mapping[str, object], origin: str) -> tuple[Scheme, bool]:
    """How token texts spell bytes, and whether decoding takes one leading space away."""
    steps = {str(step.get("type")): step for step in _flatten(spec.get("decoder"), "decoders")}
    if "ByteLevel" in steps:
        return "byte_level", False
    if "Metaspace" in steps:
        metaspace = steps["Metaspace"]
        # Files of before 2024 have `add_prefix_space` instead of `prepend_scheme`.
        prefix = metaspace.get("prepend_scheme", "always") != "never"
        return "sentencepiece", prefix and metaspace.get("add_prefix_space") is not False
    if "Replace" in steps:
        return "sentencepiece", "Strip" in steps
    raise TokenizerError(
        f"{origin}: unsupported decoder {', '.join(steps) or 'none'}",
        hint="supported: ByteLevel, Metaspace, and Replace with ByteFallback",
    )


def _one_spelling(model: object) -> object:
    """A model's definition with its merges as pairs: older files have "a b" for ["a", "b"]."""
    if not isinstance(model, dict) or not isinstance(model.get("merges"), list):
        return model
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    return {**model, "merges": merges}


def _tokens_by_id(ids: Mapping[str, int], origin: str) -> list[str | None]:
    """Token texts indexed by id, None where there is none; no id may be absurd."""
    vocab_size = max(ids.values(), default=-1) + 1
    smallest = min(ids.values(), default=0)
    if not 0 < vocab_size <= VOCAB_SIZE_MAX or smallest < 0:
        raise TokenizerError(
            f"{origin}: token ids go from {smallest} to {vocab_size - 1}",
            hint=f"ids from 0 to {VOCAB_SIZE_MAX - 1} are possible: {FETCH_AGAIN}",
        )
    tokens: list[str | None] = [None] * vocab_size
    for text, token_id in ids.items():
        tokens[token_id] = text
    return tokens


def _check_added_tokens(
    spec: Mapping[str, object], tokenizer: "tokenizers.Tokenizer", origin: str
) -> None:
    """Make sure that added tokens have the ids that the file gives them.

    The library numbers them itself, after the model's own tokens, and ignores the file.
    """
    for token in _objects(spec.get("added_tokens")):
        content, token_id = str(token.get("content")), token.get("id")
        if content and tokenizer.token_to_id(content) != token_id:
            raise TokenizerError(
                f"{origin}: added token {content!r} cannot have id {token_id}",
                hint=f"the file is damaged: {FETCH_AGAIN}",
            )


def _flatten(component: object, members: str) -> Iterator[Mapping[str, object]]:
    """The steps of a component that may be a (nested) Sequence."""
    if not isinstance(component, dict):
        return
    if component.get("type") != "Sequence":
        yield component
        return
    for member in _objects(component.get(members)):
        yield from _flatten(member, members)


def _objects(values: object) -> Sequence[Mapping[str, object]]:
    return [v for v in values if isinstance(v, dict)] if isinstance(values, list) else []
