"""What is refused before any work, of the pipeline as a whole: what no single pass is to blame for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.calibration.processed import kind_of_rows, takes_rows
from compress.calibration.rows import FILES
from compress.calibration.self_written import cannot_write
from compress.calibration.texts import IMAGE_SUFFIX, SELF, is_images
from compress.config.pipeline import GATES, GIVEN
from compress.errors import DataError, Problem
from compress.models.experts import takes_choices
from compress.models.named import takes_more_than_text
from compress.models.positions import longest_window
from compress.planning.cache import moved_later
from compress.planning.dense import LEAST_REACHED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from compress.config.pipeline import Pipeline
    from compress.models.graph import Graph
    from compress.planning.dense import Dense
    from compress.planning.state import PlanState


def missing_calibration(pipeline: Pipeline, state: PlanState) -> Iterator[Problem]:
    """No data for a pass that learns from them."""
    path = state.first_learner
    if path and pipeline.calibration is None:
        images = "{source: images.safetensors, samples: 128}"
        text = "{source: demo, samples: 128, length: 512}"
        example = text if state.graph.takes_tokens else images
        yield Problem(
            path,
            f"{path.rpartition('.')[2]} learns from data, and `calibration:` is missing; for example calibration: "
            f"{example}",
        )


def gates(pipeline: Pipeline, graph: Graph) -> Iterator[Problem]:
    """A quality gate on what is not measured of this model."""
    if pipeline.evaluate:
        gate: tuple[str, ...]
        if graph.is_language_model:
            gate, measured = GATES[:1], "perplexity"
        elif graph.predicts_masked:
            gate, measured = (GATES[0], GATES[2]), "perplexity of masked tokens, or by its outputs"
        else:
            gate, measured = GATES[1:], "accuracy, or without labels by its outputs"
        for other in GATES:
            if getattr(pipeline.evaluate, other) is not None and other not in gate:
                said = f"this model is judged by its {measured}; its gate is {' or '.join(gate)}"
                yield Problem(f"evaluate.{other}", said)


def exports(pipeline: Pipeline, state: PlanState) -> Iterator[Problem]:
    """What a format cannot hold."""
    for exporter in pipeline.export:
        for reason in exporter.reasons(state.graph, state.specs, state.new_biases, state.caches):
            yield Problem(f"export.{exporter.key}", reason)


def data_sections(pipeline: Pipeline, graph: Graph) -> Iterator[Problem]:
    """Data of another kind than the model takes, or longer."""
    longest = longest_window(graph.model) if graph.takes_tokens else None  # CLIP has positions of words, too
    images, model = not graph.takes_tokens, type(graph.model).__name__
    for name, section in (("calibration", pipeline.calibration), ("evaluate", pipeline.evaluate)):
        texts = section is not None
        for source in section.sources.values() if section else ():
            assert section is not None
            if source == SELF and (why := cannot_write(graph.model)):
                yield Problem(f"{name}.source", why)
                continue
            by_name = is_images(source) and takes_more_than_text(graph.model)
            try:
                rows = source != GIVEN and takes_rows(graph.model, source, section.field)
            except DataError as error:
                yield Problem(f"{name}.source", str(error))
                continue
            texts = texts and not rows and not is_images(source)
            if source != GIVEN and not rows and is_images(source) != images and not by_name:
                wanted = f"{'images' if graph.is_image_model else 'inputs'} from a {IMAGE_SUFFIX} file"
                known = kind_of_rows(graph.model) is not None
                wanted += f", or from the rows of a {', '.join(FILES)} file" if known else ""
                wanted = wanted if images else "text"
                yield Problem(f"{name}.source", f"{source}: {model} takes {wanted}")
        if section and longest and texts and section.length > longest:
            yield Problem(f"{name}.length", f"{section.length} is more than the model's {longest} positions")


def out_of_reach(pipeline: Pipeline, graph: Graph, dense: Dense) -> Iterator[Problem]:
    """A model of which most is not what passes work on: the result would not be what its name says."""
    if dense.reached < LEAST_REACHED and not pipeline.allow_dense:
        parts = ", ".join(f"{what} ({size / 1e6:.2f} MB)" for what, size in dense.unreached.items())
        yield Problem(
            "allow_dense",
            f"passes can reach {dense.reached:.0%} of the matrices of a {type(graph.model).__name__}; left dense would "
            f"be {parts}. With `allow_dense: true` it is run all the same, and the report says what was left",
        )


def all_experts(pipeline: Pipeline, graph: Graph) -> Iterator[Problem]:
    """Tokens that are to be shown to all experts of a model that has none, or whose experts choose for themselves."""
    if pipeline.calibration is None or not pipeline.calibration.calibrate_all_experts:
        return
    path, model = "calibration.calibrate_all_experts", type(graph.model).__name__
    owners = dict.fromkeys(site.parameter.rpartition(".")[0] for site in graph.sites if site.is_expert)
    if not owners:
        yield Problem(path, f"changes nothing: {model} keeps no experts together in one tensor")
    others = [name for name in owners if not takes_choices(graph.model.get_submodule(name))]
    if others:
        yield Problem(path, f"{others[0]} of a {model} cannot be told which experts to run; leave it out")


def whole_pipeline(pipeline: Pipeline, state: PlanState, dense: Dense) -> Iterator[Problem]:
    """Everything that no single pass is to blame for. `state`: after the last pass."""
    yield from out_of_reach(pipeline, state.graph, dense)
    yield from missing_calibration(pipeline, state)
    yield from gates(pipeline, state.graph)
    yield from exports(pipeline, state)
    yield from moved_later(pipeline)
    yield from data_sections(pipeline, state.graph)
    yield from all_experts(pipeline, state.graph)
