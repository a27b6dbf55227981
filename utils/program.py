"""How every program of the toolkit starts and ends: its arguments, its standard streams, its exit code."""

import functools
import sys
import unicodedata
from collections.abc import Callable
from typing import NoReturn

from utils import distributed
from utils.errors import UserError
from utils.stopping import describe_shortage, exit_code, signals_interrupt
from utils.streams import protect_standard_streams
from utils.text import require_utf8

MISTAKE = 2  # exit code: the user can repair it


def program(main: Callable[[list[str]], int]) -> Callable[[list[str] | None], int]:
    """Decorator of a program's `main`, which takes the command line (None: that of the process) and returns the exit
    code. An error caused by the user or the machine ends the program with one line on stderr: a UserError, a full or
    protected disk and too little memory with code 2, a signal with 128 plus its number."""

    @functools.wraps(main)
    def guarded(argv: list[str] | None = None) -> int:
        arguments = sys.argv[1:] if argv is None else argv
        try:
            require_readable(arguments)
            with signals_interrupt():
                return main(arguments)
        except UserError as error:
            reason = str(error)
        except KeyboardInterrupt as stop:
            if distributed.is_main():
                print("stopped", file=sys.stderr)
            return exit_code(stop)
        except (OSError, MemoryError, RuntimeError) as error:
            reason = describe_shortage(error)
            if reason is None:
                raise
        print(f"error: {reason}", file=sys.stderr)
        return MISTAKE

    return guarded


def require_readable(arguments: list[str]) -> None:
    """Raise UserError for an argument with bytes that are not UTF-8 or with a control character, such as the carriage
    return that a script with Windows line ends leaves after the last argument of a line."""
    require_utf8(arguments, "the command line")
    for argument in arguments:
        found = [character for character in argument if unicodedata.category(character) == "Cc"]
        if found:
            raise UserError(
                f"{argument!r}: contains a control character ({found[0]!r}); scripts with Windows line ends add them: "
                f"convert the script, for instance with dos2unix"
            )


def run_process(main: Callable[[], int]) -> NoReturn:
    """Run a whole process: `main`, decorated by `program`, with its exit code as the process's."""
    protect_standard_streams()
    sys.exit(main())
