"""The small JSON files beside a tokenizer: which tokens are special, and how to sample.

Several of them speak of the same things, and contradict each other. `PRECEDENCE` says who is heard:
of each thing the first file that says it, and the others not at all. So the ends of
generation_config.json replace those of config.json, which often are the base model's. As in
transformers and mlx-lm; null says nothing but of a special token's text, which is then none.

What ends an answer has more sources: with those ids go the text of `eos_token`, the end that a
tokenizer.model knows, and what is known by its text (`edgekv.tokenizer.ends`).

A GGUF file has one source for each thing, and its token list is right where another key
contradicts it; see `edgekv.tokenizer.gguf`.
"""

import contextlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from edgekv.config import SamplingParams
from edgekv.errors import FETCH_AGAIN, TokenizerError
from edgekv.tokenizer.chat_template import DEFAULT_TEMPLATE
from edgekv.tokenizer.makers import folder_sampling

T = TypeVar("T")

TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
GENERATION_CONFIG = "generation_config.json"
MODEL_CONFIG = "config.json"
TEMPLATE_JINJA = "chat_template.jinja"
TEMPLATE_JSON = "chat_template.json"
MORE_TEMPLATES = "additional_chat_templates"  # a folder of .jinja files

PRECEDENCE: Mapping[str, tuple[str, ...]] = {
    "special tokens": (TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP),  # texts, each by itself
    "added tokens": (TOKENIZER_CONFIG, ADDED_TOKENS),  # each by itself
    "add_prefix_space": (TOKENIZER_CONFIG,),  # and "legacy": of a tokenizer.model
    "add_bos_token": (TOKENIZER_CONFIG,),  # then the tokenizer's own file
    "bos_token_id": (GENERATION_CONFIG, MODEL_CONFIG),  # where no special token's text says it
    "eos_token_id": (GENERATION_CONFIG, MODEL_CONFIG),
    "chat_template": (TEMPLATE_JINJA, MORE_TEMPLATES, TEMPLATE_JSON, TOKENIZER_CONFIG),
    "sampling": (GENERATION_CONFIG,),
}
# Damaged, these are told and gone on without: a model answers all the same.
_DISPENSABLE = frozenset({GENERATION_CONFIG, TEMPLATE_JINJA, MORE_TEMPLATES, TEMPLATE_JSON})

# The largest tokenizer.json in use has about 35 MB.
FILE_BYTES_MAX = 1 << 28

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
    sampling: SamplingParams  # what the model's makers say
    warnings: tuple[str, ...]  # what is damaged and gone on without, for the user


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
    """Read every small JSON file of `folder` that exists.

    Raises:
        TokenizerError: One that a model cannot do without is damaged.
    """
    files = _Files(folder)
    named: dict[str, str | None] = {}
    for name in reversed(PRECEDENCE["special tokens"]):
        named |= files.json(name).special_tokens()
    bos_ids = [] if "bos_token" in named else files.ids("bos_token_id")
    templates = _read_templates(files)
    sampling, remarks = folder_sampling(files.json(GENERATION_CONFIG).values)
    files.warnings += [f"{folder / GENERATION_CONFIG}: {remark}" for remark in remarks]
    return FolderConfig(
        special_tokens={name: text for name, text in named.items() if text is not None},
        added_tokens=_added_tokens(files),
        bos_id=bos_ids[0] if bos_ids else None,
        eos_ids=frozenset(files.ids("eos_token_id")),
        first_space=files.json(TOKENIZER_CONFIG).get("add_prefix_space", bool),
        every_space=files.json(TOKENIZER_CONFIG).get("legacy", bool),
        adds_bos=files.json(TOKENIZER_CONFIG).get("add_bos_token", bool),
        templates=templates,
        sampling=sampling,
        warnings=tuple(files.warnings),
    )


