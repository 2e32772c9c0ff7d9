"""Which template writes a conversation, and what is said where there is none."""

import json
import shutil
from pathlib import Path

import pytest
from tiny_runtime import sampling

from edgekv.config import RuntimeConfig
from edgekv.errors import ChatTemplateError, ConfigError
from edgekv.runtime import Runtime, runtime

POOL = {"pool_bytes": 1 << 26}


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """The model without a template."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    runtime._warn_once.cache_clear()
    return folder


def test_without_a_template_it_is_said_once_and_only_of_conversations(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Runtime.open(str(folder), config=RuntimeConfig(**POOL)) as opened:
        session = opened.app("a").session()
        session.respond("Once", sampling=sampling(1), raw=True)
        assert "template" not in capsys.readouterr().err
        for _ in range(2):
            session.respond("Hello", sampling=sampling(1))
            opened.app("b").session().respond("Hello", sampling=sampling(1))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "template" in line]
    assert line.startswith("warning: ")
    assert str(folder) in line
    assert "plain" in line


def test_of_several_templates_one_is_chosen(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "additional_chat_templates").mkdir()
    for name in ("rag", "tool_use"):
        source = f"{name}: {{{{ messages[0].content }}}}"
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(source)
    with Runtime.open(str(folder), config=RuntimeConfig(**POOL)) as opened:
        with pytest.raises(ChatTemplateError, match="rag, tool_use"):
            opened.app("a").session().respond("Hello", sampling=sampling(1))
        session = opened.app("a").session()
        assert session.respond("rag", sampling=sampling(1), raw=True).stats.num_prompt_tokens
    with Runtime.open(str(folder), config=RuntimeConfig(**POOL, chat_template="rag")) as opened:
        reply = opened.app("a").session().respond("Hello", sampling=sampling(1))
        assert reply.stats.num_prompt_tokens == len(opened.tokenizer.encode("rag: Hello"))
    with pytest.raises(ConfigError, match="chat_template is 'plain'"):
        Runtime.open(str(folder), config=RuntimeConfig(**POOL, chat_template="plain"))
    assert "template" not in capsys.readouterr().err


def test_kv_on_disk_is_of_ids_whatever_the_template(tiny_folder: Path, tmp_path: Path) -> None:
    """A model whose template was mended goes on with its sessions, of which it computes little."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    with Runtime.open(str(folder), config=RuntimeConfig(**POOL)) as opened:
        first = opened.app("a").session("kept").respond("Hello " * 20, sampling=sampling(4))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{# mended #}" + settings["chat_template"] + "\n\n"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with Runtime.open(str(folder), config=RuntimeConfig(**POOL)) as opened:
        session = opened.app("a").session("kept")
        assert [message.role for message in session.messages] == ["user", "assistant"]
        reply = session.respond("And?", sampling=sampling(4))
    assert reply.stats.num_restored_tokens >= first.stats.num_prompt_tokens
