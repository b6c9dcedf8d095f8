"""Where this project keeps what later starts would make anew."""

import os
from pathlib import Path


def user_cache() -> Path | None:
    """As in the XDG base directory specification; None for a user without a home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vsd-serve"
    except RuntimeError:
        return None