class _Files:
    """A folder's small files, each read once; what is wrong with one that can be spared is told."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.warnings: list[str] = []
        self._read: dict[str, _Json] = {}

    def json(self, name: str) -> "_Json":
        """The object in a file, empty where there is none."""
        if name not in self._read:
            self._read[name] = _Json(self.folder / name, {})
            path = self.folder / name
            if path.is_file():
                with self.sparing(name):
                    self._read[name] = _Json(path, parse_object(read_bytes(path), path))
        return self._read[name]

    @contextlib.contextmanager
    def sparing(self, name: str) -> Iterator[None]:
        """What is wrong with a file that a model can do without is a warning."""
        try:
            yield
        except TokenizerError as error:
            if name not in _DISPENSABLE:
                raise
            self.warnings.append(f"{error}; going on without it")

    def ids(self, key: str) -> list[int]:
        """Token ids that the first file says which says any."""
        for name in PRECEDENCE[key]:
            with self.sparing(name):
                if ids := self.json(name).ids(key):
                    return ids
        return []


class _Json:
    """The object in a JSON file; typed access."""

    def __init__(self, path: pathlib.Path, values: dict[str, object]) -> None:
        self.path = path
        self.values = values

    def get(self, key: str, kind: type[T]) -> T | None:
        value = self.values.get(key)
        if value is None or type(value) is kind:  # bool is no int here
            return value
        raise self.wrong(key)

    def ids(self, key: str) -> list[int]:
        """`key` as a list of token ids: files write one id, a list, or null.

        A multimodal model's config.json has those of its text in `text_config`.
        """
        value = self.values.get(key)
        nested = self.values.get("text_config")
        if value is None and isinstance(nested, dict):
            value = nested.get(key)
        values = value if isinstance(value, list) else [] if value is None else [value]
        ids = [token_id for token_id in values if type(token_id) is int]
        if len(ids) != len(values):
            raise self.wrong(key)
        return ids

    def special_tokens(self) -> dict[str, str | None]:
        """Text of each special token that is named; files write text, {"content": text} or null."""
        found: dict[str, str | None] = {}
        for name in _SPECIAL_NAMES:
            if name not in self.values:
                continue
            value = self.values[name]
            text = value.get("content") if isinstance(value, dict) else value
            if text is not None and not isinstance(text, str):
                raise self.wrong(name)
            found[name] = text
        return found

    def wrong(self, key: str) -> TokenizerError:
        return TokenizerError(f"{self.path}: {key} has an unexpected type", hint=_HINT)


def _added_tokens(files: _Files) -> dict[int, tuple[str, bool]]:
    """added_tokens.json maps text to id, tokenizer_config.json id to text and kind."""
    found: dict[int, tuple[str, bool]] = {}
    added, tokenizer = files.json(ADDED_TOKENS), files.json(TOKENIZER_CONFIG)
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


def _read_templates(files: _Files) -> dict[str, tuple[str, str]]:
    """The chat templates by name, and the file that each is in; of one name the first file counts.

    One without a name is "default". One that is empty is none.
    """
    found: dict[str, tuple[str, str]] = {}
    for name in PRECEDENCE["chat_template"]:
        with files.sparing(name):
            found = (_in_folder(files.folder / name) or _in_json(files.json(name))) | found
    return {name: (source, origin) for name, (source, origin) in found.items() if source.strip()}


def _in_folder(path: pathlib.Path) -> dict[str, tuple[str, str]]:
    """A .jinja file, or a folder of them, each named by its file."""
    if path.is_dir():
        return {each.stem: (_read_text(each), str(each)) for each in sorted(path.glob("*.jinja"))}
    is_one = path.suffix == ".jinja" and path.is_file()
    return {DEFAULT_TEMPLATE: (_read_text(path), str(path))} if is_one else {}


def _in_json(origin: _Json) -> dict[str, tuple[str, str]]:
    """What stands in JSON: one text, or a list of {name, template}."""
    value = origin.values.get("chat_template")
    entries = value if isinstance(value, list) else [{"name": DEFAULT_TEMPLATE, "template": value}]
    found: dict[str, tuple[str, str]] = {}
    for entry in entries if value is not None else ():
        named = entry if isinstance(entry, dict) else {}
        name, source = named.get("name"), named.get("template")
        if not isinstance(name, str) or not isinstance(source, str):
            raise origin.wrong("chat_template")
        found[name] = source, str(origin.path)
    return found


def _read_text(path: pathlib.Path) -> str:
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path} is not UTF-8: {error.reason}", hint=_HINT) from error
