"""Options of every pass that trains, and what they choose of a model."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt

from compress.calibration.training import Loss, Schedule, train
from compress.encodings import FACTORED, LowRankForm
from compress.passes.base import ModelPass, OptionError, Pass
from compress.passes.retrain.adapters import AdaptedMatrix, Recipe
from compress.passes.retrain.importance import slopes
from compress.passes.retrain.trainables import Trainables

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from compress.encodings import Form
    from compress.passes.base import Edit, Target, Whole
    from compress.passes.retrain.trainables import TrainedMatrix

Train = Literal[
    "bias", "norm", "head", "mask_lora", "scale_lora", "lora_prune", "principal", "sensitive", "lora", "full", "scale"
]  # fmt: skip
HEADS = ("lm_head", "embed_out", "classifier", "score", "head", "fc")  # what models call the layer that outputs logits
CHOSEN = ("principal", "sensitive")  # sets that train some of the weights themselves
REWRITES = ("mask_lora", "scale_lora", "lora_prune", *CHOSEN, "full")  # sets that give a matrix new values
IN_BLOCKS = (*REWRITES, "lora", "scale")
ALL_KINDS = frozenset(
    kind + tail for kind in ("sparse", "quantized", "sparse-quantized") for tail in ("", "-compensated")
) | {"dense", FACTORED}


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(Pass):
    """What is trained, and how.

    Args:
        train: what is trained, in any combination. `bias`: biases of all layers. `norm`: scales and shifts of all
            normalisations. `head`: the output layer, by LoRA. Of every selected matrix: `mask_lora`, W + (B A) * M;
            `scale_lora`, W * (B A); `lora_prune`, W + B A while training and (B A) * M in the end; `lora`, W + B A,
            merged into a dense matrix, kept beside any other, and all there is of one that is two thin factors already;
            `full`, every weight that is kept; `principal`, those that are largest in the nearest matrix of rank `rank`;
            `sensitive`, those that the loss depends on most; `scale`, the scales of a quantized one.
        rank: of the adapters.
        share: of the weights that are kept, trained by `principal` and `sensitive`.
        alpha: what they add is multiplied by alpha / rank.
        steps: of Adam.
        batch_size: calibration samples per step.
        learning_rate: the largest; it rises linearly over a tenth of the steps, then falls linearly to zero.
    """

    train: tuple[Train, ...] = ("bias", "norm", "mask_lora")
    rank: Annotated[int, Ge(1)] = 16
    alpha: Annotated[float, Gt(0)] = 32.0
    share: Annotated[float, Gt(0), Le(1)] = 0.05
    steps: Annotated[int, Ge(1)] = 200
    batch_size: Annotated[int, Ge(1)] = 4
    learning_rate: Annotated[float, Gt(0), Lt(1)] = 5e-4

    sees_slopes: ClassVar[bool] = False  # whether gradients of the loss are there to choose weights by

    @property
    def of_matrices(self) -> tuple[str, ...]:
        """The sets that train matrices inside the blocks."""
        return tuple(name for name in self.train if name in IN_BLOCKS)

    @property
    def schedule(self) -> Schedule:
        """The schedule of the learning rate."""
        return Schedule(self.steps, self.batch_size)

    def check(self) -> Iterator[OptionError]:
        yield from super().check()
        if not self.train:
            yield OptionError("train", "nothing is trained; name at least one set, such as bias, norm or mask_lora")
        if len(set(self.train)) < len(self.train):
            yield OptionError("train", "names a set twice")
        if "sensitive" in self.train and not self.sees_slopes:
            yield OptionError("train", "sensitive chooses by the loss of the whole model; use perp, or name principal")
        if "share" in self.options() and not set(CHOSEN) & set(self.train):
            yield OptionError("share", "changes nothing without principal or sensitive in train")

    def check_form(self, form: Form) -> str | None:
        """Why it cannot go on from codes of this form, or None; asked of the kinds that it accepts."""
        return None

    @property
    def head_by_default(self) -> bool:
        """Whether the output layer is trained because nobody said what is, so only where it can be."""
        return "head" in self.train and "train" not in self.options()

    def is_head(self, name: str) -> bool:
        """Whether a site outside the blocks is what `head` trains."""
        return name.rpartition(".")[2] in HEADS and not any(fnmatchcase(name, p) for p in self.exclude)

    def trains(self, parameter: str) -> bool:
        leaf = parameter.rpartition(".")[2]
        return (leaf == "bias" and "bias" in self.train) or (leaf != "bias" and "norm" in self.train)

    def sets_of(self, name: str) -> tuple[str, ...]:
        """The sets that train a site."""
        head = "head" in self.train and name.rpartition(".")[2] in HEADS
        return ("head",) if head else self.of_matrices

    @property
    def trainings(self) -> int:
        """How often the model is trained, each time with a state of its own."""
        return 1

    def learned_of(self, name: str, shape: tuple[int, int]) -> int:
        """About how many numbers are learned of a site."""
        rows, columns = shape
        some = max(1, round(self.share * rows * columns))
        known = {"full": rows * columns, "scale": rows * max(1, columns // 16), **dict.fromkeys(CHOSEN, some)}
        return sum(known.get(kind, self.rank * (rows + columns)) for kind in self.sets_of(name))

    def start(self, name: str, target: Target, slope: Tensor | None) -> TrainedMatrix:
        """A matrix as it is before training. The options are its own; `slope`: the gradient of the loss, if needed."""
        return AdaptedMatrix(target, Recipe(self.sets_of(name), self.rank, self.alpha, self.share), slope)

    def trainables(
        self, targets: Mapping[str, Target], vectors: Mapping[str, Tensor], slopes: Mapping[str, Tensor] | None = None
    ) -> Trainables:
        """Everything, as it starts. `slopes`: gradients of the loss by matrices, for `sensitive`."""
        matrices = {name: self.at(name).start(name, t, (slopes or {}).get(name)) for name, t in targets.items()}
        ready = {n: v.detach().clone().requires_grad_() for n, v in vectors.items()}
        return Trainables(matrices, ready, self.learning_rate)


@dataclass(frozen=True, kw_only=True)
class EndToEnd(ModelPass):
    """A pass that trains the whole model at once.

    Args:
        objective: `distill` trains towards the original's predictions, which takes running the original too and one
            more copy of its matrices; `next_token` trains a language model on its calibration text.
        checkpointing: compute the activations inside a block again when gradients need them, instead of keeping them.
    """

    objective: Loss = "distill"
    checkpointing: bool = True

    @property
    def calibrated(self) -> bool:
        return True

    @property
    def loss(self) -> Loss | None:
        return self.objective

    def check(self) -> Iterator[OptionError]:
        yield from super().check()
        if self.overrides:
            yield OptionError("overrides", "everything is trained together; use include and exclude")


@dataclass(frozen=True, kw_only=True)
class Retraining(TrainingOptions):
    """A pass that trains a few parameters of a compressed model and freezes the others.

    Args:
        new_biases: give a bias to every selected layer that has none, and train it with `bias`.
    """

    new_biases: bool = False

    accepts: ClassVar[frozenset[str]] = ALL_KINDS

    @property
    def calibrated(self) -> bool:
        return True

    @property
    def adds_biases(self) -> bool:
        return self.new_biases

    def check(self) -> Iterator[OptionError]:
        yield from super().check()
        if self.new_biases and "bias" not in self.train:
            yield OptionError("new_biases", "changes nothing without bias in train")

    def refusal(self, kind: str) -> str | None:
        rewriting = [name for name in self.train if name in REWRITES]
        if "quantized" in kind and rewriting:
            return (
                f"they are packed, and codes cannot take what {rewriting[0]} adds. Put {self.key} before the "
                "quantizer, or train only scale, norm, bias and lora, which is kept beside them"
            )
        if kind == FACTORED and rewriting:
            return f"they are nothing but two thin factors, which {rewriting[0]} cannot change. Train lora, which can"
        if kind == "sparse-compensated" and rewriting:
            return f"their correction makes up for what was lost before it. Put {self.key} before eora, or train lora"
        return super().refusal(kind)

    def produces(self, kind: str) -> str:
        beside = "lora" in self.train and kind not in ("dense", FACTORED) and not kind.endswith("-compensated")
        return f"{kind}-compensated" if beside else kind

    def low_rank_form(self, shape: tuple[int, int]) -> LowRankForm | None:
        return LowRankForm(rank=self.rank) if "lora" in self.train else None

    def selects(self, name: str, in_block: bool) -> bool:
        if not in_block and "head" in self.train and name.rpartition(".")[2] in HEADS:
            return self.is_head(name)
        return bool(self.of_matrices or self.new_biases) and super().selects(name, in_block)


@dataclass(frozen=True, kw_only=True)
class EndToEndRetraining(EndToEnd, Retraining):
    """A pass that trains some parameters of the whole model at once."""

    sees_slopes: ClassVar[bool] = True

    def run(self, model: Whole) -> Iterator[tuple[str, Edit]]:
        assert model.data is not None
        targets = {name: model.load(name) for name in model.names}
        chosen = {n: t.weight for n, t in targets.items() if "sensitive" in self.sets_of(n)}
        found = slopes(chosen, model.data, self.batch_size, model.generator.initial_seed()) if chosen else {}
        trained = self.trainables(targets, model.vectors, found)
        trial = train(trained, model.data, self.schedule, model.generator, model.over)
        yield from trained.edits(trial.notes())
