"""`python -m compress` is `compress`: what `torchrun -m compress` starts."""

from __future__ import annotations

from compress.cli import main

if __name__ == "__main__":
    main()
