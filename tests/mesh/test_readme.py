"""The README's promises that can be run are run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.mesh.conftest import Mesh

README = Path(__file__).parents[2] / "README.md"


def test_the_readmes_client_works(running: Mesh) -> None:
    """The ten lines of Python embed a text through the router as they stand."""
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert "127.0.0.1:50050" in example
    ran = subprocess.run(
        [sys.executable, "-c", example.replace("127.0.0.1:50050", running.router)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.stdout.split() == ["384", "minilm", "0"], ran.stderr
