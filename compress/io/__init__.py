"""Files and names: safetensors, atomic writes, keys, freed memory."""
