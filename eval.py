"""Evaluate labelled images of any origin, or the samples of a finished run again.

    python eval.py --images my_samples.zip --data_name cifar10_32 --out results
    python eval.py --exp_path exp/privimage/<run>
    python eval.py --list

In eval.mode=val the evaluation of a run queries its private validation images again; privacy.json adds up the cost.
"""

import sys

from pipeline.configuration import evaluation_config
from utils.command_line import short_help
from utils.config import format_config
from utils.log import to_terminal
from utils.program import MISTAKE, program, run_process
from utils.runtime import log


@program
def main(argv: list[str]) -> int:
    """Run the program; returns its exit code."""
    to_terminal()
    if not argv:
        print(short_help("eval"), file=sys.stderr)
        return MISTAKE
    config = evaluation_config(argv)
    if config.print_config:
        log.info(format_config(config))
        return 0
    if config.list_parts:
        from evaluation.listing import listing

        log.info(listing(config.weights_root))
        return 0
    from pipeline.existing_samples import (
        evaluate_existing,  # heavy imports, after the command line has been checked
    )

    return evaluate_existing(config)


if __name__ == "__main__":
    run_process(main)
