"""Imported by the server that children are forked from: what every command looks up once is known before."""

from transformers import conversion_mapping

import compress.cli.commands
import compress.report.sentences  # noqa: F401
from compress.engine.stages import RUNNERS
from compress.io.source_code import code_of
from compress.passes import PASSES

code_of(PASSES, [type(runner).__module__ for runner in RUNNERS.values()])
conversion_mapping.get_checkpoint_conversion_mapping("llama")
