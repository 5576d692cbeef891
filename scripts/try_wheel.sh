#!/usr/bin/env bash
# Build the wheel, install it into an empty environment, and use it there: what a user gets, without the repository.
# PYTHON names an interpreter that has the package's dependencies; they are borrowed, not installed again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-.venv/bin/python}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

git ls-files -z --cached compress pyproject.toml README.md LICENSE | xargs -0 cp --parents -t "$folder"
"$python" -m pip wheel -q --no-deps --no-build-isolation -w "$folder/dist" "$folder" 2>"$folder/log" \
    || "$python" -m pip wheel -q --no-deps -w "$folder/dist" "$folder" || { cat "$folder/log" >&2; exit 1; }

"$python" - "$folder"/dist/*.whl <<'EOF'
import subprocess
import sys
import zipfile

there = set(zipfile.ZipFile(sys.argv[1]).namelist())
files = subprocess.run(["git", "ls-files", "compress"], capture_output=True, text=True, check=True).stdout.split("\n")
missing = [file for file in files if file and file not in there]
if missing:
    sys.exit(f"{len(missing)} files of the package are not in the wheel: {', '.join(missing)}")
EOF

"$python" -m venv --without-pip "$folder/venv"
"$python" -m pip -q --python "$folder/venv/bin/python" install --no-deps --no-index "$folder"/dist/*.whl
borrowed=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
own=$("$folder/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "$borrowed" >"$own/zz_borrowed.pth" # added behind the environment's own; .pth files inside it are not read

cd "$folder"
unset PYTHONPATH
bin=$folder/venv/bin
"$bin/python" -c "
import compress, pathlib, sys
inside = pathlib.Path(compress.__file__).is_relative_to('$folder')
sys.exit(None if inside else f'tried {compress.__file__} instead of the wheel')"
"$bin/compress" list methods >list.txt
"$bin/compress" advise demo --bits 3 >advice.txt
grep -q "^gptq " list.txt
cat >tiny.yaml <<'EOF'
passes:
  - rtn: {scheme: w4g64}
EOF
"$bin/compress" run tiny.yaml demo -o out >/dev/null
"$bin/compress" check gptq-w4 demo >/dev/null
"$bin/compress" inspect out >/dev/null
echo "the wheel works: $(basename "$folder"/dist/*.whl)"
