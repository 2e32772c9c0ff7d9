"""What the daemon takes: JSON schemas of the requests of each API, out of which `openapi` is made.

They have the fields that edgekv reads, with all that they may be; others are ignored, and null is
as if a field were not there.
"""

from collections.abc import Mapping
from typing import Any, get_args

from edgekv.chat.values import ROLES, ToolChoice
from edgekv.config import PREFILL_MODES, PRIORITIES
from edgekv.server.dialect import NUM_ANSWERS_MAX
from edgekv.server.ollama import EFFORTS
from edgekv.server.openai_chat import STOPS_MAX, TOKENS_MAX
from edgekv.server.responses_input import LEFT_OUT, TEXTS
from edgekv.server.responses_input import ROLES as RESPONSES_ROLES

Schema = dict[str, Any]

# --- values ---


def one_of(*values: object) -> Schema:
    """One of these values."""
    return {"enum": [*values]}


def _number(low: float, high: float) -> Schema:
    return {"type": "number", "minimum": low, "maximum": high}


def _whole(low: int, high: int) -> Schema:
    return {"type": "integer", "minimum": low, "maximum": high}


def list_of(items: Schema, **bounds: int) -> Schema:
    """A list of such items."""
    return {"type": "array", "items": items, **bounds}


def either(*schemas: Schema) -> Schema:
    """What is as one of these says."""
    return {"anyOf": [*schemas]}


def object_of(needs: Mapping[str, Schema] | None = None, /, **may: Schema) -> Schema:
    """An object with fields that it must have, and others, which may also be null."""
    needed, others = needs or {}, {name: or_null(schema) for name, schema in may.items()}
    required = {"required": [*needed]} if needed else {}
    return {"type": "object", "properties": {**needed, **others}, **required}


def or_null(schema: Schema) -> Schema:
    """The same, or null."""
    if not schema or schema == _REFUSED:
        return schema
    if "enum" in schema:
        return {**schema, "enum": [*schema["enum"], None]}
    if isinstance(schema.get("type"), str):
        return {**schema, "type": [schema["type"], "null"]}
    return either(*schema.get("anyOf", [schema]), _REFUSED)


def _other_than(*values: str) -> Schema:
    return {"type": "string", "not": one_of(*values)}


ANY: Schema = {}
_REFUSED: Schema = {"type": "null"}  # what edgekv lacks, where to ignore it would change the answer
TEXT: Schema = {"type": "string"}
_SOME_TEXT: Schema = {"type": "string", "minLength": 1}
FLAG: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
SOME_OBJECT: Schema = {"type": "object"}
_JSON_SCHEMA: Schema = {"type": ["object", "boolean"]}
_STRINGS = either(TEXT, list_of(TEXT))
_STOP_TEXT: Schema = {"type": "string", "minLength": 1, "maxLength": 1024}
_STOP = either(_STOP_TEXT, list_of(_STOP_TEXT, maxItems=STOPS_MAX))
_NO_IMAGES = list_of(ANY, maxItems=0)
_NO_BIAS: Schema = {"type": "object", "maxProperties": 0}

_TOKENS = _whole(1, TOKENS_MAX)
_TEMPERATURE, _OPENAI_TEMPERATURE, _SHARE = _number(0, 100), _number(0, 2), _number(0, 1)
_TOP_K, _TOP_LOGPROBS = _whole(0, 1 << 30), _whole(0, 20)
_PENALTY, _TAKEN = _number(0.01, 100), _number(-2, 2)
_SEED = _whole(-(1 << 63), (1 << 64) - 1)
_SIGNED = _whole(-(1 << 30), 1 << 30)

# What edgekv adds to each API, for clients that cannot send headers.
_OURS = {
    "edgekv": object_of(session=TEXT, priority=one_of(*PRIORITIES), prefill=one_of(*PREFILL_MODES)),
    "prompt_cache_key": TEXT,
}

# --- OpenAI's requests ---

