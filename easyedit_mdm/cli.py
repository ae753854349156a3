"""The command line: one function a subcommand, no logic of its own."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from easyedit_mdm.errors import EasyEditMDMError
from easyedit_mdm.version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; an error of this package becomes one message on stderr and exit status 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)
    if rest and args.command is not _run:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    try:
        return args.command(args, rest)
    except EasyEditMDMError as error:
        print(f"easyedit-mdm: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="easyedit-mdm", description="Edit facts in masked diffusion language models through EasyEdit.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="edit a fact in a small masked model, watch it denoise, and take the edit back")
    demo.add_argument("--out", default="demo", help="folder for demo.html and demo.json (default: demo)")
    demo.add_argument("--easyedit-home", help="a clone of EasyEdit (default: EASYEDIT_HOME, or the installed one)")
    demo.set_defaults(command=_demo)

    run = commands.add_parser(
        "run", help="run an EasyEdit script, untouched, with our methods", allow_abbrev=False,
        description="Everything after SCRIPT goes to the script; --alg ROME_MDM stands for its --editing_method.",
    )  # fmt: skip
    run.add_argument("--easyedit-home", help="a clone of EasyEdit (default: the one the script is in, EASYEDIT_HOME, the installed one)")
    run.add_argument("--seed", type=int, default=42, help="state of the random generators at the script's first line (default: 42, as EasyEdit's import)")
    run.add_argument("script", metavar="SCRIPT")
    run.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...")
    run.set_defaults(command=_run)

    hook = commands.add_parser("hook", help="print the folder to put on PYTHONPATH so that plain `python SCRIPT --editing_method=ROME_MDM` works")
    hook.set_defaults(command=_hook)

    twins = commands.add_parser("twins", help="train the small models that ship with the package").add_subparsers(required=True, metavar="COMMAND")
    train = twins.add_parser("train", help="train one twin, or go on where a checkpoint stands")
    train.add_argument("--name", required=True, choices=("twin-llada", "twin-llama"))
    train.add_argument("--out", required=True, help="folder for checkpoint, log and the finished model (OUT/model)")
    train.add_argument("--steps", type=int, help="optimiser steps (default: the recipe's)")
    train.add_argument("--start-from", help="training folder of another twin to start from")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--device", default="cpu")
    train.set_defaults(command=_twins_train)
    evaluate = twins.add_parser("eval", help="how many facts the twins recall, by length of the object")
    evaluate.add_argument("--limit", type=int, default=100, help="facts a length (default: 100)")
    evaluate.add_argument("--json", dest="file", help="write the figures to this file")
    evaluate.add_argument("--model", action="append", dest="models", help="a twin or a folder (default: all twins)")
    evaluate.set_defaults(command=_twins_eval)
    return parser


def _demo(args: argparse.Namespace, rest: list[str]) -> int:
    from easyedit_mdm.demo import run_demo

    return 0 if run_demo(args.out, args.easyedit_home) else 1


def _run(args: argparse.Namespace, rest: list[str]) -> int:
    from easyedit_mdm.host.runner import run_script

    run_script(args.script, [*rest, *args.arguments], args.easyedit_home, args.seed)
    return 0


def _hook(args: argparse.Namespace, rest: list[str]) -> int:
    from easyedit_mdm.host.hook import folder

    print(folder())
    return 0


def _twins_train(args: argparse.Namespace, rest: list[str]) -> int:
    from easyedit_mdm.twins.commands import train_twin

    train_twin(args.name, args.out, args.steps, args.start_from, args.seed, args.device)
    return 0


def _twins_eval(args: argparse.Namespace, rest: list[str]) -> int:
    from easyedit_mdm.twins.commands import evaluate_twins

    evaluate_twins(args.models, args.limit, args.file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
