"""Faults that users have reported, by their own inputs: one folder each, with inputs, ``run.sh`` and ``expected.txt``.

    python -m tests.faults.cases FOLDER [NAME ...]

Copies the folder, brings the scripts' keys up to date, runs each and compares what it prints with `SHOWN`. Exit status
1 where one differs; then its output and what it should be are shown. The same inputs, smaller, are tests of the
packages.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
TODAY = {  # words of older scripts, and what they cut off
    r"--preview 1\b": "--data.max_length 2048 --preview 1",
    r"auto 2>&1 \| tail -2": "auto 2>&1",
    r"(?<![\w])batch_size": "global_batch_size",
    "save_every": "save_steps",
    r"model\.attention\b": "model.attn_implementation",
    r"tests\.unit\.families": "tests.support.families",
    r"tests\.unit\.test_data": "tests.data.test_data",
}
ELSEWHERE = {  # scripts of an interface that is no more
    "07": "tests/integrations/test_readers.py::test_a_new_head_trains",
    "08": "tests/integrations/test_readers.py::test_a_reference_that_is_copied_in_the_middle_is_what_was_trained",
}
SHOWN = {
    "01": ["(trailing|unquoted).csv: row 1.*(trailing|unquoted).csv: row 1.*short.csv: row 2"],
    "02": ["expected the same rows on every rank: rank 0 and rank 1.*rank 0 rc=2", "rank 1 and rank 0.*rank 1 rc=2"],
    "03": ["<tools>.*get_weather.*</tools>.*⟦<tool_call>.*20 rows, 1,860 trained.*== what transformers writes"],
    "04": ["^'ok<[|]im_end[|]>' "],
    "09": ["Answer in French.*⟦oui<[|]im_end[|]>⟧", "bad answer<[|]im_end[|]>\n.*⟦good<[|]im_end[|]>⟧"],
    "10": ["⟦<[|]channel[|]>analysis.*final<[|]message[|]>yo<[|]return[|]>⟧"],
    "11": ["10 empty answers are not trained"],
    "13": ["== plan.*Cheapest.*== train.*done: work/out/model"],
    "15": ["null.*1,690 trained.*nokey.*1,690 trained.*empty content.*1,810 trained.*function_call.*20 rows, "],
    "16": ["20 rows, 195 trained"],
    "17": ["bom.jsonl.*20 rows.*bom.json.*20 rows.*rows.jsonl.gz.*20 rows.*rows.tsv.*20 rows"],
    "18": ["done: work/out/model", "end of the process: [0-2][.]"],
    "19": ["fp32.*changed 29 of 29.*autocast.*changed 29 of 29"],
    "20": ["done: .*/bugs-out/model.*cannot access '.*~'"],
    "21": ["first: exit 75.*data.train: not the rows that the run began with.*done"],
    "22": ["preprocessor_config.json\nprocessor_config.json"],
    "23": ["\\A\\s*\\Z"],
    "24": ["== adapter.*adapter.*== role gpt.*gpt.*== U.E000.*trained.*== flash.*model.attn_implementation.*== plan"],
    "25": ["saved; train.resume auto resumes.*exit 75"],
}


def run(folder: Path, seconds: float = 400) -> str:
    """What the script of a case prints."""
    around = {**os.environ, "PROJECT": os.environ.get("PROJECT", str(ROOT)), "HOME": str(folder)}
    done = subprocess.run(
        ["bash", str(folder / "run.sh")], env=around, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds
    )
    return done.stdout.decode(errors="replace")


def main(words: list[str]) -> int:
    bad = 0
    with tempfile.TemporaryDirectory() as place:
        cases = Path(shutil.copytree(words[0], Path(place, "cases")))
        for file in (f for f in cases.rglob("*") if f.suffix in (".sh", ".py", ".yaml")):
            text = file.read_text()
            for old, new in TODAY.items():
                text = re.sub(old, new, text)
            file.write_text(text)
        for case in sorted(cases.glob("[0-9]*")):
            number = case.name[:2]
            if (words[1:] and number not in words[1:]) or number in ELSEWHERE:
                continue
            shown = run(case)
            missing = [some for some in SHOWN[number] if not re.search(some, shown, re.DOTALL | re.MULTILINE)]
            print(f"{'FAIL' if missing else 'ok  '} {case.name}", flush=True)
            if missing:
                bad += 1
                print(shown, "\nmissing:", *missing, "\n", (case / "expected.txt").read_text(), sep="\n")
    for number, test in ELSEWHERE.items():
        print(f"     {number}: {test}")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