_SAMPLING = {
    **{"temperature": _TEMPERATURE, "top_p": _SHARE, "top_k": _TOP_K, "min_p": _SHARE},
    **{"repetition_penalty": _PENALTY, "seed": _SEED, "stop": _STOP},
    **{"presence_penalty": _TAKEN, "frequency_penalty": _TAKEN, "logit_bias": _NO_BIAS},
    **{"max_tokens": _TOKENS, "n": _whole(1, NUM_ANSWERS_MAX)},
    **{"stream": FLAG, "stream_options": object_of(include_usage=FLAG)},
    **{"model": TEXT, **_OURS},
}
_CHAT_TEXT = either(
    TEXT,
    list_of(
        either(
            object_of(type=one_of("text"), text=TEXT),
            object_of({"type": one_of("refusal")}, refusal=TEXT),
        )
    ),
)
_CHAT_CALL = either(
    object_of({"function": object_of({"name": TEXT})}, type=one_of("function"), id=TEXT),
    object_of({"type": one_of("custom"), "custom": object_of({"name": TEXT})}, id=TEXT),
)
_FUNCTION = object_of({"name": TEXT}, description=TEXT, parameters=SOME_OBJECT)
CHAT = object_of(
    {
        "messages": list_of(
            object_of(
                {"role": one_of(*ROLES, "function")},
                content=_CHAT_TEXT,
                reasoning_content=ANY,
                tool_calls=list_of(_CHAT_CALL),
                tool_call_id=TEXT,
                name=TEXT,
            ),
            minItems=1,
        )
    },
    **_SAMPLING,
    max_completion_tokens=_TOKENS,
    max_output_tokens=_TOKENS,
    logprobs=FLAG,
    top_logprobs=_TOP_LOGPROBS,
    reasoning_effort=TEXT,
    chat_template_kwargs=object_of(enable_thinking=FLAG, reasoning_effort=TEXT),
    tools=list_of(object_of({"function": _FUNCTION}, type=one_of("function"))),
    tool_choice=either(
        one_of(*get_args(ToolChoice)),
        object_of({"type": one_of("function"), "function": object_of({"name": TEXT})}),
    ),
    parallel_tool_calls=FLAG,
    response_format=either(
        object_of({"type": one_of("text", "json_object")}),
        object_of(
            {"type": one_of("json_schema"), "json_schema": object_of({"schema": _JSON_SCHEMA})}
        ),
    ),
)
TEXT_COMPLETION = object_of(
    {"prompt": either(_SOME_TEXT, list_of(_SOME_TEXT, minItems=1, maxItems=1))},
    **_SAMPLING,
    logprobs=_TOP_LOGPROBS,
    echo=FLAG,
    suffix=_REFUSED,
)

_PART_TYPES = [kind for kind in TEXTS if kind != "refusal"]
_PARTS = either(
    TEXT,
    list_of(
        either(
            object_of({"type": one_of(*_PART_TYPES), "text": TEXT}),
            object_of({"type": one_of("refusal"), "refusal": TEXT}),
        )
    ),
)
_CALL_ID = {"call_id": TEXT, "name": _SOME_TEXT}
_ITEM = either(
    object_of({"role": one_of(*RESPONSES_ROLES)}, type=one_of("message"), content=_PARTS),
    object_of({"type": one_of("agent_message")}, content=_PARTS),
    object_of(
        {"type": one_of("reasoning")}, encrypted_content=TEXT, content=_PARTS, summary=_PARTS
    ),
    object_of({"type": one_of("function_call"), **_CALL_ID}, arguments=TEXT, namespace=TEXT),
    object_of({"type": one_of("custom_tool_call"), **_CALL_ID, "input": TEXT}, namespace=TEXT),
    object_of(
        {"type": one_of("function_call_output", "custom_tool_call_output"), "call_id": TEXT},
        output=_PARTS,
    ),
    object_of({"type": one_of(*sorted(LEFT_OUT))}),
)

_TOOL = (
    object_of(
        {"type": one_of("function"), "name": _SOME_TEXT},
        description=TEXT,
        parameters=SOME_OBJECT,
    ),
    object_of(
        {"type": one_of("custom"), "name": _SOME_TEXT},
        description=TEXT,
        format=either(
            object_of({"type": one_of("grammar"), "syntax": TEXT, "definition": TEXT}),
            object_of(type=_other_than("grammar")),
        ),
    ),
)
_NAMED = object_of({"type": one_of("function", "custom"), "name": _SOME_TEXT}, namespace=TEXT)
RESPONSE = object_of(
    {"input": either(TEXT, list_of(_ITEM, minItems=1))},
    instructions=TEXT,
    tools=list_of(
        either(
            *_TOOL,
            object_of(
                {"type": one_of("namespace"), "name": _SOME_TEXT},
                tools=list_of(
                    either(*_TOOL, object_of({"type": _other_than("function", "custom")}))
                ),
            ),
            object_of({"type": _other_than("function", "custom", "namespace")}),
        )
    ),
    tool_choice=either(
        one_of(*get_args(ToolChoice)),
        _NAMED,
        object_of(
            {"type": one_of("allowed_tools")},
            mode=one_of("auto", "required"),
            tools=list_of(_NAMED),
        ),
    ),
    text=object_of(
        format=either(
            object_of(type=one_of("text", "json_object")),
            object_of({"type": one_of("json_schema"), "schema": SOME_OBJECT}, name=TEXT),
        )
    ),
    parallel_tool_calls=FLAG,
    reasoning=object_of(effort=TEXT),
    include=_STRINGS,
    metadata={"type": "object", "additionalProperties": TEXT},
    temperature=_OPENAI_TEMPERATURE,
    top_p=_SHARE,
    top_logprobs=_TOP_LOGPROBS,
    max_output_tokens=_TOKENS,
    stream=FLAG,
    model=TEXT,
    background=one_of(False),
    previous_response_id=_REFUSED,
    conversation=_REFUSED,
    prompt=_REFUSED,
    **_OURS,
)

