"""Python functions as tools: what the model is told of them, and how its calls are run.

A function's name, its docstring and the types of its parameters are the tool's. Pydantic reads
these types, checks the arguments of a call by them, and writes what comes back as JSON.
"""

import asyncio
import inspect
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from edgekv.chat.typed import described, refusals
from edgekv.chat.values import ChatMessage, Tool, ToolCall
from edgekv.errors import ConfigError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

Function = Callable[..., object]
Tools = Sequence[Tool | Function]


class Functions:
    """Functions that the model may call. Any thread may run its calls.

    Attributes:
        tools: What the model is told of them.
        async_names: Those that must be awaited.
    """

    def __init__(self, functions: Sequence[Function]) -> None:
        """Raises ConfigError: One has no name, is named like another, or cannot be described."""
        self.tools: tuple[Tool, ...] = ()
        self.async_names: set[str] = set()
        self._adapters: dict[str, TypeAdapter[Any]] = {}
        for index, function in enumerate(functions):
            self._add(f"tools[{index}]", function)

    def _add(self, field: str, function: Function) -> None:
        name = function.__name__ if inspect.isroutine(function) else ""
        if not name.isidentifier():
            raise ConfigError.of(field, function, "a Tool, or a function that has a name")
        if name in self._adapters:
            raise ConfigError.of(field, name, "named otherwise than the tools before it")
        self._adapters[name], schema = described(field, function, "a function with types")
        if schema.get("type") != "object":
            raise ConfigError.of(field, function, "a function whose parameters have names")
        if inspect.iscoroutinefunction(function):
            self.async_names.add(name)
        text = json.dumps(schema, ensure_ascii=False)
        tool = Tool(name=name, description=inspect.getdoc(function) or "", parameters=text)
        self.tools += (tool,)

    def call(self, call: ToolCall) -> ChatMessage:
        """Run a call, and say what came of it; what the function raises is said to the model."""
        try:
            return call.result(_text(self._run(call)))
        except Exception as error:  # noqa: BLE001 - whatever a function raises: the model hears it
            return call.result(_said(error))

    async def acall(self, call: ToolCall) -> ChatMessage:
        """`call` that awaits what must be, and runs the others where they do not block the loop."""
        try:
            if call.name in self.async_names:
                return call.result(_text(await self._run(call)))
            return call.result(_text(await asyncio.to_thread(self._run, call)))
        except Exception as error:  # noqa: BLE001 - see `call`
            return call.result(_said(error))

    def _run(self, call: ToolCall) -> Any:
        if call.name not in self._adapters:
            names = ", ".join(self._adapters)
            raise ConfigError(f"there is no tool {call.name!r}, only {names}")
        return self._adapters[call.name].validate_json(call.arguments)


def read_tools(tools: Tools) -> tuple[tuple[Tool, ...], Functions | None]:
    """What the model is told of tools, and what runs its calls: None if the caller does.

    Raises:
        ConfigError: They are neither functions nor `Tool` values, or some of each.
    """
    if not isinstance(tools, list | tuple):
        raise ConfigError.of("tools", tools, "a list of functions, or of Tool values")
    values = [tool for tool in tools if isinstance(tool, Tool)]
    if len(values) == len(tools):
        return tuple(values), None
    if values:
        names = ", ".join(tool.name for tool in values)
        raise ConfigError(
            f"tools are functions and Tool values ({names})",
            hint="give functions, whose calls are run, or Tool values, whose calls are yours",
        )
    functions = Functions([tool for tool in tools if not isinstance(tool, Tool)])
    return functions.tools, functions


def _text(value: object) -> str:
    """What a function returned, for the model: text as it is, all else as JSON."""
    from pydantic_core import to_json

    return value if isinstance(value, str) else to_json(value).decode()


def _said(error: Exception) -> str:
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        return f"error: {refusals(error)}"
    if isinstance(error, ConfigError):
        return f"error: {error}"
    return f"error: {type(error).__name__}: {error}"
