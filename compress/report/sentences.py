"""What commands say in a sentence or two: what was read back equal, fallbacks, and what `eval` measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.calibration.tokens import PROTOCOLS
from compress.report.report import size_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from compress.report.report import Report

MOST_NOTES = 10


def verified(facts: Mapping[str, Any]) -> str:
    """What was compared after writing a folder, and how far it is from what was meant."""
    text = f"{facts['tensors_equal']} tensors read back equal"
    if "bits_per_weight" in facts:
        text += f"; {facts['bits_per_weight']:.3f} bits per weight, packed {facts['packed_bits_per_weight']:.3f}"
    if "max_logit_difference" in facts:
        text += f"; reloaded model's logits differ by {facts['max_logit_difference']:.2g}"
    if "as_shipped" in facts:
        shipped = facts["as_shipped"]
        text += f"; as shipped by {shipped['max_logit_difference']:.2g}"
        if shipped["kl"] is not None:
            text += f", KL {shipped['kl']:.2g}"
        for quality in ("accuracy", "perplexity"):
            if shipped.get(quality) is not None:
                text += f", {quality} {shipped[quality]:.4g} for {shipped[f'packed_{quality}']:.4g}"
    return text


def extracted(found: Mapping[str, Any], out: object) -> str:
    """What an adapter taken from a fine-tune holds, and how far it is from that; a line for each matrix."""
    layers, left = found["layers"], found["left_out"]
    rows = [f"{name}: rank {each['rank']}, error {each['error']:.3g}" for name, each in layers.items()]
    rows.append(
        f"{out}: {len(layers)} layers as factors, {len(found['whole'])} norms and biases whole, "
        f"{size_text(found['bytes'])}; relative error of the change {found['error']:.3g}"
    )
    if left:
        more = f" and {len(left) - MOST_NOTES} more" if len(left) > MOST_NOTES else ""
        rows.append(f"left out, for no adapter holds them: {', '.join(left[:MOST_NOTES])}{more}")
    return "\n".join(rows)


def run_lines(report: Report, out: object) -> Iterator[str]:
    """Lines below the table of a run: fallbacks, and every folder that was written and read back."""
    for text in (*report.notes, *report.fallbacks[:MOST_NOTES]):
        yield f"note: {text}"
    if len(report.fallbacks) > MOST_NOTES:
        yield f"note: {len(report.fallbacks) - MOST_NOTES} more in {out}/report.json"
    yield f"{out}: {verified(report.verified)}"
    for name, facts in report.verified.items():
        if isinstance(facts, dict):
            yield f"{out}/{name}: {verified(facts)}"


def evaluation_lines(model: str, found: Mapping[str, Any], against: str | None) -> str:
    """What `eval` measured of a model: quality, divergence from the original, size, and on what.

    Args:
        model: as it was given.
        found: as `api.evaluate.measured` returns it.
        against: the original.
    """
    said, unit = _figure(found)
    if "accuracy" in found:
        data = f"{found['samples']} images"
    elif "relative_error" in found:
        data = f"{found['samples']} rows of outputs"
    else:
        windows = (
            f"{found['windows']} windows of {found['length']}" if "windows" in found else f"{found['samples']} rows"
        )
        data = f"{windows}, {found['tokens']} tokens"
    text = f"{model}: {said}{_divergence(found, against, unit)}, weights {size_text(found['bytes'])}"
    if found.get("load_memory") is not None:
        text += f", {size_text(found['load_memory'])} of memory to load"
    if found.get("tokens_per_second") is not None:
        text += f", {found['tokens_per_second']:.0f} tokens per second, one after the other"
    protocol = f"\nprotocol {found['protocol']}: {PROTOCOLS[found['protocol']]}" if "protocol" in found else ""
    for name, each in found.get("sources", {}).items():
        text += f"\n  {name}: {_figure(each)[0]}{_divergence(each, against, unit)}"
    for name, each in found.get("tasks", {}).items():
        text += f"\n  {name}: {_task(each, found.get('tasks_of_original', {}).get(name))}"
    source = found["source"] if isinstance(found["source"], str) else ", ".join(found["source"].values())
    return f"{text}\n({source}, {data}){protocol}"


def _task(found: Mapping[str, Any], original: Mapping[str, Any] | None) -> str:
    """The metrics of a task, each with its error and what the original has, as far as they are known."""
    said = []
    for name, value in found.items():
        if name == "samples" or "_stderr" in name:
            continue
        error, was = found.get(f"{name}_stderr"), (original or {}).get(name)
        spread = "" if error is None else f" ± {error:.4f}"
        said.append(f"{name} {value:.4f}{spread}" + ("" if was is None else f" (the original {was:.4f})"))
    count = f" on {found['samples']} samples" if "samples" in found else ""
    return f"{', '.join(said) or 'no metric'}{count}"


def _figure(found: Mapping[str, Any]) -> tuple[str, str]:
    """What a model is judged by, in words, and what it is of."""
    if "accuracy" in found:
        return f"accuracy {found['accuracy']:.2%}", "images"
    if "relative_error" in found:
        return f"error {found['relative_error']:.2%}, cosine {found['cosine']:.5f}", "rows"
    return f"perplexity {found['perplexity']:.3f}", "tokens"


def _divergence(found: Mapping[str, Any], against: str | None, unit: str) -> str:
    if found["kl"] is None:
        return ""
    return f", KL to {against} {found['kl']:.4f} on {found['kl_tokens']} {unit}"
