"""Keys: hashes over everything that a result depends on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from compress.lazy import torch


def key_of(*parts: Any) -> str:
    """A key from JSON-able parts, the previous key among them."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def code_fingerprint() -> str:
    """Of this package's source and of torch's version: other code may make other numbers."""
    digest = hashlib.sha256(torch.__version__.encode())
    root = Path(__file__).parent.parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
