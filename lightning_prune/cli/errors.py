"""Bad input becomes one line on stderr and exit status 2."""

from __future__ import annotations

import re
import sys
import traceback
from argparse import ArgumentError
from collections.abc import Callable

from lightning_prune.protocols import InputError

_SCAFFOLD = r'[Pp]arser key "|Problem with given class_path|^Given value'


def one_line_errors(action: Callable[[], int], debug: bool) -> int:
    """Run `action`; an error of the user's is one line and status 2, any other a line and status 1."""
    try:
        return action()
    except KeyboardInterrupt:
        status, line = 130, "interrupted"
    except Exception as error:
        cause = input_error_behind(error)
        status = 2 if cause else 1
        line = summary(cause) if cause else f"{type(error).__name__}: {error} (a defect of ours; --debug shows where)"
        if debug:
            traceback.print_exc()
    print(f"lightning_prune: error: {line}", file=sys.stderr)
    return status


def input_error_behind(error: BaseException | None) -> BaseException | None:
    """The InputError an exception was raised from, if there is one."""
    while error is not None:
        if isinstance(error, InputError | ArgumentError):
            return error
        error = error.__cause__ or error.__context__
    return None


def summary(error: BaseException) -> str:
    """One line that names the key or the file.

    Errors of nested configuration values are several lines long: the first names the key, and deeper ones say
    what was wrong with it. An `InputError` underneath says it best.
    """
    inner: BaseException | None = error
    while inner is not None and not isinstance(inner, InputError):
        inner = inner.__cause__ or inner.__context__
    if inner is not None:
        return " ".join(str(inner).split())
    message = str(error.message) if isinstance(error, ArgumentError) else str(error)
    lines = [line.strip(" -") for line in message.splitlines() if line.strip(" -")]
    keys = re.findall(r'[Pp]arser key "([^"]+)"', message)
    reasons = [line for line in lines if not re.search(_SCAFFOLD, line)]
    head = f"{'.'.join(dict.fromkeys(keys))}: " if keys else ""
    text = f"{head}{reasons[-1] if reasons else lines[0]}"
    return text if len(text) < 400 else text[:400] + "..."
