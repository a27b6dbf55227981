"""Train one differentially private image synthesizer on one dataset at one epsilon, sample from it, evaluate.

python run.py --method PrivImage --data_name digits_8 --epsilon 10
"""

import sys

from models import METHODS
from pipeline.configuration import run_config
from utils import distributed
from utils.command_line import read_command_line, short_help
from utils.config import format_config
from utils.config_files import config_folders
from utils.log import to_terminal
from utils.program import MISTAKE, program, run_process
from utils.runtime import log

FAILED = 1  # exit code: another process of the run has died


@program
def main(argv: list[str]) -> int:
    """Run the program; returns its exit code."""
    to_terminal()
    command_line = read_command_line(argv, "run")
    if not command_line.settings and command_line.given <= {"plugin"}:
        config_folders(command_line.flags)  # imports the plugins, whose methods are in the table then
        print(f"{short_help('run')}\n\nmethods: {', '.join(METHODS)}", file=sys.stderr)
        return MISTAKE
    try:
        with distributed.main_process_first():
            config = run_config(command_line)
            distributed.determine_place(config.setup)
            if config.print_config:
                lines = [format_config(config)] if distributed.is_main() else []
            elif config.dry_run:
                from pipeline.planning import dry_run

                lines = dry_run(config) if distributed.is_main() else []
            else:
                from pipeline.training import start  # heavy imports, after the command line has been checked

                return start(config, main, argv)
            for line in lines:
                log.info(line)
            return 0
    except distributed.LostProcess as error:
        if distributed.place().local_rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return FAILED if distributed.is_main() else distributed.LOST


if __name__ == "__main__":
    run_process(main)
