#!/bin/sh
# Compare this package with its peer: quality and time on the bundled model, memory on a random one of 1.1 B parameters.
#
#     sh benchmarks/run.sh [FOLDER]      FOLDER gets the random checkpoints, about 3 GB (default: build/benchmarks)
#
# PYTHON is the interpreter this package is installed for. Needs the network once, for the peer's environment.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
folder=${1:-build/benchmarks}
if [ ! -x .venv-peer/bin/python ]; then
    # An installation cut short must not be taken for a finished one next time.
    rm -rf .venv-peer
    "$python" -m venv .venv-peer
    trap 'rm -rf .venv-peer' EXIT
    .venv-peer/bin/pip install torch==2.13.0
    .venv-peer/bin/pip install -r benchmarks/requirements.txt
    trap - EXIT
fi
"$python" benchmarks/quality.py --peer-python .venv-peer/bin/python
"$python" benchmarks/recovery.py --peer-python .venv-peer/bin/python
"$python" benchmarks/memory.py "$folder" --peer-python .venv-peer/bin/python --layers 6 22
"$python" benchmarks/generate.py
"$python" benchmarks/onnx_layers.py
"$python" benchmarks/onnx_memory.py "$folder"
"$python" benchmarks/tables.py
