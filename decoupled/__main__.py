"""The command line of the package: python -m decoupled plot | predict | export, each with --help."""

import importlib
import sys

COMMANDS = {"plot": "plots", "predict": "predict", "export": "export"}


def main():
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        sys.exit(f"usage: python -m decoupled {{{','.join(COMMANDS)}}} … (each has --help)")
    command = importlib.import_module(f"decoupled.analysis.{COMMANDS[sys.argv[1]]}")
    sys.argv = [f"{sys.argv[0]} {sys.argv[1]}", *sys.argv[2:]]
    command.flags.start(command.main)


if __name__ == "__main__":
    main()
