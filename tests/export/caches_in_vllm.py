"""Run by a Python with vllm: the scales of keys and values that it has for each attention layer of a folder, as JSON.

    python caches_in_vllm.py FOLDER FOUND.json

The cache itself is of bfloat16 here: vLLM has one of FP8 only on processors with AVX-512 and on graphics processors.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}


def scales(model: Any) -> dict[str, dict[str, list[float]]]:
    """Attention layer -> its scales."""
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "_k_scale")}
    return {
        name: {leaf: getattr(module, f"_{leaf}").flatten().tolist() for leaf in ("k_scale", "v_scale")}
        for name, module in layers.items()
    }


if __name__ == "__main__":
    from vllm import LLM

    folder, found = sys.argv[1:]
    model = LLM(folder, dtype="bfloat16", max_model_len=128, enforce_eager=True, kv_cache_dtype="bfloat16")
    (seen,) = model.apply_model(scales)
    Path(found).write_text(json.dumps(seen))
