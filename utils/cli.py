"""The command line that every stage has, what it prints, and how it ends: exit status 0, or one line on stderr and 2.

Without torch, as report.py and scripts/run_all.py begin with it too.
"""
from __future__ import annotations

import argparse
import codecs
import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from utils import interrupts, launcher
from utils.errors import Finished, UserError, one_line
from utils.memory import OutOfMemory, Phase

LAST = "last"  # what a bare --resume stands for
_IN_ASCII = {"±": "+-", "–": "-"}  # what tables have beyond ASCII


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help explains)")


def recorded(argument: str) -> str:
    """An argument that a run writes into its files, which are UTF-8. Raises ArgumentTypeError where it is not."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{argument!a} is not UTF-8, and the run would record it: rename the file or "
                                         "directory, or give a link to it") from None
    return argument


def parser(description: str, epilog: str = "") -> argparse.ArgumentParser:
    """The arguments that all stages share."""
    result = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                     epilog=f"{epilog}All parameters of a params.json: docs/parameters.md.")
    result.add_argument("--save_path", required=True, type=lambda path: Path(recorded(path)), metavar="DIR",
                        help="experiment directory: holds params.json, receives logs and checkpoints")
    result.add_argument("--data_dir", type=Path, default=Path("data"), metavar="DIR",
                        help="where the data sets are, or are downloaded to (default: data)")
    result.add_argument("--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda or cuda:N (default: auto)")
    result.add_argument("--gpu_id", type=int, nargs="+", metavar="N",
                        help="GPUs to use; several share each batch among one process each")
    result.add_argument("--resume", nargs="?", const=LAST, type=recorded, metavar="CHECKPOINT",
                        help="without a value: fail unless there is a run to continue (one is continued anyway); with "
                             "one: continue that run here or, if the file holds only weights, start from them")
    result.add_argument("--restart", action="store_true",
                        help="start over: what an earlier run wrote in the directory is removed")
    result.add_argument("--set", nargs="+", action="extend", default=[], type=recorded,
                        metavar="KEY=VALUE",
                        help="parameters of this run that differ from params.json")
    return result


def main(stage: Callable[[], None]) -> NoReturn:
    """Run a stage. An error that the user can mend is one line and exit status 2, an interrupt 130, SIGTERM 143, a
    reader of the output that has gone 141. What the terminal cannot show is printed in ASCII or escaped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_in_ascii.__name__)
    if not launcher.launched():  # one of several may wait for the others where Python handles no signal
        signal.signal(signal.SIGTERM, _terminate)
        sys.exit(_run(stage))
    try:
        status = _run(stage)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # the threads of a process group can abort a process that takes itself apart


def _run(stage: Callable[[], None]) -> int:
    try:
        with Phase():
            _run_to_completion(stage)
        return 0
    except Finished as end:
        if launcher.local_rank() == 0:
            print(one_line(end), flush=True)
        return 0
    except UserError as error:
        return _failed(str(error), single_process=isinstance(error, OutOfMemory))
    except BrokenPipeError:  # who read the output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still flushes at its end
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno is None:
            raise
        return _failed(str(UserError.from_os(error)))
    except KeyboardInterrupt as interrupt:
        if not launcher.launched():  # run_all ends runs that the terminal's Ctrl-C is ending already
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if launcher.local_rank() == 0:
            print("interrupted: the same command (without --restart) continues after the last finished epoch, if any",
                  file=sys.stderr)
        return 143 if interrupt.args else 130


def _run_to_completion(stage: Callable[[], None]) -> None:
    """Run a stage and print what is buffered: at Python's own end it would be too late for a reader that has gone.

    Raises an interrupt also where a library made another error of it.
    """
    try:
        stage()
    except SystemExit:  # of --help, for example
        print(end="", flush=True)
        raise
    except Exception as error:
        if interrupt := interrupts.find_interrupt(error):
            raise interrupt from None
        raise
    print(end="", flush=True)


def _in_ascii(error: UnicodeError) -> tuple[str | bytes, int]:
    """An error handler of codecs: signs of ours as people write them in ASCII, others as `\\u732b`."""
    if isinstance(error, UnicodeEncodeError) and (substitute := _IN_ASCII.get(error.object[error.start])):
        return substitute, error.start + 1
    return codecs.backslashreplace_errors(error)


codecs.register_error(_in_ascii.__name__, _in_ascii)


def _terminate(*_: object) -> NoReturn:
    raise KeyboardInterrupt("SIGTERM")


def _failed(message: str, *, single_process: bool = False) -> int:
    """single_process: whether an error may be that of one process of several, of which the others do not know."""
    if single_process or launcher.local_rank() == 0:
        print(f"error: {one_line(message)}", file=sys.stderr)
    return 2
