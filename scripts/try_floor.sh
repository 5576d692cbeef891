#!/usr/bin/env bash
# Run a few tests with the oldest transformers that pyproject.toml accepts, laid over the environment of PYTHON.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-.venv/bin/python}
floor=$(sed -n 's/^ *"transformers>=\([0-9.]*\)".*/\1/p' pyproject.toml)
folder=build/floor-$floor

if [ ! -d "$folder" ]; then
    mkdir -p build
    grep -v '^transformers==' constraints.txt >build/constraints.txt
    "$python" -m pip install -q --target "$folder.partial" -c build/constraints.txt "transformers==$floor"
    mv "$folder.partial" "$folder"
fi
export PYTHONPATH="$PWD:$PWD/$folder"
"$python" -c "import transformers; assert transformers.__version__ == '$floor', transformers.__version__"
"$python" -m pytest -n 2 --dist worksteal tests/test_packed.py tests/test_apply.py tests/passes/test_gptq.py "$@"
