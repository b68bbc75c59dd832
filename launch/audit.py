"""Looks the packages of constraints.txt up among known vulnerabilities: python launch/audit.py

Fails where one is found that audit-ignore.txt does not name. Where the advisories cannot be had (no network), one line
says that nothing was audited, and nothing fails.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SECONDS = 300


def ignored(path: Path) -> dict[str, str]:
    """Reasons by advisory: a line each, such as ``CVE-2026-1234 only its server is concerned, which is not used``."""
    lines = [line.split(maxsplit=1) for line in path.read_text().splitlines() if line.strip() and line[0] != "#"]
    for words in lines:
        if len(words) < 2:
            sys.exit(f"{path.name}: {words[0]} stands there without a reason")
    return {name: reason for name, reason in lines}


def look_up(constraints: Path) -> Any:
    """What pip-audit finds, as its JSON tells; a line of text where it cannot look."""
    command = [sys.executable, "-m", "pip_audit", "-r", str(constraints), "--no-deps", "--disable-pip"]
    command += ["--progress-spinner", "off", "--format", "json"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        packages = json.loads(done.stdout)["dependencies"]
    except subprocess.TimeoutExpired:
        return f"no answer within {SECONDS} seconds"
    except (ValueError, KeyError):
        return ((done.stderr or done.stdout).strip() or f"exit code {done.returncode}").splitlines()[-1]
    # a proxy in front of the network may know no advisories, and say so of each package
    return packages if any("vulns" in package for package in packages) else "the service knows none of the packages"


def main(constraints: Path, ignore: Path) -> int:
    """The exit code: 1 where a vulnerability is neither mended nor ignored."""
    reasons = ignored(ignore)
    packages = look_up(constraints)
    if isinstance(packages, str):
        print(f"not audited: {packages}")
        return 0
    found = 0
    for package in packages:
        for one in package.get("vulns", ()):
            names = {one["id"], *one.get("aliases", ())}
            if reason := next((reasons[name] for name in sorted(names) if name in reasons), None):
                print(f"ignored: {package['name']} {package['version']}: {one['id']}: {reason}")
                continue
            found += 1
            mended = ", ".join(one.get("fix_versions") or ["no version yet"])
            print(
                f"vulnerable: {package['name']} {package['version']}: {one['id']}, mended in {mended}", file=sys.stderr
            )
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    print(f"audited: {len(packages) - len(skipped)} packages" + (f", without {', '.join(skipped)}" if skipped else ""))
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main(HERE / "constraints.txt", HERE / "audit-ignore.txt"))
