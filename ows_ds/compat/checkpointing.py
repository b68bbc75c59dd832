"""What gradient checkpointing of the installed transformers runs again, without importing it.

Versions before 5.23 call a layer again, its hooks included; since then they call its ``forward`` alone. DeepSpeed's
hooks then see the layer entered once more, and gather otherwise. Held by tests/model/test_outline.py.
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version


def enters_layer_again() -> bool:
    """Whether the layer itself is entered again, beside what is in it."""
    try:
        found = re.match(r"(\d+)\.(\d+)", version("transformers"))
    except PackageNotFoundError:
        return False
    return found is not None and (int(found[1]), int(found[2])) < (5, 23)
