"""What clients of the Responses API send becomes what is asked, or a fault that says where."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import Response
from responses_script import (
    ABOUT,
    AGENTS,
    DIALECT,
    PATCH,
    WEATHER,
    assistant,
    call,
    finished,
    parse,
)

from edgekv.chat.values import ChatMessage, Completion
from edgekv.server.fields import Fault, Fields
from edgekv.server.openai_chat import ChatCompletions
from edgekv.server.responses_items import sealed
from edgekv.tokenizer.grammar import Grammar


def ask(input: object = "Hello", **fields: Any) -> Completion:
    return parse({"model": "edgekv", "input": input, **fields}).completion


def refused(**fields: Any) -> Fault:
    with pytest.raises(Fault) as caught:
        ask(**fields)
    assert caught.value.status == 400
    return caught.value


def test_a_string_is_what_the_user_says_and_instructions_come_first():
    asked = parse({"model": "any", "input": "Hello", "instructions": "Be brief.", "stream": True})
    assert asked.completion.messages == (
        ChatMessage(role="system", content="Be brief."),
        ChatMessage(role="user", content="Hello"),
    )
    assert (asked.model, asked.stream, asked.num_answers) == ("any", True, 1)
    assert asked.completion.sampling.max_tokens is None  # Codex names no limit


def codex_turn(prefix: str) -> dict[str, Any]:
    """A body in the shape that Codex sends, with other text."""

    def message(role: str, *texts: str) -> dict[str, Any]:
        kind = "output_text" if role == "assistant" else "input_text"
        parts = [{"type": kind, "text": text} for text in texts]
        return {"type": "message", "role": role, "content": parts}

    return {
        "model": "edgekv",
        "stream": True,
        "input": [
            message("developer", "Rules of the house", "And of the garden"),
            message("user", "<environment>a desk</environment>"),
            message("user", "Tidy up"),
            {
                "type": "reasoning",
                "id": f"rs_{prefix}",
                "summary": [],
                "content": None,
                "encrypted_content": sealed("Where to begin?"),
            },
            {**message("assistant", "I look first."), "id": f"msg_{prefix}"},
            {
                "type": "function_call",
                "id": f"fc_{prefix}",
                "call_id": "call_1",
                "name": "exec_command",
                "arguments": '{"cmd": "ls"}',
            },
            {
                "type": "custom_tool_call",
                "id": f"ctc_{prefix}",
                "status": "completed",
                "call_id": "call_2",
                "name": "apply_patch",
                "input": 'a "quoted"\nline',
            },
            {"type": "function_call_output", "call_id": "call_1", "output": "books"},
            {
                "type": "custom_tool_call_output",
                "call_id": "call_2",
                "output": [{"type": "input_text", "text": "Done"}],
            },
        ],
        "tools": [
            {**WEATHER, "name": "exec_command"},
            PATCH,
            AGENTS,
            {"type": "web_search", "external_web_access": False},
            {"type": "tool_search", "execution": "client", "parameters": {}},
        ],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": f"thread-{prefix}",
        "client_metadata": {"origin": "test"},
    }


def test_a_turn_of_codex_becomes_the_messages_that_were_generated():
    asked = parse(codex_turn("1")).completion
    assert asked.messages == (
        ChatMessage(role="developer", content="Rules of the house\nAnd of the garden"),
        ChatMessage(role="user", content="<environment>a desk</environment>"),
        ChatMessage(role="user", content="Tidy up"),
        assistant(
            "I look first.",
            reasoning="Where to begin?",
            tool_calls=(
                call("exec_command", '{"cmd": "ls"}'),
                call("apply_patch", '{"input": "a \\"quoted\\"\\nline"}', "call_2"),
            ),
        ),
        ChatMessage(role="tool", content="books", call_id="call_1", name="exec_command"),
        ChatMessage(role="tool", content="Done", call_id="call_2", name="apply_patch"),
    )
    assert [tool.name for tool in asked.tools] == [
        "exec_command",
        "apply_patch",
        "agents__spawn",
        "agents__wait",
    ]
    assert asked.thinking is True
    assert asked.session_key == "thread-1"


def test_respelled_history_is_the_same_history():
    body, other = codex_turn("1"), codex_turn("2")
    for item in other["input"]:
        item.pop("id", None)
        item.pop("status", None)
        if item.get("type") == "message" and len(item["content"]) == 1:
            item["content"] = item["content"][0]["text"]
            del item["type"]
        if item.get("type") == "reasoning":
            item["content"] = [{"type": "reasoning_text", "text": "Where to begin?"}]
            item["encrypted_content"] = None
        if item.get("type") == "custom_tool_call_output":
            item["output"] = "Done"
    assert parse(other).completion.messages == parse(body).completion.messages


@pytest.mark.parametrize("num_items", range(1, 4))
def test_each_message_of_the_assistant_ends_where_somebody_else_speaks(num_items: int):
    items = [
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm"}]},
        {"role": "assistant", "content": "Yes"},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": ""},
    ][:num_items]
    user = {"role": "user", "content": "And?"}
    expected = assistant(
        "Yes" if num_items > 1 else "",
        reasoning="Hm",
        tool_calls=(call("f", "{}", "c"),) if num_items > 2 else (),
    )
    says = ChatMessage(role="user", content="And?")
    assert ask([*items, user, *items]).messages == (expected, says, expected)


def test_an_empty_answer_is_a_message_and_unreadable_reasoning_is_none():
    foreign = {"type": "reasoning", "summary": [], "encrypted_content": "gAAAAABo"}
    empty = {"type": "message", "role": "assistant", "content": []}
    user = {"role": "user", "content": "Hello"}
    says = ChatMessage(role="user", content="Hello")
    assert ask([foreign, user, empty, user]).messages == (says, assistant(), says)


def test_what_hosted_tools_did_is_left_out_and_refusals_are_text():
    refusal = {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}
    search = {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {}}
    assert ask([refusal, search]).messages == (assistant("No."),)


def test_what_another_agent_says_is_input():
    parts = [{"type": "input_text", "text": "Found it"}]
    item = {"type": "agent_message", "author": "/root", "recipient": "/root/a", "content": parts}
    assert ask([item]).messages == (ChatMessage(role="user", content="Found it"),)


def test_an_empty_input_is_answered():
    # Codex --oss asks so whether the model is there.
    asked = ask("", max_output_tokens=1)
    assert asked.messages == (ChatMessage(role="user", content=""),)
    assert asked.sampling.max_tokens == 1


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("previous_response_id", {"previous_response_id": "resp_1"}),
        ("conversation", {"conversation": {"id": "conv_1"}}),
        ("prompt", {"prompt": {"id": "pmpt_1"}}),
        ("background", {"background": True}),
        ("input[0].type", {"input": [{"type": "item_reference", "id": "msg_1"}]}),
    ],
)
def test_what_needs_a_memory_of_responses_is_refused(param: str, fields: dict[str, Any]):
    fault = refused(**fields)
    assert fault.param == param
    assert "this server keeps no responses; send the whole input" in fault.message


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("input", {"input": []}),
        ("input", {"input": None}),
        ("input", {"input": {"role": "user"}}),
        ("input[0]", {"input": ["Hello"]}),
        ("input[0].role", {"input": [{"role": "tool", "content": "x"}]}),
        ("input[0].content", {"input": [{"role": "user", "content": 5}]}),
        ("input[0].type", {"input": [{"type": "compaction", "encrypted_content": "x"}]}),
        (
            "input[0].content[1].type",
            {
                "input": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "input_text", "text": "See"},
                            {"type": "input_image", "image_url": "data:,"},
                        ],
                    }
                ]
            },
        ),
        (
            "input[0].output[0].type",
            {
                "input": [
                    {
                        "type": "function_call_output",
                        "call_id": "c",
                        "output": [{"type": "input_file", "file_id": "f"}],
                    }
                ]
            },
        ),
        ("instructions", {"instructions": ["Be brief"]}),
        ("tools[0].name", {"tools": [{"type": "function"}]}),
        ("tools[0].name", {"tools": [{"type": "custom", "name": ""}]}),
        ("tools[1].name", {"tools": [WEATHER, WEATHER]}),
        ("tools[0].parameters", {"tools": [{**WEATHER, "parameters": []}]}),
        ("tools[0].tools[1].name", {"tools": [{**AGENTS, "tools": [WEATHER, WEATHER]}]}),
        ("tool_choice", {"tool_choice": "sometimes"}),
        ("tool_choice", {"tool_choice": "required"}),
        ("tool_choice", {"tool_choice": "required", "tools": [{"type": "web_search"}]}),
        ("tool_choice.name", {"tool_choice": {"type": "function", "name": "f"}}),
        ("tool_choice.type", {"tool_choice": {"type": "web_search"}, "tools": [WEATHER]}),
        ("text.format.type", {"text": {"format": {"type": "xml"}}}),
        ("text.format.schema", {"text": {"format": {"type": "json_schema", "name": "a"}}}),
        ("reasoning.effort", {"reasoning": {"effort": 3}}),
        ("temperature", {"temperature": 2.1}),
        ("top_p", {"top_p": -0.1}),
        ("top_logprobs", {"top_logprobs": 21}),
        ("max_output_tokens", {"max_output_tokens": 0}),
        ("metadata", {"metadata": {"a": 1}}),
    ],
)
def test_bad_input_names_its_field(param: str, fields: dict[str, Any]):
    assert refused(**fields).param == param


def test_schemas_nested_without_end_are_refused():
    schema: dict[str, Any] = {}
    for _ in range(400):
        schema = {"not": schema}
    assert refused(tools=[{**WEATHER, "parameters": schema}]).param == "tools[0].parameters"


def test_fields_that_change_nothing_are_ignored():
    ignored = {
        "store": True,
        "truncation": "auto",
        "service_tier": "flex",
        "user": "u",
        "safety_identifier": "s",
        "client_metadata": {"a": "b"},
        "stream_options": {"include_obfuscation": False},
        "text": {"verbosity": "low"},
        "reasoning": {"summary": "detailed"},
        "invented": [1],
    }
    assert ask(**ignored) == ask()


@pytest.mark.parametrize(
    ("effort", "thinking"), [(None, None), ("none", False), ("minimal", False), ("xhigh", True)]
)
def test_effort_is_whether_the_model_thinks(effort: str | None, thinking: bool | None):
    asked = ask(reasoning={"effort": effort})
    assert (asked.thinking, asked.effort) == (thinking, effort or "")


@pytest.mark.parametrize(
    ("said", "thinking", "effort"),
    [
        ({}, None, ""),
        ({"reasoning_effort": "high"}, True, "high"),
        ({"reasoning_effort": "none"}, False, "none"),
        ({"chat_template_kwargs": {"reasoning_effort": "low"}}, True, "low"),
        ({"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False}}, False,
         "low"),
    ],
)  # fmt: skip
def test_effort_of_chat_completions(said: dict[str, Any], thinking: bool | None, effort: str):
    body = {"messages": [{"role": "user", "content": "Hi"}], **said}
    asked = ChatCompletions().parse(Fields(body)).completion
    assert (asked.thinking, asked.effort) == (thinking, effort)


def test_sampling_is_as_asked():
    asked = ask(temperature=0, top_p=0.5, max_output_tokens=77, top_logprobs=2).sampling
    assert (asked.temperature, asked.top_p) == (0.0, 0.5)
    assert (asked.max_tokens, asked.logprobs) == (77, 2)
    assert ask(top_logprobs=0).sampling.logprobs is None
    assert ask(include=["message.output_text.logprobs"]).sampling.logprobs == 0
    assert ask(top_p=0).sampling.top_p == 0


def test_formats_are_grammars():
    schema = {"type": "object", "properties": {"größe": {"type": "integer"}}}
    form = {"type": "json_schema", "name": "size", "schema": schema, "strict": True}
    grammar = ask(text={"format": form}).grammar
    assert grammar is not None
    assert (grammar.kind, json.loads(grammar.text)) == ("json_schema", schema)
    assert ask(text={"format": {"type": "json_object"}}).grammar == Grammar(kind="json_object")
    assert ask(text={"format": {"type": "text"}}).grammar is None


def test_tools_are_offered_flat():
    function, patch, spawn, wait = ask(tools=[WEATHER, PATCH, AGENTS]).tools
    assert function.schema() == WEATHER["parameters"]
    assert patch.schema()["required"] == ["input"]
    assert "Edits files" in patch.description
    assert PATCH["format"]["definition"] in patch.description  # type: ignore[index]
    assert (spawn.name, wait.name) == ("agents__spawn", "agents__wait")
    assert wait.schema() == {"type": "object", "properties": {}}


def test_flat_names_stay_apart():
    tools = [{**WEATHER, "name": "agents__spawn"}, AGENTS]
    names = [tool.name for tool in ask(tools=tools).tools]
    assert len(set(names)) == 3
    calls = [
        {"type": "function_call", "call_id": "1", "name": "agents__spawn"},
        {"type": "function_call", "call_id": "2", "name": "spawn", "namespace": "agents"},
    ]
    (message,) = ask(calls, tools=tools).messages
    assert [it.name for it in message.tool_calls] == names[:2]


@pytest.mark.parametrize("tools", [[AGENTS], []])
def test_calls_of_the_history_keep_their_flat_names(tools: list[Any]):
    item = {"type": "function_call", "call_id": "1", "name": "spawn", "namespace": "agents"}
    (message,) = ask([item], tools=tools).messages  # Codex compacts with no tools at all
    assert message.tool_calls[0].name == "agents__spawn"


def test_a_namespace_that_a_client_forgot_is_found_again():
    item = {"type": "function_call", "call_id": "1", "name": "spawn"}
    assert ask([item], tools=[AGENTS]).messages[0].tool_calls[0].name == "agents__spawn"


@pytest.mark.parametrize(
    ("choice", "mode", "name", "num_tools"),
    [
        (None, "auto", "", 4),
        ("none", "none", "", 4),
        ("required", "required", "", 4),
        ({"type": "function", "name": "get_weather"}, "required", "get_weather", 4),
        ({"type": "custom", "name": "apply_patch"}, "required", "apply_patch", 4),
        ({"type": "function", "name": "wait"}, "required", "agents__wait", 4),
        (
            {
                "type": "allowed_tools",
                "mode": "required",
                "tools": [
                    {"type": "custom", "name": "apply_patch"},
                    {"type": "function", "name": "wait", "namespace": "agents"},
                ],
            },
            "required",
            "",
            2,
        ),
    ],
)
def test_tool_choice(choice: object, mode: str, name: str, num_tools: int):
    body = {"input": "Hi", "tools": [WEATHER, PATCH, AGENTS], "tool_choice": choice}
    asked = parse(body)
    it = asked.completion
    assert (it.tool_choice, it.tool_name, len(it.tools)) == (mode, name, num_tools)
    Response.model_validate(DIALECT.whole(asked, ABOUT, [finished(assistant("Hi"))]))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
WORDS = """message reasoning function_call function_call_output custom_tool_call user assistant
    function custom namespace allowed_tools required json_schema input_text output_text refusal f"""
NAMES = """type role content name namespace call_id arguments input output summary tools tool_choice
    encrypted_content text format schema parameters reasoning effort include model stream metadata
    instructions mode max_output_tokens top_p temperature top_logprobs refusal syntax"""
NAME = st.sampled_from(NAMES.split())
LIKELY = st.recursive(
    st.sampled_from(WORDS.split()) | st.none() | st.booleans() | st.integers() | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAME, inner, max_size=4),
    max_leaves=8,
)


def among(**first: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Objects of some of the fields that are read, these first ones always there."""
    drawn = st.dictionaries(NAME, st.text(max_size=3) | LIKELY, max_size=5)
    return st.tuples(drawn, st.fixed_dictionaries(first)).map(lambda both: {**both[0], **both[1]})


ITEM = among(type=st.sampled_from(WORDS.split()[:5]))
BODY = among(input=st.text(max_size=3) | st.lists(ITEM, min_size=1, max_size=3))


@pytest.mark.slow
@given(BODY | LIKELY | JSON)
def test_any_json_is_asked_or_a_fault(body: object):
    try:
        asked = parse(body)
    except Fault as fault:
        json.dumps(DIALECT.error(fault))
        return
    hash(asked.completion)
    json.dumps(DIALECT.whole(asked, ABOUT, [finished(assistant("Hi"))]))
