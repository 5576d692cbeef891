"""What llama.cpp makes of a file: run by an interpreter that has xllamacpp; prints one JSON line.

    python gguf_in_llama_cpp.py MODEL.gguf '{"prompts": [[1, 2]], "texts": ["a"], "embed": false}'

Attention is computed without flash attention and with float32 keys and values, so that what differs is no rounding.
"""

import json
import sys
import urllib.request
from typing import Any

import xllamacpp


def main() -> None:
    asked: dict[str, Any] = json.loads(sys.argv[2])
    params = xllamacpp.CommonParams()
    params.model.path = sys.argv[1]
    params.n_ctx, params.n_parallel, params.warmup = 256, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if asked["embed"]:
        params.embedding, params.pooling_type = True, xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    server = xllamacpp.Server(params)
    found = []
    for prompt in asked["prompts"]:
        if asked["embed"]:
            answer = server.handle_embeddings({"input": prompt, "embd_normalize": -1})
            found.append(answer["data"][0]["embedding"])
            continue
        wanted = {"prompt": prompt, "n_predict": 1, "temperature": 0, "n_probs": asked["words"], "cache_prompt": False}
        likely = server.handle_completions(wanted)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        found.append([p for _, p in sorted((token["id"], token["logprob"]) for token in likely)])
    cut = []
    for text in asked["texts"]:
        body = json.dumps({"content": text, "add_special": True}).encode()
        header = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{server.listening_address}/tokenize", data=body, headers=header)
        cut.append(json.loads(urllib.request.urlopen(request, timeout=60).read())["tokens"])
    print(json.dumps({"found": found, "cut": cut}))


if __name__ == "__main__":
    main()
