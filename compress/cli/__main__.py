"""`python -m compress.cli` is `compress`."""

from __future__ import annotations

from compress.cli import main

if __name__ == "__main__":
    main()
