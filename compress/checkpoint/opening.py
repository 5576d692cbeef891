"""What a model folder is: its files, its structure, its type. Whoever takes a model asks here, and gets one answer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from compress.checkpoint.adapters import with_adapter
from compress.checkpoint.dequantized import DequantizedSource
from compress.checkpoint.matching import match
from compress.checkpoint.sources import FolderSource
from compress.encodings.format import WEIGHTS
from compress.errors import CheckpointError, UnsupportedModelError
from compress.lazy import torch, transformers
from compress.logs import LOGGER
from compress.models import adapters, loading, refusals
from compress.models import graph as graphs
from compress.models.architecture import mapped, predicts_masked
from compress.models.companions import companions, has_tokenizer, without_code

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from compress.checkpoint.artifact import Artifact
    from compress.checkpoint.matching import Matched
    from compress.checkpoint.sources import Source

MOST_COMPUTED = 1 << 26  # numbers that a model of any size may compute, such as causal masks
MOST_PARAMETERS = 4  # times those in the files: what a configuration may describe before its model is built


@dataclass(frozen=True)
class OpenedModel:
    """A model folder, matched with its structure.

    Attributes:
        folder: where it is; of an adapter, its base's.
        config: as transformers reads it.
        artifact: its weights.
        dtype: the type it computes in: what config.json says, else that of the first weights in the files.
        notes: sentences on what was left out, or taken for something else; they are logged too.
        adapter: the folder of the adapter that is merged into it.
    """

    folder: Path
    config: Any
    artifact: Artifact
    dtype: torch.dtype
    notes: tuple[str, ...] = ()
    adapter: Path | None = None

    @property
    def folders(self) -> list[Path]:
        """All that are read."""
        return [self.folder] if self.adapter is None else [self.folder, self.adapter]

    @property
    def tokenizer(self) -> Path:
        """The folder whose tokenizer is its own: an adapter may come with another template of chats."""
        return self.folder if self.adapter is None or not has_tokenizer(self.adapter) else self.adapter

    @property
    def companions(self) -> list[Path]:
        """What travels along with the weights, configuration included."""
        return [self.folder / "config.json", *companions(self.folder, self.tokenizer)]

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Parameter or buffer name -> stored type."""
        a = self.artifact
        return {n: a.source.dtype(a.name_in_source(n)) for n, _ in a.graph.tensors()}

    def of_towers(self, names: Sequence[str] | None) -> OpenedModel:
        """The same model, of which only some towers are worked on; as `models.graph.chosen`."""
        return replace(self, artifact=replace(self.artifact, graph=graphs.chosen(self.artifact.graph, names)))

    @property
    def carried_bytes(self) -> int:
        """Bytes of tensors that the model has no place for, and that are written as they are."""
        source = self.artifact.source
        found = self.artifact.carried
        return sum(torch.Size(source.shape(n)).numel() * source.dtype(n).itemsize for n in found)

    def settings(self, dtype: torch.dtype) -> dict[str, Any]:
        """config.json for a model that is to be loaded in a type; of the source's, all but names of code."""
        found = without_code(refusals.read_settings(self.folder)) | loading.INSTEAD.get(self.config.model_type, {})
        found.pop(refusals.SECTIONS[0], None)  # of codes that are read as numbers
        if found.get("architectures") and found["architectures"] != self.config.architectures:
            found["architectures"] = self.config.architectures
        if getattr(self.config, "dtype", None) == dtype:
            return found
        found.pop("torch_dtype", None)  # the old name; a loader would otherwise round once more
        return {**found, "dtype": str(dtype).removeprefix("torch.")}

    @property
    def companion_bytes(self) -> int:
        """Bytes of what travels along with the weights, configuration included."""
        return sum(file.stat().st_size for file in self.companions)


def open_model(model: str | Path) -> OpenedModel:
    """Resolve, check and match a model; reads headers, and weights only where two of them claim one place.

    Raises:
        UsageError: it cannot be found, or is nothing that can be compressed; before anything of its size is built.
    """
    found = adapters.locate(model)
    return open_folder(found.folder, found.adapter)


def open_folder(folder: Path, adapter: Path | None = None) -> OpenedModel:
    """Check and match a model's folder, or that of a base and that of its adapter; as `open_model`."""
    refusals.refuse_adapter(folder)
    settings = refusals.read_settings(folder)
    refusals.refuse_quantized(folder, settings)
    stored = FolderSource(folder)
    config = fitting_config(folder, stored)
    coded = refusals.coded_weights(settings)
    source: Source = DequantizedSource(stored, _dtype(config, stored)) if coded else stored
    if coded:
        del config.quantization_config  # what is built and written is dense
    notes = refusals.refuse_other_tasks(folder, settings, config)
    _refuse_larger(folder, config, source)
    _refuse_generation(folder)
    matched, without = _matched(folder, source, config, adapter)
    notes = [*notes, *matched.notes, *without]
    if coded:
        notes.append(f"the weights are stored as {coded}, and are read as the numbers that those mean")
    for note in notes:
        LOGGER.warning("%s: %s", folder, note)
    if adapter is not None:  # as was asked for: it is only reported
        notes.append(f"the adapter {adapter} is merged into its base {folder}")
    return OpenedModel(folder, config, matched.artifact, _dtype(config, source), tuple(notes), adapter)


