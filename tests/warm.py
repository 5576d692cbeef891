"""What every child process would do first: done once in the server that it is forked from."""

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from compress.io.source_code import code_of
from compress.passes import PASSES

code_of(PASSES, ["compress.api.run"])  # reads and compiles the package
get_checkpoint_conversion_mapping("llama")
