"""One JSON file that several checks share: each owns a key, and what is there already stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def record(path: Path, key: str, value: Any) -> None:
    """Set `key` in the file, written anew after every case so that nothing is lost when time runs out."""
    document = json.loads(path.read_text()) if path.is_file() else {}
    document[key] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
