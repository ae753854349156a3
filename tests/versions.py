"""The versions of other packages: `lock` and `oldest` print constraints, `matrix` runs the suite on several
transformers.

    python tests/versions.py lock        the newest versions that pyproject.toml allows, for constraints.txt
    python tests/versions.py oldest      the lower end of every range in pyproject.toml
    python tests/versions.py matrix      the whole suite on each of VERSIONS; writes docs/compatibility.md

Standard library only, but that `lock` and `oldest` install uv and packaging into an environment under build/.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# oldest supported, a late 4.x, 5.0, the two around the change of names in 5.24, and whatever is newest today
VERSIONS = ("oldest", "4.57.6", "5.0.0", "5.23.0", "locked", "newest")
_NOT_PINNED = ("torch", "triton", "nvidia-", "cuda-")  # TORCH in the Makefile chooses the build
_PAGE = ROOT / "docs" / "compatibility.md"


def main() -> None:
    """Run one of the three."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("lock", "oldest", "matrix"))
    parser.add_argument(
        "versions", nargs="*", help="for matrix: only these rows; the others stay as they are in the page"
    )
    args = parser.parse_args()
    if args.what == "matrix":
        matrix(args.versions or VERSIONS)
    else:
        sys.stdout.write(compiled(args.what == "oldest"))


def compiled(oldest: bool) -> str:
    """Constraints as `name==version` lines, resolved by uv for every Python from 3.10 on."""
    folder = ROOT / "build" / "uv"
    if not (folder / "bin" / "uv").exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True, stdout=sys.stderr)
        subprocess.run(
            [folder / "bin" / "python", "-m", "pip", "install", "-q", "uv"], check=True, stdout=sys.stderr
        )
    options = ["--resolution", "lowest-direct"] if oldest else ["--universal", "--python-version", "3.10"]
    done = subprocess.run(
        [folder / "bin" / "uv", "pip", "compile", "-q", *options, "--no-annotate", "--no-header", "--extra",
            "test", ROOT / "pyproject.toml"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if "==" in line and not line.startswith(_NOT_PINNED)]
    return (
        "\n".join(["# made by `make lock`" if not oldest else "# the lower end of every range", *lines])
        + "\n"
    )


def matrix(versions: tuple[str, ...] | list[str]) -> None:
    """Run the suite on each version, print a line for each, and write the page."""
    kept = ROOT / "build" / "matrix.json"
    rows = json.loads(kept.read_text()) if kept.exists() else {}
    for version in versions:
        rows[version] = row(version)
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(json.dumps(rows, indent=1) + "\n")
        _PAGE.write_text(
            page([rows[v] for v in VERSIONS if v in rows] + [rows[v] for v in rows if v not in VERSIONS])
        )
        print(json.dumps(rows[version]), flush=True)
    if any(r["outcome"] != "passed" for r in rows.values()):
        sys.exit(1)


def row(version: str) -> dict[str, str]:
    """Install and test one version."""
    kept = ROOT / "build"
    kept.mkdir(exist_ok=True)
    start = time.time()
    done = subprocess.run(
        ["make", "test-all", f"TRANSFORMERS={version}"], cwd=ROOT, capture_output=True, text=True
    )
    (kept / f"matrix-{version}.log").write_text(done.stdout + done.stderr)
    env = ROOT / (".venv" if version == "locked" else f"build/env-{version}")
    summary = re.findall(r"^=*\s*(\d.*) in [\d.:]+", done.stdout, re.M)
    deprecated = re.findall(r"third-party deprecations: (\d+)", done.stdout)
    return {
        "asked": version,
        **{name: installed(env, name) for name in ("transformers", "torch", "accelerate", "peft", "numpy")},
        "outcome": "passed" if done.returncode == 0 else "failed",
        "tests": summary[-1] if summary else f"no summary; see build/matrix-{version}.log",
        "deprecations": deprecated[-1] if deprecated else "none",
        "minutes": f"{(time.time() - start) / 60:.0f}",
        "commit": (
            subprocess.run(
                ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
            ).stdout.strip()
        ),
    }


def installed(env: Path, name: str) -> str:
    """The version of a package in an environment."""
    code = f"import importlib.metadata as m; print(m.version({name!r}))"
    done = subprocess.run([env / "bin" / "python", "-c", code], capture_output=True, text=True)
    return done.stdout.strip() or "-"


def page(rows: list[dict[str, str]]) -> str:
    """docs/compatibility.md."""
    names = (
        "asked",
        "transformers",
        "torch",
        "accelerate",
        "peft",
        "numpy",
        "outcome",
        "tests",
        "deprecations",
        "minutes",
        "commit",
    )
    table = [" | ".join(("", *names, "")).strip(), "|" + " --- |" * len(names)]
    table += [" | ".join(("", *(r[n] for n in names), "")).strip() for r in rows]
    return (
        "# Compatibility\n\nMade by `make matrix`: the whole test suite in an environment of its own, once"
        " for each version of\ntransformers. `oldest` is the lower end of every range in pyproject.toml,"
        " `locked` is constraints.txt, `newest`\nis what pip finds on the day. With EASYEDIT_HOME set, the"
        " tests of EasyEdit's repository are among them; PyPI's\nwheel always is.\n\n`deprecations` counts"
        " the warnings of other packages about their own future; ours are errors. Under `locked`\nthe shapes"
        " and types of every call are checked as well (jaxtyping, beartype).\n\n"
        + "\n".join(table)
        + "\n\nA version outside the ranges may work. `easyedit-mdm doctor` says when one is installed, and a"
        " call that meets\nsomething that the version lacks ends in an `IncompatibleVersionError` with the"
        " cure.\n"
    )


if __name__ == "__main__":
    main()
