"""Measurements of crpo-fast: `python -m benchmarks <command>`; options alone mean `all`.

The commands and their modules stand in `commands`.
"""

from __future__ import annotations

import argparse
import shlex
import sys

from .commands import COMMANDS, command_module


def main(arguments: list[str] | None = None) -> int:
    """Run one command; its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0].startswith("-") and arguments[0] not in ("-h", "--help"):
        arguments = ["all", *arguments]
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    parsers = {name: commands.add_parser(name, help=text) for name, text in COMMANDS.items()}
    if not arguments or arguments[0] not in COMMANDS:
        parser.parse_args(arguments)  # exits with a message, or with the help
    name = arguments[0]
    module = command_module(name)
    parsers[name].description = module.__doc__
    parsers[name].formatter_class = argparse.RawDescriptionHelpFormatter
    module.add_arguments(parsers[name])
    options = parser.parse_args(arguments)
    return module.run(options, shlex.join(["python", "-m", "benchmarks", *arguments]))


if __name__ == "__main__":
    sys.exit(main())