# --- Anthropic's ---

_SAID = object_of({"type": one_of("text"), "text": TEXT})
_SAYINGS = either(
    TEXT, list_of(either(_SAID, object_of({"type": one_of("tool_reference"), "tool_name": TEXT})))
)
_USER_BLOCK = object_of(
    {"type": one_of("tool_result"), "tool_use_id": TEXT}, content=_SAYINGS, is_error=FLAG
)
_ASSISTANT_BLOCKS = (
    object_of({"type": one_of("thinking"), "thinking": TEXT}),
    object_of({"type": one_of("redacted_thinking")}),
    object_of({"type": one_of("tool_use"), "id": TEXT, "name": TEXT}, input=SOME_OBJECT),
)
_JSON_OUTPUT = object_of({"type": one_of("json_schema"), "schema": _JSON_SCHEMA})
_COUNTED = {
    "system": _SAYINGS,
    "tools": list_of(
        either(
            object_of(
                {"name": TEXT, "input_schema": SOME_OBJECT},
                type=one_of("custom"),
                description=TEXT,
            ),
            object_of({"type": _other_than("custom")}, name=TEXT),
        )
    ),
    "tool_choice": either(
        object_of({"type": one_of("auto", "any", "none")}, disable_parallel_tool_use=FLAG),
        object_of({"type": one_of("tool"), "name": TEXT}, disable_parallel_tool_use=FLAG),
    ),
    "thinking": object_of({"type": one_of("enabled", "adaptive", "disabled")}),
    "output_config": object_of(format=_JSON_OUTPUT, effort=TEXT),
    "output_format": _JSON_OUTPUT,
}
_MESSAGES = list_of(
    either(
        object_of(
            {"role": one_of("user")}, content=either(TEXT, list_of(either(_SAID, _USER_BLOCK)))
        ),
        object_of(
            {"role": one_of("assistant")},
            content=either(TEXT, list_of(either(_SAID, *_ASSISTANT_BLOCKS))),
        ),
        object_of({"role": one_of("system", "developer")}, content=_SAYINGS),
    ),
    minItems=1,
)
COUNT_TOKENS = object_of({"messages": _MESSAGES}, **_COUNTED)
MESSAGES = object_of(
    {"messages": _MESSAGES, "model": TEXT, "max_tokens": _TOKENS},
    **_COUNTED,
    temperature=_TEMPERATURE,
    top_p=_SHARE,
    top_k=_TOP_K,
    stop_sequences=_STOP,
    stream=FLAG,
    thread=_REFUSED,
    **_OURS,
)

# --- Ollama's ---

_OPTIONS = object_of(
    temperature=_TEMPERATURE,
    top_k=_SIGNED,
    top_p=_SHARE,
    min_p=_SHARE,
    repeat_penalty=_PENALTY,
    presence_penalty=_TAKEN,
    frequency_penalty=_TAKEN,
    seed=_SEED,
    num_predict=_SIGNED,
    stop=_STOP,
)
_ASKED = {
    "format": either(one_of("", "json"), SOME_OBJECT),
    "think": either(FLAG, one_of(*EFFORTS)),
    "options": _OPTIONS,
    "stream": FLAG,
    "logprobs": FLAG,
    "top_logprobs": _TOP_LOGPROBS,
    **_OURS,
}
_CALLED = object_of({"function": object_of({"name": TEXT}, arguments=SOME_OBJECT)})
_OLLAMA_MESSAGE = either(
    object_of({"role": one_of("tool")}, content=TEXT, images=_NO_IMAGES, tool_name=TEXT, name=TEXT),
    object_of(
        {"role": one_of(*(role for role in ROLES if role != "tool"))},
        content=TEXT,
        images=_NO_IMAGES,
        tool_calls=list_of(_CALLED),
        thinking=TEXT,
    ),
)
OLLAMA_CHAT = either(
    object_of(
        {"model": TEXT, "messages": list_of(_OLLAMA_MESSAGE, minItems=1)},
        tools=list_of(object_of({"function": _FUNCTION})),
        **_ASKED,
    ),
    object_of({"model": TEXT}, messages=list_of(ANY, maxItems=0), **_OURS),  # only loads the model
)
GENERATE = either(
    object_of(
        {"model": TEXT, "prompt": _SOME_TEXT},
        suffix={"type": "string", "maxLength": 0},
        images=_NO_IMAGES,
        raw=FLAG,
        system=TEXT,
        **_ASKED,
    ),
    object_of({"model": TEXT}, prompt={"type": "string", "maxLength": 0}, **_OURS),
)
SHOW = either(object_of({"model": _SOME_TEXT}), object_of({"name": TEXT}, model=TEXT))
