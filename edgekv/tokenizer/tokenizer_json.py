"""Reads from a tokenizer.json what the `tokenizers` library does not tell."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from edgekv.errors import TokenizerError
from edgekv.tokenizer.vocabulary import VOCAB_SIZE_MAX, Scheme

if TYPE_CHECKING:
    import tokenizers

# Parts that decide the ids of a text; `truncation` and `padding` are left-overs of training runs.
CONTENT_KEYS = ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder", "model")


def decoding(spec: Mapping[str, object], origin: str) -> tuple[Scheme, bool]:
    """How token texts spell bytes, and whether decoding takes one leading space away.

    Raises:
        TokenizerError: The decoder is of a kind whose tokens do not stand for bytes.
    """
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


def prefix_ids(spec: Mapping[str, object]) -> tuple[int, ...]:
    """Ids that the post-processor puts before a single text; mostly BOS or none."""
    return tuple(
        token_id
        for step in _flatten(spec.get("post_processor"), "processors")
        if step.get("type") == "TemplateProcessing"
        for token_id in _leading_special(step)
    )


def tokens_by_id(ids: Mapping[str, int], origin: str) -> list[str | None]:
    """Token texts indexed by id, None where there is none.

    Raises:
        TokenizerError: There are no tokens, or an id is negative or absurdly large.
    """
    vocab_size = max(ids.values(), default=-1) + 1
    smallest = min(ids.values(), default=0)
    if not 0 < vocab_size <= VOCAB_SIZE_MAX or smallest < 0:
        raise TokenizerError(
            f"{origin}: token ids go from {smallest} to {vocab_size - 1}",
            hint=f"ids from 0 to {VOCAB_SIZE_MAX - 1} are possible; download the model again",
        )
    tokens: list[str | None] = [None] * vocab_size
    for text, token_id in ids.items():
        tokens[token_id] = text
    return tokens


def check_added_tokens(
    spec: Mapping[str, object], tokenizer: "tokenizers.Tokenizer", origin: str
) -> None:
    """Make sure that added tokens have the ids that the file gives them.

    The library numbers them itself, after the model's own tokens, and ignores the file.

    Raises:
        TokenizerError: One has another id.
    """
    for token in _objects(spec.get("added_tokens")):
        content, token_id = str(token.get("content")), token.get("id")
        if content and tokenizer.token_to_id(content) != token_id:
            raise TokenizerError(
                f"{origin}: added token {content!r} cannot have id {token_id}",
                hint="the file is damaged; download the model again",
            )


def _leading_special(step: Mapping[str, object]) -> Iterator[int]:
    special = step.get("special_tokens")
    for piece in _objects(step.get("single")):
        token = piece.get("SpecialToken")
        if not isinstance(token, dict) or not isinstance(special, dict):
            return
        entry = special.get(token.get("id"))
        yield from entry.get("ids", ()) if isinstance(entry, dict) else ()


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
