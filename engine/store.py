"""Where fetched models lie: LONGTAKE_HOME/models/<name>, by default below ~/.local/share/longtake.

What a launcher says in the environment is place.py's to read::

    models/self-forcing/
        longtake.json  pulled.json                        settings; every file's origin, commit and checksum, licences
        transformer/{config.json, self_forcing_dmd.pt}
        vae/  text_encoder/  tokenizer/  scheduler/       as on the hub
    blobs/CHECKSUM                                        every file once; those above are links to them
"""

from __future__ import annotations

import os
from pathlib import Path

HOME_VARIABLE = "LONGTAKE_HOME"


def home() -> Path:
    """Root of what longtake keeps between runs: LONGTAKE_HOME, else XDG_DATA_HOME/longtake, else ~/.local/share."""
    if own := os.environ.get(HOME_VARIABLE):
        return Path(own).expanduser().absolute()
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(data).expanduser().absolute() / "longtake"


def model_folder(name: str) -> Path:
    """Folder of a fetched model; may not exist."""
    return home() / "models" / name


def blobs() -> Path:
    """Where files of the hub are kept, each once, by checksum."""
    return home() / "blobs"


def fetched() -> list[str]:
    """Names of the models in the store."""
    return sorted(
        path.parent.name for path in (home() / "models").glob("*/longtake.json") if path.parent.suffix != ".partial"
    )
