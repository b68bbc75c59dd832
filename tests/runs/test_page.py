"""A report in a real browser: nothing on its console, no request to a network, by day, in the dark and on a phone."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from ows_ds.runs.page import report
from tests.runs.test_report import write_run
from tests.support.hosts import need

QUIET = (
    "--disable-quic",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def visit(page: Path, folder: Path, *look: str) -> tuple[str, set[str]]:
    """What the browser says, and what the page asked for; without any network. A picture lies in ``folder``."""
    folder.mkdir()
    words = ["unshare", "--net", "chromium", "--headless", "--no-sandbox", "--disable-gpu", *QUIET,
             f"--user-data-dir={folder / 'profile'}", f"--log-net-log={folder / 'net.json'}",
             "--enable-logging=stderr", f"--screenshot={folder / 'page.png'}", *look, page.as_uri()]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (folder / "page.png").stat().st_size > 1000
    events = [event.get("params", {}) for event in json.loads((folder / "net.json").read_text())["events"]]
    # the browser's own requests have no origin
    return done.stderr, {one["url"] for one in events if one.get("initiator", "not an origin") != "not an origin"}


@pytest.mark.slow
def test_opens_in_a_browser(tmp_path: Path) -> None:
    need("chromium")
    page = report([write_run(tmp_path / name) for name in ("a", "b")], tmp_path / "page.html")
    for name, look in (("day", ["--window-size=1280,2000"]),
                       ("phone", ["--window-size=500,3000", "--blink-settings=preferredColorScheme=0"])):  # fmt: skip
        said, asked = visit(page, tmp_path / name, *look)
        assert "CONSOLE" not in said
        assert not asked
    other = tmp_path / "other.html"
    other.write_text('<img src="http://10.0.0.1/x.png"><script>console.error("heard")</script>')
    said, asked = visit(other, tmp_path / "other")
    assert "CONSOLE" in said
    assert "http://10.0.0.1/x.png" in asked
