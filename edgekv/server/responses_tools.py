"""The tools of a Responses request: flat functions for the model, and what clients call them.

Clients offer functions, namespaces of functions, and custom tools, whose input is raw text. A model
knows functions alone: one of a namespace is offered as `namespace__name`, a custom tool as a
function with the one string `input`. Tools that OpenAI's servers run (web_search, tool_search) are
left out.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from edgekv.chat.values import Completion, Tool
from edgekv.server.fields import Fields, invalid

_NESTING_MAX = 100
_CUSTOM_PARAMETERS = json.dumps(
    {
        "type": "object",
        "properties": {"input": {"type": "string"}},
        "required": ["input"],
        "additionalProperties": False,
    }
)


@dataclass(frozen=True)
class Origin:
    """A tool as its client calls it; it is custom if its input is raw text."""

    name: str
    namespace: str = ""
    is_custom: bool = False


class Toolbox:
    """The tools of one request, by flat name."""

    def __init__(self, offered: list[Fields]) -> None:
        """Raises Fault: one of them is malformed, or there twice."""
        self._tools: dict[str, Tool] = {}
        self._origins: dict[str, Origin] = {}
        self._flats: dict[str, dict[str, str]] = {}  # name → namespace → flat name
        for tool in offered:
            if tool.text("type") == "namespace":
                namespace = _name(tool)
                for inner in tool.objects("tools"):
                    self._add(inner, namespace)
            else:
                self._add(tool, "")

    def origin(self, flat: str) -> Origin:
        """What the client calls what the model called; a tool that nobody offered as it stands."""
        return self._origins.get(flat, Origin(flat))

    def flat(self, call: Fields) -> str:
        """The flat name of what a call of the history calls, whether it is still offered or not."""
        name, namespace = _name(call), call.text("namespace", "")
        return self._find(name, namespace) or _joined(name, namespace)

    def choice(self, body: Fields) -> dict[str, Any]:
        """The fields of a Completion that say what may be called. Raises Fault."""
        tools, name = self._tools, ""
        if isinstance(body.raw("tool_choice"), str | None):
            mode = _mode(body, "tool_choice", ("auto", "none", "required"))
        else:
            wanted = Fields(body.raw("tool_choice"), "tool_choice")
            if wanted.text("type") == "allowed_tools":
                mode = _mode(wanted, "mode", ("auto", "required"))
                allowed = {self._named(tool) for tool in wanted.objects("tools")}
                tools = {flat: tool for flat, tool in tools.items() if flat in allowed}
            else:
                mode, name = "required", self._named(wanted)
        if mode == "required" and not tools:
            raise invalid("tool_choice", '"auto" or "none" where no function is offered')
        return {"tools": tuple(tools.values()), "tool_choice": mode, "tool_name": name}

    def choice_said_back(self, completion: Completion) -> Any:
        """What may be called, as responses repeat it."""
        if not completion.tool_name:
            return completion.tool_choice
        origin = self.origin(completion.tool_name)
        return {"type": "custom" if origin.is_custom else "function", "name": origin.name}

    def _add(self, tool: Fields, namespace: str) -> None:
        kind = tool.text("type")
        if kind not in ("function", "custom"):
            return
        name = _name(tool)
        flats = self._flats.setdefault(name, {})
        if namespace in flats:
            raise invalid(tool.path("name"), "another one: there is a tool of this name already")
        flat = _joined(name, namespace)
        while flat in self._tools:
            flat += "_"
        flats[namespace] = flat
        self._origins[flat] = Origin(name, namespace, kind == "custom")
        self._tools[flat] = (_custom if kind == "custom" else _function)(flat, tool)

    def _find(self, name: str, namespace: str) -> str:
        """A tool's flat name, "" if there is none; only one of the name needs no namespace."""
        flats = self._flats.get(name, {})
        if not namespace and len(flats) == 1:
            return next(iter(flats.values()))
        return flats.get(namespace, "")

    def _named(self, tool: Fields) -> str:
        """The flat name of what a tool_choice names. Raises Fault: it is not offered."""
        if tool.text("type") not in ("function", "custom"):
            raise invalid(tool.path("type"), '"function" or "custom": other tools do not run here')
        flat = self._find(_name(tool), tool.text("namespace", ""))
        if not flat:
            raise invalid(tool.path("name"), "the name of a tool that is offered")
        return flat


def json_text(of: Fields, name: str) -> str:
    """A JSON object as JSON text, for values that are frozen. Raises Fault: it is none."""
    level = [of.raw(name)]
    if not isinstance(level[0], dict):
        raise invalid(of.path(name), "a JSON object")
    for _ in range(_NESTING_MAX):
        level = [inner for value in level for inner in _inner(value)]
    if level:
        raise invalid(of.path(name), f"nested at most {_NESTING_MAX} deep")
    return json.dumps(of.raw(name), ensure_ascii=False)


def _inner(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _function(flat: str, tool: Fields) -> Tool:
    description = tool.text("description", "")
    if not tool.has("parameters"):
        return Tool(name=flat, description=description)
    return Tool(name=flat, description=description, parameters=json_text(tool, "parameters"))


def _custom(flat: str, tool: Fields) -> Tool:
    """Its grammar is told and not enforced: of many tools the model must choose one first."""
    lines = [tool.text("description", ""), "The whole text goes into `input`."]
    form = tool.mapping("format")
    if form is not None and form.text("type", "text") == "grammar":
        syntax, definition = form.text("syntax"), form.text("definition")
        lines.append(f"It must match this {syntax} grammar:\n{definition}")
    description = "\n".join(line for line in lines if line)
    return Tool(name=flat, description=description, parameters=_CUSTOM_PARAMETERS)


def _name(of: Fields) -> str:
    name = of.text("name")
    if not name:
        raise invalid(of.path("name"), "not empty")
    return name


def _joined(name: str, namespace: str) -> str:
    return f"{namespace}__{name}" if namespace else name


def _mode(of: Fields, name: str, allowed: tuple[str, ...]) -> str:
    mode = of.text(name, "auto")
    if mode not in allowed:
        raise invalid(of.path(name), f"one of {', '.join(allowed)}")
    return mode
