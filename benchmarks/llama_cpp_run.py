"""The next tokens that llama.cpp thinks likely; prints one JSON line.

    python benchmarks/llama_cpp_run.py MODEL.gguf PROMPTS.json

Imports nothing but xllamacpp, a wheel of llama.cpp, so that it runs in an environment of its own.
"""

import json
import sys
from pathlib import Path

import xllamacpp

MOST = 10  # tokens compared


def main() -> None:
    model, prompts = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx, params.n_parallel, params.warmup = 512, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    found, counts = [], []
    for ids, text in prompts:
        asked = {"prompt": ids, "n_predict": 1, "temperature": 0, "n_probs": MOST, "cache_prompt": False}
        likely = server.handle_completions(asked)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        found.append([(token["id"], token["logprob"]) for token in likely])
        used = server.handle_completions({"prompt": text, "n_predict": 1, "cache_prompt": False})["usage"]
        counts.append(used["prompt_tokens"])
    print(json.dumps({"likely": found, "counts": counts}))


if __name__ == "__main__":
    main()
