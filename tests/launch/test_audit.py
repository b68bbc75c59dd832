"""launch/audit.py: what it makes of what pip-audit says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
FLAW = {"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["2.0"], "description": "bad"}


def audit(folder: Path, says: str, code: int = 0, ignore: str = "") -> subprocess.CompletedProcess[str]:
    """Run the script as it is, beside a module that takes pip-audit's place."""
    (folder / "launch").mkdir()
    for name in ("audit.py", "constraints.txt"):
        (folder / "launch" / name).write_text((LAUNCH / name).read_text())
    (folder / "launch" / "audit-ignore.txt").write_text(ignore)
    (folder / "pip_audit.py").write_text(
        "import pathlib, sys\n"
        "assert pathlib.Path(sys.argv[sys.argv.index('-r') + 1]).name == 'constraints.txt'\n"
        f"print({says!r}, file=sys.stderr if {code} == 2 else sys.stdout)\nsys.exit({code})\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, str(folder / "launch" / "audit.py")]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(
    ("vulns", "ignore", "code", "line"),
    [
        ([], "", 0, "audited: 1 packages, without own"),
        ([FLAW], "", 1, "vulnerable: lib 1.0: PYSEC-1, mended in 2.0"),
        ([FLAW], "# why\n\nCVE-1 we never call it\n", 0, "ignored: lib 1.0: PYSEC-1: we never call it"),
        ([FLAW], "CVE-2 another one", 1, "vulnerable: lib 1.0: PYSEC-1, mended in 2.0"),
    ],
)
def test_what_is_found(tmp_path: Path, vulns: list[object], ignore: str, code: int, line: str) -> None:
    lib = {"name": "lib", "version": "1.0", "vulns": vulns}
    own = {"name": "own", "skip_reason": "not on the index"}
    done = audit(tmp_path, json.dumps({"dependencies": [lib, own], "fixes": []}), int(bool(vulns)), ignore)
    assert (done.returncode, line in (done.stdout + done.stderr).splitlines()) == (code, True)


def test_without_a_network_nothing_fails(tmp_path: Path) -> None:
    done = audit(tmp_path, "ERROR:pip_audit\nConnectionError: no route to host", 2)
    assert (done.returncode, done.stdout) == (0, "not audited: ConnectionError: no route to host\n")


def test_a_service_that_knows_nothing_has_audited_nothing(tmp_path: Path) -> None:
    done = audit(tmp_path, json.dumps({"dependencies": [{"name": "own", "skip_reason": "not found"}], "fixes": []}))
    assert (done.returncode, done.stdout) == (0, "not audited: the service knows none of the packages\n")


def test_an_exception_needs_a_reason(tmp_path: Path) -> None:
    done = audit(tmp_path, "{}", 0, "CVE-1\n")
    assert (done.returncode, done.stderr) == (1, "audit-ignore.txt: CVE-1 stands there without a reason\n")


def test_the_real_file_of_exceptions_is_read() -> None:
    code = "import audit, pathlib; audit.ignored(pathlib.Path('audit-ignore.txt'))"
    subprocess.run([sys.executable, "-c", code], cwd=LAUNCH, check=True)
