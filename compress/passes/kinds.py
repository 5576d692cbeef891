"""Kinds of weights, such as `dense` or `sparse-quantized`, and why a pass cannot work on one."""

from __future__ import annotations

from compress.encodings import FACTORED


def why_refused(key: str, kind: str) -> str:
    """Why a pass that does not accept a kind of weight cannot work on it, and what to do."""
    if kind == FACTORED:
        return "they are nothing but two thin factors. `exclude` them"
    if kind == "dense":
        return f"nothing was lost there. Put {key} after a pruner or quantizer, or `exclude` them"
    if kind.endswith("-compensated"):
        return f"their correction makes up for what was lost before it. Put {key} before eora"
    if "quantized" in kind:
        return f"they are packed. Put {key} before the quantizer"
    return f"they were worked on before. Put {key} first"
