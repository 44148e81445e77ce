"""Looks for inputs by which a door fails, led by coverage: `make fuzz`.

    python -m fuzz.run [--seconds=600] [--doors=json_lines,image]

Each door has its share of the time in a process of its own. An input that raises another error than
the package's, takes over ten seconds or 2 GB is written to `.cache/fuzz/`; it becomes a test in
`test_found.py` once it is mended. Needs atheris (`pip install -e '.[fuzz]'`).
"""

import argparse
import subprocess
import sys
from pathlib import Path

FOLDER = Path(".cache/fuzz")


def main() -> int:
    """Runs the program; returns how many doors failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=600, help="of all doors together")
    parser.add_argument("--doors", default="", help="names joined by commas; all")
    given = parser.parse_args()

    from fuzz.doors import BYTES, seeds

    names = given.doors.split(",") if given.doors else list(BYTES)
    failed = []
    for name in names:
        inputs = FOLDER / name
        inputs.mkdir(parents=True, exist_ok=True)
        for number, seed in enumerate(seeds()[name]):
            (inputs / f"seed{number}").write_bytes(seed)
        command = [sys.executable, "-m", "fuzz.door", name, str(inputs)]
        limits = ["-rss_limit_mb=3000", "-timeout=10", "-max_len=20000", "-verbosity=0"]
        seconds = f"-max_total_time={max(1, given.seconds // len(names))}"
        prefix = f"-artifact_prefix={FOLDER}/{name}-"
        print(f"{name}: {seconds}", flush=True)
        done = subprocess.run([*command, seconds, prefix, *limits], check=False)
        if done.returncode:
            failed.append(name)
    print(f"failed: {', '.join(failed) or 'none'}; inputs in {FOLDER}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
