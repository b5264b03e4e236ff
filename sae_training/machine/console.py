"""What a command of a console leaves behind: an exit code, and errors, interruptions and warnings in a line each."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence

from sae_training.config.values import in_one_word, read_value, reads_as
from sae_training.machine.phases import say
from sae_training.machine.threads import spin_only_while_alone


def exit_code(argv: Sequence[str], command: Callable[[], None]) -> int:
    """Run a command that the words `argv` describe, and return the exit code.

    `--debug` among the words, or SAE_TRAINING_DEBUG=1, shows tracebacks.
    """
    debug, asked = False, list[int]()
    try:
        debug = wants_tracebacks(argv)
        spin_only_while_alone()
        # What a user should change is said in a line, without our source code.
        with warnings.catch_warnings(), interruptions_noted(asked):
            warnings.showwarning = show_in_a_line
            try:
                command()
            except ImportError as error:
                if asked:  # a package that is being imported may hold Ctrl-C for a fault of another one
                    raise KeyboardInterrupt from error
                raise
    except KeyboardInterrupt as stop:
        # a job's own interruption says what was saved, and has the exit code that goes with the signal
        stopped = str(stop) or "Stopped. The same command begins anew, or goes on from what is saved."
        if not getattr(stop, "is_told", False):
            sys.stderr.write(f"{stopped}\n")
        return getattr(stop, "exit_code", 130)
    except BrokenPipeError:
        # the reader of a pipe (`| head`) has left; at its last flush the interpreter would complain once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (ValueError, OSError, ArithmeticError, ImportError) as error:
        # a loss that is not finite is an ArithmeticError; a division by zero is a bug of ours
        if debug or isinstance(error, ZeroDivisionError):
            traceback.print_exc()
        else:
            notes = getattr(error, "__notes__", [])
            sys.stderr.write("\n".join([f"error: {error}", *notes]) + "\n")
        return 1
    return 0


@contextlib.contextmanager
def interruptions_noted(asked: list[int]) -> Iterator[None]:
    """Note in `asked` each Ctrl-C that Python turns into a KeyboardInterrupt here."""

    def stop(number: int, frame: object) -> None:
        asked.append(number)
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def show_in_a_line(message: Warning | str, *_: object, **__: object) -> None:
    """Show a warning in the way of `warnings.showwarning`, in one line, above a bar if there is one."""
    say(f"warning: {' '.join(str(message).split())}")


def wants_tracebacks(words: Sequence[str]) -> bool:
    """Return whether the words or the environment ask for tracebacks; the other words may be wrong."""
    given = [word for word in in_one_word(words, {"debug": bool}) if word.startswith("--debug=")]
    value = given[-1].partition("=")[2] if given else os.environ.get("SAE_TRAINING_DEBUG", "")
    return reads_as(value, bool) and read_value(value, bool)
