"""Whether somebody has logged in to Weights & Biases on this machine."""

from __future__ import annotations

import netrc
import os
from pathlib import Path
from urllib.parse import urlparse


def is_logged_in() -> bool:
    """Whether wandb would find an API key; does not use the network."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    named = os.environ.get("NETRC")
    files = [Path(named)] if named else [Path.home() / name for name in (".netrc", "_netrc")]
    return any(_read_password(file.expanduser(), host) for file in files)


def _read_password(file: Path, host: str) -> str | None:
    try:
        login = netrc.netrc(str(file)).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return None
    return login[2] if login else None
