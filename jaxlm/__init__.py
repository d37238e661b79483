"""jaxlm: a language model's whole life on one plain parameter tree, as pure functions that compose.

The names in `PUBLIC` are what other programs call. Each is imported when it is first asked for, so that importing the
package costs nothing.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

PUBLIC = {
    "generate": "jaxlm.decode:generate",
    "init": "jaxlm.nn.transformer:init",
    "load": "jaxlm.interop.load:load",
    "logits": "jaxlm.nn.transformer:logits",
    "render_chat": "jaxlm.interop.chat:render_chat",
    "save": "jaxlm.interop.save:save",
    "train": "jaxlm.evals.around:train",
}
"""Public names, and the `module:attribute` that holds each."""

__all__ = ["__version__", *PUBLIC]


def __getattr__(name: str) -> Any:
    """The public name, imported on first use (PEP 562)."""
    if name not in PUBLIC:
        raise AttributeError(f"module 'jaxlm' has no attribute {name!r}")
    module, _, attribute = PUBLIC[name].partition(":")
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *PUBLIC})
