"""The command line: `main` runs a command of `commands.py` and turns errors into one line and an exit
status.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from easyedit_mdm.cli.commands import app
from easyedit_mdm.common.reproducible import same_bytes_on_any_number_of_threads
from easyedit_mdm.errors import EasyEditMDMError

_INTERRUPTED = 130  # as a shell says of Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        its exit status; 130 if it was interrupted; 2, after one message on stderr, for a wrong call or an
        error of this package.
    """
    same_bytes_on_any_number_of_threads()
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        status = app(arguments, prog_name="easyedit-mdm", standalone_mode=False) or 0
        return (
            _interrupted(arguments) if status == _INTERRUPTED else status
        )  # what the library makes of Ctrl-C
    except EasyEditMDMError as error:
        return _failed(str(error))
    except ImportError as error:
        from easyedit_mdm.common.versions import advice, needed

        package = (error.name or "").split(".")[0]
        if package not in needed():
            raise
        return _failed(f"{error}. {advice(package)}")
    except KeyboardInterrupt:
        return _interrupted(arguments)
    except Exception as error:
        # typer's errors of usage; their class is public in no version
        if not hasattr(error, "format_message"):
            raise
        return _failed(_usage(error))


def _interrupted(arguments: list[str]) -> int:
    """One line, with the command that goes on where there is one."""
    how = "nothing that was finished is lost"
    if arguments[:1] == ["bench"]:
        again = [*arguments, *([] if "--resume" in arguments else ["--resume"])]
        how = f"go on with: easyedit-mdm {shlex.join(again)}"
    print(f"easyedit-mdm: interrupted; {how}", file=sys.stderr)
    return _INTERRUPTED


def _failed(message: str) -> int:
    print(f"easyedit-mdm: {message}", file=sys.stderr)
    return 2


def _usage(error: Exception) -> str:
    """What was wrong with a call, the nearest right option, and where help is."""
    message = " ".join(error.format_message().split())  # type: ignore[attr-defined]
    option, near = getattr(error, "option_name", None), getattr(error, "possibilities", None)
    if option and near:
        message = f"no such option {option}; did you mean {near[0]}?"
    context = getattr(error, "ctx", None)
    return f"{message} (see {context.command_path} --help)" if context is not None else message