def _matched(folder: Path, source: Source, config: Any, adapter: Path | None) -> tuple[Matched, list[str]]:
    """A folder's weights with its model, and a note where the head that `architectures` names is not in the files.

    Sentence encoders are saved without the head that they were trained with, and keep its name.
    """

    def fitted(built: Any) -> Matched:
        graph = graphs.find(built)
        return match(folder, source if adapter is None else with_adapter(source, adapter, graph), graph)

    model = loading.build(config)
    try:
        return fitted(model), []
    except CheckpointError:
        base = next(mapped("AutoModel", config), None)
        if not predicts_masked(model) or base is None or base is type(model):
            raise
        named = list(config.architectures)
        config.architectures = [base.__name__]
        try:
            found = fitted(loading.build(config))
        except CheckpointError:
            config.architectures = named
        else:
            head = f"the files hold no head of a {type(model).__name__}: it is taken for a {base.__name__}"
            return found, [f"{head}, and config.json of what is written says so"]
        raise


def load_measured(model: str | Path, dtype: torch.dtype | None = None) -> Any:
    """A model in memory, to be measured, after `measured_in` has checked it.

    Args:
        model: `demo`, a folder, a hub id or an adapter; a compressed folder, or one that transformers can unpack, too.
        dtype: that it is loaded in; by default its own.

    Raises:
        UsageError: it cannot be found or loaded.
    """
    found = adapters.locate(model)
    if found.adapter is not None:
        return load_merged(open_folder(found.folder, found.adapter), dtype)
    own = measured_in(found.folder)
    return loading.load_model(found.folder, dtype or own)


def load_merged(opened: OpenedModel, dtype: torch.dtype | None = None) -> Any:
    """A base in memory with its adapter merged. `dtype`: that it is loaded in; by default its own."""
    model = loading.load_model(opened.folder, dtype or opened.dtype)
    for name, _ in opened.artifact.graph.tensors():
        owner, _, leaf = name.rpartition(".")
        getattr(model.get_submodule(owner), leaf).data.copy_(opened.artifact.tensor(name))
    return model


def measured_in(folder: Path) -> torch.dtype | None:
    """The type that a folder's model is measured in; None for what a loader of quantized weights decides.

    What is not compressed already is checked as `open_model` does, before anything of its size is loaded.

    Raises:
        UsageError: it cannot be measured.
    """
    refusals.refuse_adapter(folder)
    if refusals.read_settings(folder).get("quantization_config"):
        if (folder / WEIGHTS).is_file():
            fitting_config(folder, FolderSource(folder, WEIGHTS))
        _refuse_generation(folder)
        return None
    try:
        return open_folder(folder).dtype
    except UnsupportedModelError:  # which passes cannot work on, but transformers can run
        source = FolderSource(folder)
        return _dtype(fitting_config(folder, source), source)


def fitting_config(folder: Path, source: Source) -> Any:
    """config.json as transformers reads it, refused where it describes more parts than the files hold.

    Raises:
        CheckpointError: it cannot be read, or is of another model.
    """
    refusals.refuse_counts(folder, refusals.read_settings(folder), _count(source))  # else reading takes for ever
    config = loading.read_config(folder)
    refusals.refuse_counts(folder, config.to_dict(), _count(source))  # what it leaves out has a value too
    return config


def _count(source: Source) -> int:
    """The most blocks, or experts, that the files can hold: tensors, and slices of those with three dimensions."""
    shapes = [source.shape(name) for name in source.names()]
    return len(shapes) + max((shape[0] for shape in shapes if len(shape) > 2), default=0)


def _refuse_larger(folder: Path, config: Any, source: Source) -> None:
    """A configuration of a much larger model would take the memory of that one."""
    stored = sum(torch.Size(source.shape(name)).numel() for name in source.names())
    parameters, buffers = loading.sizes_of(config) or (0, 0)
    if parameters > MOST_PARAMETERS * stored or buffers > max(MOST_PARAMETERS * stored, MOST_COMPUTED):
        raise CheckpointError(
            f"{folder}: config.json describes a model of {parameters} parameters and {buffers} computed numbers, and "
            f"the files hold {stored}; the configuration belongs to another model: fetch both from one place"
        )


def _refuse_generation(folder: Path) -> None:
    """What the finished model would not load with is found now."""
    file = folder / "generation_config.json"
    if file.is_file():
        try:
            transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # it is checked by many kinds of code
            raise CheckpointError(
                f"{file} cannot be used: {error}; correct it, or take it out of the folder"
            ) from error


def _dtype(config: Any, source: Source) -> torch.dtype:
    return loading.computes_in(config, (source.dtype(name) for name in source.names()))
