"""LoRA adapters as PEFT writes them: which base one belongs to, and what its configuration says."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CheckpointError, UsageError
from compress.io.small_file import read_object
from compress.models import hub
from compress.models.refusals import ADAPTER, has_weights, is_adapter

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

CONFIG, WEIGHTS = ADAPTER
# Settings with which an adapter is more, or something else, than W + scale * B A, and what each is.
OTHERS = {
    "target_parameters": "factors of fused parameters, such as those of experts",
    "trainable_token_indices": "rows of the embedding that were trained by themselves",
    "layer_replication": "a model with blocks of the base repeated",
    "alora_invocation_tokens": "an adapter that is active behind some tokens only",
    "arrow_config": "a router over several adapters",
    "use_qalora": "factors for inputs that are averaged in groups",
    "use_bdlora": "factors of blocks on a diagonal",
    "kasa_config": "an adapter with singular values of its own",
    "monteclora_config": "an adapter with noise of its own",
    "velora_config": "an adapter for compressed inputs",
}
# Ways to begin that take something off the base too: `init_lora_weights`.
CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
MOST = 1e9  # that a rank or an alpha may be
LONGEST_PATTERN, MOST_REPEATS = 500, 8  # of a regular expression in a configuration
GROUP_REPEATED = re.compile(r"\)\s*[*+{?]")  # may take time without end


@dataclass(frozen=True)
class Located:
    """Where a model is.

    Attributes:
        folder: the model's; of an adapter, its base's.
        adapter: the adapter's, where it is one.
    """

    folder: Path
    adapter: Path | None = None

    @property
    def folders(self) -> list[Path]:
        """All that are read."""
        return [self.folder] if self.adapter is None else [self.folder, self.adapter]


def locate(model: str | Path) -> Located:
    """From what the user calls a model (`demo`, a folder, a hub id, an adapter, BASE+ADAPTER) to folders on disk.

    Raises:
        UsageError: there is nothing of that name, or an adapter whose base is not known.
    """
    both = _split(model)
    if both is None:
        folder = hub.resolve(model)
        if not is_adapter(folder) or has_weights(folder):  # which `open_folder` then refuses
            return Located(folder)
        return Located(_base_of(folder), folder)
    base, adapter = (hub.resolve(name) for name in both)
    if not is_adapter(adapter) or has_weights(adapter):
        said = "holds a model's weights" if has_weights(adapter) else f"holds no {WEIGHTS}"
        raise UsageError(f"{model} means the model {both[0]} with the adapter {both[1]}, and {adapter} {said}")
    return Located(base, adapter)


def parts(model: str | Path) -> tuple[str, ...]:
    """What the user calls a model, or a base and an adapter, each by its own name."""
    return _split(model) or (str(model),)


def existing_parts(model: str) -> list[Path]:
    """The files and folders on disk that are part of what the user calls a model."""
    return [Path(name) for name in parts(model) if Path(name).exists()]


def _split(model: str | Path) -> tuple[str, str] | None:
    """BASE+ADAPTER as two names; None for one name, such as that of a folder with a plus in it."""
    name = str(model)
    if "+" not in name or Path(name).exists():
        return None
    pairs = [(name[:i], name[i + 1 :]) for i, letter in enumerate(name) if letter == "+"]
    # Names of folders may hold a plus; those on the hub never do.
    return next((pair for pair in pairs if all(map(_may_be_model, pair))), pairs[0] if all(pairs[0]) else None)


def _may_be_model(name: str) -> bool:
    return bool(name) and (name == "demo" or Path(name).is_dir() or ("+" not in name and name.count("/") == 1))


def _base_of(adapter: Path) -> Path:
    """The folder of the base that an adapter's configuration names, seen from the adapter or from here.

    Raises:
        UsageError: it names none, or none that can be found.
    """
    settings = read_settings(adapter)
    name, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    how = f"say which model it belongs to: BASE+{adapter}"
    if not isinstance(name, str) or not name:
        raise UsageError(f"{adapter / CONFIG} names no base (base_model_name_or_path); {how}")
    beside = adapter / name
    found = beside if beside.is_dir() else Path(name)
    if found.is_dir():
        return found
    if isinstance(revision, str) and revision != "main":
        raise UsageError(
            f"{adapter} belongs to revision {revision} of {name}, and models are fetched without one; fetch it, and "
            f"{how}"
        )
    try:
        return hub.resolve(name)
    except UsageError as error:
        raise UsageError(f"the base of the adapter {adapter} cannot be found: {error}. Else {how}") from error


def read_settings(adapter: Path) -> dict[str, Any]:
    """adapter_config.json as it stands.

    Raises:
        CheckpointError: there is none, or it is no JSON object.
    """
    file = adapter / CONFIG
    if not file.is_file():
        raise CheckpointError(f"{adapter} is an adapter without {CONFIG}, which says what it is; fetch it again")
    return read_object(file)


@dataclass(frozen=True)
class LoraConfig:
    """What an adapter's configuration says of its factors.

    Attributes:
        rank, alpha: of every layer that no pattern names.
        ranks, alphas: pattern of the end of a layer's name -> another one; the first that fits wins.
        rooted: whether alpha is divided by the root of the rank.
        task: what it was trained for, for messages.
    """

    rank: int
    alpha: float
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    rooted: bool = False
    task: str = ""

    @classmethod
    def read(cls, adapter: Path) -> LoraConfig:
        """Read adapter_config.json.

        Raises:
            CheckpointError: something else than a LoRA, or values that mean nothing.
        """
        settings = read_settings(adapter)
        _refuse_others(adapter, settings)
        return cls.of(settings, adapter / CONFIG)

    @classmethod
    def of(cls, settings: Mapping[str, Any], file: Path) -> LoraConfig:
        """From what a configuration says. `file`: where it stands, for messages.

        Raises:
            CheckpointError: values that mean nothing.
        """
        numbers = {"r": settings.get("r", 8), "lora_alpha": settings.get("lora_alpha", 8)}
        patterns = {key: settings.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}
        for key, found in patterns.items():
            if not isinstance(found, dict):
                raise CheckpointError(f"{file}: {key} must map layers to numbers; fetch it again")
            numbers |= {f"{key}: {name}": value for name, value in found.items()}
        for key, value in numbers.items():
            whole = key == "r" or key.startswith("rank_pattern")
            fine = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
            if not fine or not abs(value) <= MOST or (whole and value < 1):
                kind = "a whole number of at least 1" if whole else "a number"
                raise CheckpointError(f"{file}: {key} is {value!r:.40}, and must be {kind}; fetch it again")
        for pattern in (*patterns["rank_pattern"], *patterns["alpha_pattern"]):
            _refuse_pattern(file, pattern)
        rooted = bool(settings.get("use_rslora"))
        ranks, alphas = patterns["rank_pattern"], patterns["alpha_pattern"]
        return cls(numbers["r"], numbers["lora_alpha"], ranks, alphas, rooted, str(settings.get("task_type") or ""))

    def rank_of(self, layer: str) -> int:
        """The rank of a layer."""
        return next((rank for pattern, rank in self.ranks.items() if _names(pattern, layer)), self.rank)

    def scale_of(self, layer: str) -> float:
        """What B A of a layer is multiplied with."""
        alpha = next((alpha for pattern, alpha in self.alphas.items() if _names(pattern, layer)), self.alpha)
        rank = self.rank_of(layer)
        return alpha / (math.sqrt(rank) if self.rooted else rank)


def _refuse_others(adapter: Path, settings: Mapping[str, Any]) -> None:
    for reason in _other(settings):
        raise CheckpointError(
            f"{adapter} {reason}; merge it with the library that made it (in peft: merge_and_unload, then "
            "save_pretrained), and give the merged model"
        )


def _other(settings: Mapping[str, Any]) -> Iterator[str]:
    """What an adapter is that is no plain LoRA."""
    kind = settings.get("peft_type")
    if kind != "LORA":
        yield f"is an adapter of the type {kind!r:.40} ({CONFIG}: peft_type), and only LORA is merged here"
    for key, what in OTHERS.items():
        if settings.get(key):
            yield f"is no plain LoRA: it has {what} ({CONFIG}: {key})"
    begun = settings.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(CHANGED_BASE):
        yield f"belongs to a base that was changed when it was begun ({CONFIG}: init_lora_weights is {begun:.40})"


def _refuse_pattern(file: Path, pattern: str) -> None:
    """Refuse a regular expression that is none, or whose search may take time without end."""
    try:
        re.compile(_whole(pattern))
        repeats = sum(pattern.count(sign) for sign in "*+{")
        endless = len(pattern) > LONGEST_PATTERN or repeats > MOST_REPEATS or GROUP_REPEATED.search(pattern)
        reason = "it repeats too much" if endless else ""
    except (re.error, RecursionError, OverflowError) as error:
        reason = str(error)
    if reason:
        raise CheckpointError(f"{file}: {pattern!r:.80} cannot be used as a pattern of layers: {reason}; name layers")


def _whole(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def _names(pattern: str, layer: str) -> bool:
    """Whether a layer's name ends as a pattern says."""
    return re.match(_whole(pattern), layer) is not None
