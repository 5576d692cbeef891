"""Every model that is tried, by kind."""

from __future__ import annotations

from encoders import ENCODERS
from entry import Entry
from hybrids import HYBRIDS
from mixtures import MIXTURES
from text import TEXT
from vision import VISION
from vision_language import VISION_LANGUAGE

KINDS: dict[str, tuple[Entry, ...]] = {
    "text decoders": TEXT,
    "mixtures of experts": MIXTURES,
    "vision and language": VISION_LANGUAGE,
    "encoders and encoder-decoders": ENCODERS,
    "images and sound": VISION,
    "state space and linear attention": HYBRIDS,
}
EVERY: dict[str, Entry] = {entry.name: entry for entries in KINDS.values() for entry in entries}
