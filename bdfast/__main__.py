"""``python -m bdfast``: the same as the ``bdfast`` command."""

from __future__ import annotations

from bdfast.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
