"""edgekv: one local LLM runtime that every app on a Mac can share.

The public names are loaded on first use, so that `import edgekv` costs milliseconds: MLX is
imported only when something asks for `Runtime` (or another name that needs it).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from edgekv import device as _device

__version__ = "0.1.0"

_VALUES = ("ChatMessage", "Completion", "Tool", "ToolCall")
_PLACES = {  # of others: edgekv.runtime
    "Grammar": "edgekv.tokenizer.grammar",
    "SamplingParams": "edgekv.config",
    "Stats": "edgekv.metrics",
    "connect": "edgekv.client",
} | dict.fromkeys(_VALUES, "edgekv.chat.values")

if TYPE_CHECKING:
    from edgekv import errors
    from edgekv.chat.values import ChatMessage, Completion, Tool, ToolCall
    from edgekv.client import connect
    from edgekv.config import SamplingParams
    from edgekv.metrics import Stats
    from edgekv.runtime import App, Reply, Runtime, Session
    from edgekv.tokenizer.grammar import Grammar

__all__ = [
    "App",
    "ChatMessage",
    "Completion",
    "Grammar",
    "Reply",
    "Runtime",
    "SamplingParams",
    "Session",
    "Stats",
    "Tool",
    "ToolCall",
    "__version__",
    "connect",
    "errors",
]

# Must run before the first `import mlx` of the process, and this package is imported before any
# of its modules, so here is the one place that cannot be too late.
_device.put_blas_in_front()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'edgekv' has no attribute {name!r}")
    if name == "errors":
        return import_module("edgekv.errors")
    return getattr(import_module(_PLACES.get(name, "edgekv.runtime")), name)


def __dir__() -> list[str]:
    return sorted(__all__)
