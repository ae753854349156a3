"""What can be said of a command's arguments before torch is imported."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from easyedit_mdm.common.requests import EditRequest
from easyedit_mdm.errors import (
    DataError,
    EditError,
    FileError,
    HyperParameterError,
    MissingPackageError,
    RequestError,
)


def free(*folders: str | Path | None) -> None:
    """Check that folders to be written do not exist, or are empty; None is passed over.

    Raises:
        FileError: naming the one that does.
    """
    for path in (Path(folder) for folder in folders if folder is not None):
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise FileError(f"{path} exists: give another folder, or remove it (nothing is ever overwritten)")


def there(kind: type[EditError] | type[DataError], what: str, *paths: str | Path | None) -> None:
    """Check that files or folders to be read exist; None is passed over.

    Raises:
        EditError, DataError: as `kind` says, naming the one that does not.
    """
    for path in paths:
        if path is not None and not Path(path).exists():
            raise kind(f"{path} cannot be read (no such file or folder): give {what}")


def extra(module: str) -> None:
    """Check that the package of an extra is installed.

    Raises:
        MissingPackageError: if not, with the command that installs it.
    """
    name = {"lm_eval": "lm-eval", "gradio": "app"}[module]
    if find_spec(module) is None:
        raise MissingPackageError(
            f"the package {module} is not installed: pip install 'easyedit-mdm[{name}]' (best in an"
            " environment of its own)",
            name=module,
        )


def named_hparams(path: str) -> str:
    """The path as given, if it is that of a YAML file of hyperparameters.

    Raises:
        HyperParameterError: if not.
    """
    from easyedit_mdm.common.yaml_files import find_hparams, read_yaml_file  # PyYAML, a tenth of a second

    read_yaml_file(find_hparams(path))
    return path


def requests_of(
    prompt: str | None, subject: str | None, target: str | None, file: str | Path | None
) -> list[EditRequest]:
    """What the command line asks for: one request in three parts, or a JSON file of them.

    Raises:
        RequestError: if it is neither, or both; for a subject that is not in the prompt.
        DataError: if the file cannot be read, or some of its records cannot be used.
    """
    parts = {"--prompt": prompt, "--subject": subject, "--target": target}
    given = [name for name, value in parts.items() if value is not None]
    if file is not None:
        if given:
            raise RequestError(f"{', '.join(given)} and --data-file: give one request, or a file of them")
        there(DataError, "a JSON list of objects with prompt, subject and target_new", file)
        return _read_requests(file)
    absent = [name for name in parts if name not in given]
    if absent:
        raise RequestError(
            f"{', '.join(absent)} is missing: an edit needs --prompt, --subject and --target, or --data-file"
        )
    return [EditRequest.of({"prompt": prompt, "subject": subject, "target_new": target})]


def _read_requests(file: str | Path) -> list[EditRequest]:
    from easyedit_mdm.data.cases import load_cases

    loaded = load_cases("requests", data_file=file)
    if loaded.skipped or not loaded.cases:
        why = "; ".join(f"record {s.record}: {s.reason}" for s in loaded.skipped[:5]) or "no records"
        raise DataError(
            f"{file}: {len(loaded.skipped)} of its records cannot be used ({why}): correct them, or take"
            " them out"
        )
    return [EditRequest.of(case.request()) for case in loaded.cases]


def parse_layers(text: str) -> list[int]:
    """`4,5,8-10` -> [4, 5, 8, 9, 10].

    Raises:
        HyperParameterError: for anything else.
    """
    layers: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdigit() or (last and not last.isdigit()) or (last and int(last) < int(first)):
            raise HyperParameterError(f"layers {text!r}: give numbers and ranges such as 4,5,8-10")
        layers |= set(range(int(first), int(last or first) + 1))
    return sorted(layers)


def parse_ratio(text: str) -> float | int | str:
    """`uniform`, or a number.

    Raises:
        HyperParameterError: for anything else.
    """
    try:
        return text if text == "uniform" else float(text) or 0
    except ValueError:
        raise HyperParameterError(f"mask ratio {text!r} is neither 'uniform' nor a number") from None


def repeated(arguments: Sequence[str], options: Sequence[str]) -> list[str]:
    """`--compare A B` as `--compare A --compare B`, for options that take several values in a row."""
    spread: list[str] = []
    option, values = "", 0
    for word in arguments:
        if word.startswith("-"):
            option, values = (word if word in options else ""), 0
        elif option:
            spread += [option] if values else []
            values += 1
        spread.append(word)
    return spread
