"""A model that answers in channels, of control tokens: what is told of it, and what goes on."""

import json
from collections.abc import Iterator

import pytest
import tokenizers
from chat_templates import HARMONY
from tiny_models import VOCAB_SIZE, tiny_config, write_folder

from edgekv.chat.channels import CONTROL
from edgekv.chat.lark import Lark
from edgekv.chat.values import ChatMessage, Completion, Tool
from edgekv.config import RuntimeConfig
from edgekv.runtime import Runtime
from edgekv.runtime.completions import Completions
from edgekv.tokenizer.grammar import Grammar

LOOK = Tool(name="look", parameters='{"type":"object","properties":{"at":{"type":"string"}}}')
NEXT = "<|end|><|start|>assistant"
THOUGHT = f"<|channel|>analysis<|message|>Hm.{NEXT}"
CALL = f'{THOUGHT}<|channel|>commentary to=functions.look <|constrain|>json<|message|>{{"at":"x"}}'
ANSWER = f"{THOUGHT}<|channel|>final<|message|>There."


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    config = tiny_config("llama", num_hidden_layers=1, vocab_size=VOCAB_SIZE + len(CONTROL))
    folder = write_folder(tmp_path_factory.mktemp("models") / "channels", config)
    path = folder / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens(sorted(CONTROL))
    tokenizer.save(str(path))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": HARMONY}))
    with Runtime.open(str(folder), config=RuntimeConfig(pool_bytes=1 << 25)) as runtime:
        yield runtime


def says(text: str) -> Grammar:
    lark = Lark(sorted(CONTROL))
    lark.rule("start", lark.text(text))
    return Grammar(kind="lark", text=lark.source, control=lark.control)


def user(text: str) -> ChatMessage:
    return ChatMessage(role="user", content=text)


def test_an_agents_conversation_goes_on_in_the_tokens_that_were_generated(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though its client leaves out what was thought, and calls are written otherwise."""
    script = iter([CALL, ANSWER, ANSWER])
    monkeypatch.setattr(Completions, "_grammar", lambda *_: says(next(script)))
    messages: list[ChatMessage] = [user("Where is it?")]
    known = 0
    for expected in ("", "There.", "There."):
        end = runtime.app("a").complete(Completion(messages=tuple(messages), tools=(LOOK,)))
        answer, usage = end.message, end.usage
        assert usage.num_cached >= known
        # What was forced at the end of an answer has no KV yet.
        known = usage.num_prompt + usage.num_output - 20
        assert (answer.reasoning, answer.content) == ("Hm.", expected)
        messages.append(
            ChatMessage(role="assistant", content=expected, tool_calls=answer.tool_calls)
        )
        if answer.tool_calls:
            assert end.reason == "tool_calls"
            messages.append(answer.tool_calls[0].result("here"))
        else:
            messages.append(user("And now?"))
    assert known > 100


def test_text_has_what_was_thought_in_tags(runtime: Runtime) -> None:
    session = runtime.app("b").session()
    reply = session.respond("Hi", grammar=says(ANSWER))
    assert reply.text == "<think>\nHm.\n</think>\n\nThere."
    before = reply.stats.num_prompt_tokens + reply.stats.num_output_tokens - 20
    reply = session.respond("And?", grammar=says(ANSWER))
    assert reply.stats.num_cached_tokens >= before
    answers = [message for message in session.messages if message.role == "assistant"]
    assert [(m.reasoning, m.content) for m in answers] == [("Hm.", "There.")] * 2
