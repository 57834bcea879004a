"""The package's command line: python -m decoupled plot | predict | export."""

import argparse
import importlib
import os
import sys

COMMANDS = {  # name: (module in decoupled.analysis whose main runs it, what it does)
    "plot": ("plots", "draw learning curves from logs"),
    "predict": ("predict", "classify images with a trained network, measure early exits"),
    "export": ("export", "write logs as a table, or for TensorBoard"),
}


def parse_args():
    width = max(map(len, COMMANDS))
    commands = [f"  {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="python -m decoupled",
        usage="python -m decoupled COMMAND …",
        description="Tools for finished training runs. Each COMMAND has its own --help.",
        epilog="\n".join(["commands:", *commands]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="one of the commands below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    args = parse_args()
    os.environ["MPLBACKEND"] = "agg"  # figures go to files; a backend set by a notebook may not be installed
    from decoupled.training import flags

    module, _ = COMMANDS[args.command]
    command = importlib.import_module(f"decoupled.analysis.{module}")
    sys.argv = [f"python -m decoupled {args.command}", *args.arguments]
    flags.start(command.main)


if __name__ == "__main__":
    main()
