"""The small JSON files beside a tokenizer that say which tokens are special."""

import json
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from edgekv.errors import FETCH_AGAIN, TokenizerError
from edgekv.tokenizer.chat_template import DEFAULT_TEMPLATE

T = TypeVar("T")

# The largest tokenizer.json in use has about 35 MB.
FILE_BYTES_MAX = 1 << 28

ADDITIONAL_TEMPLATES = "additional_chat_templates"  # a folder, as transformers writes it

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
_HINT = f"the file is damaged: {FETCH_AGAIN}"


@dataclass(frozen=True, kw_only=True)
class FolderConfig:
    """What a Hugging Face folder says about its special tokens."""

    special_tokens: Mapping[str, str]  # text by name ("bos_token", ...)
    added_tokens: Mapping[int, tuple[str, bool]]  # text by id, and whether it is special
    bos_id: int | None  # None where texts say it
    eos_ids: frozenset[int]
    first_space: bool | None  # whether a space goes before a text; None if nothing says
    every_space: bool | None  # and before what stands behind a control token
    adds_bos: bool | None  # None if tokenizer_config.json is silent
    templates: Mapping[str, tuple[str, str]]  # by name: the source, and the file it came from


def read_bytes(path: pathlib.Path) -> bytes:
    """The file's bytes; TokenizerError where it cannot be read or is absurdly large."""
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise TokenizerError(
                f"{path} is larger than {FILE_BYTES_MAX >> 20} MiB", hint="it is no tokenizer file"
            )
        return path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path}: {error.strerror}", hint="check the file") from error


def parse_object(data: bytes, path: pathlib.Path) -> dict[str, object]:
    """The JSON object in `data`; TokenizerError where it is not UTF-8, not JSON or no object."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is not valid JSON: {error}", hint=_HINT) from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} holds no JSON object", hint=_HINT)
    return value


def read_folder_config(folder: pathlib.Path) -> FolderConfig:
    """Read every small JSON file of `folder` that exists; TokenizerError where one is damaged."""
    tokenizer = _Json(folder / "tokenizer_config.json")
    special_map = _Json(folder / "special_tokens_map.json")
    generation, model = _Json(folder / "generation_config.json"), _Json(folder / "config.json")
    silent_on_bos = "bos_token" not in tokenizer.values | special_map.values
    bos_ids = generation.ids("bos_token_id") or model.ids("bos_token_id")
    return FolderConfig(
        special_tokens=special_map.special_tokens() | tokenizer.special_tokens(),
        added_tokens=_added_tokens(_Json(folder / "added_tokens.json"), tokenizer),
        bos_id=bos_ids[0] if silent_on_bos and bos_ids else None,
        eos_ids=frozenset((*generation.ids("eos_token_id"), *model.ids("eos_token_id"))),
        first_space=tokenizer.get("add_prefix_space", bool),
        every_space=tokenizer.get("legacy", bool),
        adds_bos=tokenizer.get("add_bos_token", bool),
        templates=_read_templates(folder, tokenizer),
    )


class _Json:
    """The object in a JSON file, empty where there is none; typed access."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.values = parse_object(read_bytes(path), path) if path.is_file() else {}

    def get(self, key: str, kind: type[T]) -> T | None:
        value = self.values.get(key)
        if value is None or type(value) is kind:  # bool is no int here
            return value
        raise self.wrong(key)

    def ids(self, key: str) -> list[int]:
        """`key` as a list of token ids: files write one id, a list, or null."""
        value = self.values.get(key)
        values = value if isinstance(value, list) else [] if value is None else [value]
        ids = [token_id for token_id in values if type(token_id) is int]
        if len(ids) != len(values):
            raise self.wrong(key)
        return ids

    def special_tokens(self) -> dict[str, str]:
        """Text of each named special token; files write text or {"content": text}."""
        found = {}
        for name in _SPECIAL_NAMES:
            value = self.values.get(name)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                found[name] = text
            elif text is not None:
                raise self.wrong(name)
        return found

    def wrong(self, key: str) -> TokenizerError:
        return TokenizerError(f"{self.path}: {key} has an unexpected type", hint=_HINT)


def _added_tokens(added: _Json, tokenizer: _Json) -> dict[int, tuple[str, bool]]:
    """added_tokens.json maps text to id; tokenizer_config.json, which wins, id to text and kind."""
    found: dict[int, tuple[str, bool]] = {}
    for text, token_id in added.values.items():
        if type(token_id) is not int:
            raise added.wrong(text)
        found[token_id] = text, False
    for key, entry in (tokenizer.get("added_tokens_decoder", dict) or {}).items():
        content = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(content, str) or not key.isdecimal():
            raise tokenizer.wrong(f"added_tokens_decoder[{key!r}]")
        found[int(key)] = content, entry.get("special") is True
    return dict(sorted(found.items()))


def _read_templates(folder: pathlib.Path, tokenizer: _Json) -> dict[str, tuple[str, str]]:
    """The chat templates by name, and the file that each is in; newer files go before older ones.

    One without a name is "default". One that is empty is none.
    """
    found: dict[str, tuple[str, str]] = {}
    for file in (tokenizer, _Json(folder / "chat_template.json")):
        value = file.values.get("chat_template")
        for name, source in _named(value) if value is not None else ():
            if not isinstance(name, str) or not isinstance(source, str):
                raise file.wrong("chat_template")
            found[name] = source, str(file.path)
    for path in sorted((folder / ADDITIONAL_TEMPLATES).glob("*.jinja")):
        found[path.stem] = _read_text(path), str(path)
    if (path := folder / "chat_template.jinja").is_file():
        found[DEFAULT_TEMPLATE] = _read_text(path), str(path)
    return {name: (source, path) for name, (source, path) in found.items() if source.strip()}


def _named(value: object) -> list[tuple[object, object]]:
    """Names and templates of what stands in JSON: one text, or a list of {name, template}."""
    if not isinstance(value, list):
        return [(DEFAULT_TEMPLATE, value)]
    entries = [entry if isinstance(entry, dict) else {} for entry in value]
    return [(entry.get("name"), entry.get("template")) for entry in entries]


def _read_text(path: pathlib.Path) -> str:
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path} is not UTF-8: {error.reason}", hint=_HINT) from error
