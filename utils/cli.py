"""Command line of the stages: options, error messages (one line on stderr) and exit status.

Imports no torch, because report.py and scripts/run_all.py use it too.
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

LAST = "last"  # value of --resume without an argument
_IN_ASCII = {"±": "+-", "–": "-"}  # non-ASCII characters of tables


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def recorded(argument: str) -> str:
    """Check that an argument can be recorded in the files of a run. Raises ArgumentTypeError if it is not UTF-8."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{argument!a} is not UTF-8 and cannot be recorded: rename the file or "
                                         "directory, or give a link to it") from None
    return argument


def parser(description: str, epilog: str = "") -> argparse.ArgumentParser:
    """Argument parser with the options that all stages share."""
    result = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                     epilog=f"{epilog}Parameters of params.json: docs/parameters.md.")
    result.add_argument("--save_path", required=True, type=lambda path: Path(recorded(path)), metavar="DIR",
                        help="experiment directory: has params.json, gets logs and checkpoints")
    result.add_argument("--data_dir", type=Path, default=Path("data"), metavar="DIR",
                        help="directory of the data sets; missing ones are downloaded (default: data)")
    result.add_argument("--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda or cuda:N (default: auto)")
    result.add_argument("--gpu_id", type=int, nargs="+", metavar="N",
                        help="GPUs to use; with several, each batch is split over one process per GPU")
    result.add_argument("--resume", nargs="?", const=LAST, type=recorded, metavar="CHECKPOINT",
                        help="without a value: fail unless there is a run to resume (an existing run is always "
                             "resumed); with a file: resume that run in DIR or, if the file holds only weights, "
                             "start from them")
    result.add_argument("--restart", action="store_true",
                        help="start over; the files of an earlier run in the directory are removed")
    result.add_argument("--set", nargs="+", action="extend", default=[], type=recorded,
                        metavar="KEY=VALUE",
                        help="parameters that replace those of params.json, such as seed=1 'schedule=[40,80]'")
    return result


def main(stage: Callable[[], None]) -> NoReturn:
    """Run a stage and exit. Exit status: 0; 2 after a UserError, printed as one line; 130 after an interrupt; 143 after
    SIGTERM; 141 if the reader of stdout has gone. Characters that the terminal lacks are replaced or escaped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_in_ascii.__name__)
    if not launcher.launched():  # one of several may wait for the others in C code, where Python handles no signal
        signal.signal(signal.SIGTERM, _terminate)
        sys.exit(_run(stage))
    try:
        status = _run(stage)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # threads of the process group can abort a regular exit


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
    except BrokenPipeError:  # the reader of the output has gone, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python still flushes at exit
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno is None:
            raise
        return _failed(str(UserError.from_os(error)))
    except KeyboardInterrupt as interrupt:
        if not launcher.launched():  # run_all may send SIGTERM after the terminal's Ctrl-C
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if launcher.local_rank() == 0:
            print("interrupted: the same command (without --restart) continues after the last finished epoch, if any",
                  file=sys.stderr)
        return 143 if interrupt.args else 130


def _run_to_completion(stage: Callable[[], None]) -> None:
    """Run a stage and flush stdout, since a broken pipe could not be handled at exit.

    Raises KeyboardInterrupt even if a library turned it into another error.
    """
    try:
        stage()
    except SystemExit:  # for example after --help
        print(end="", flush=True)
        raise
    except Exception as error:
        if interrupt := interrupts.find_interrupt(error):
            raise interrupt from None
        raise
    print(end="", flush=True)


def _in_ascii(error: UnicodeError) -> tuple[str | bytes, int]:
    """Error handler of codecs: `±` as `+-` and the like, other characters as `\\u732b`."""
    if isinstance(error, UnicodeEncodeError) and (substitute := _IN_ASCII.get(error.object[error.start])):
        return substitute, error.start + 1
    return codecs.backslashreplace_errors(error)


codecs.register_error(_in_ascii.__name__, _in_ascii)


def _terminate(*_: object) -> NoReturn:
    raise KeyboardInterrupt("SIGTERM")


def _failed(message: str, *, single_process: bool = False) -> int:
    """single_process: whether the error may have occurred in only one of several processes."""
    if single_process or launcher.local_rank() == 0:
        print(f"error: {one_line(message)}", file=sys.stderr)
    return 2
