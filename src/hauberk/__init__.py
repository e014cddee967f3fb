"""Safety defenses for vision-language models, as bound and tested artifacts.

folder = mlflow.artifacts.download_artifacts("models:/cmrm.lab-llava@production")
defense = hauberk.load(folder, model, processor)
with defense.applied(model):
    model.generate(**processor(...))

Or, in batches and outside the block, where the defense is applied already:
hauberk.respond(model, processor, requests, defense).
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "UNDEFENDED",
    "Request",
    "Response",
    "__version__",
    "keep_freed_memory",
    "load",
    "read",
    "respond",
]

UNDEFENDED = "none"
"""Stands where the name of a defense would: in records, tables, folders and the gate."""

if TYPE_CHECKING:
    from hauberk.allocator import keep_freed_memory
    from hauberk.defenses import load, read
    from hauberk.requests import Request, Response, respond

_HOMES = {
    "keep_freed_memory": "hauberk.allocator",
    "load": "hauberk.defenses",
    "read": "hauberk.defenses",
    "Request": "hauberk.requests",
    "Response": "hauberk.requests",
    "respond": "hauberk.requests",
}


def __getattr__(name: str) -> Any:
    """Import torch and transformers only when something that needs them is asked for."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'hauberk' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
