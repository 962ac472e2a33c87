"""Bad input becomes one line on stderr and exit status 2."""

from __future__ import annotations

import re
import sys
import traceback
from argparse import ArgumentError
from collections.abc import Callable

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_prune.protocols import GateNotMet, InputError
from lightning_prune.signals import Stopped

_SCAFFOLD = (
    r'[Pp]arser key "|Problem with given class_path|Given value|Subtypes: |Errors:$|'
    r"Does not validate against|Expected a <class 'NoneType'>|Expected a path but"
)
_LONGEST = 400
_OUT_OF_MEMORY = (
    "out of memory on the device: lower data.batch_size (trainer.accumulate_grad_batches makes up for it), or set "
    "trainer.precision: bf16-mixed; for DiP-GO also model.checkpoint_blocks: true, and while sampling the batch_size "
    "of the callback that draws"
)


def one_line_errors(action: Callable[[], int], debug: bool) -> int:
    """Run `action`; an error of the user's is one line and status 2, a gate not met 3, signal n 128 + n, others 1."""
    try:
        return action()
    except KeyboardInterrupt:
        status, line = 130, "interrupted"
    except GateNotMet as error:
        print(f"lightning_prune: gate not met: {error}", file=sys.stderr)
        return 3
    except Stopped as stop:
        print(f"lightning_prune: {stop}", file=sys.stderr)
        return 128 + stop.signum
    except Exception as error:
        cause = input_error_behind(error)
        status = 2 if cause else 1
        line = summary(cause) if cause else f"{type(error).__name__}: {error} (a defect of ours; --debug shows where)"
        if debug:
            traceback.print_exc()
    print(f"lightning_prune: error: {line}", file=sys.stderr)
    return status


def input_error_behind(error: BaseException | None) -> BaseException | None:
    """What the user can mend that an exception was raised from, if there is such: input, or a batch too large."""
    while error is not None:
        if isinstance(error, InputError | ArgumentError | MisconfigurationException | torch.OutOfMemoryError):
            return error
        error = error.__cause__ or error.__context__
    return None


def summary(error: BaseException) -> str:
    """One line that names the key or the file. An `InputError` underneath says it best."""
    inner: BaseException | None = error
    while inner is not None and not isinstance(inner, InputError):
        inner = inner.__cause__ or inner.__context__
    if inner is not None:
        return " ".join(str(inner).split())
    if isinstance(error, torch.OutOfMemoryError):
        return f"{_OUT_OF_MEMORY} ({_amount(str(error))})"
    return parser_summary(str(error.message) if isinstance(error, ArgumentError) else str(error))


def _amount(message: str) -> str:
    """What torch could not allocate, without its page on the state of the allocator."""
    found = re.search(r"Tried to allocate [\d.]+ \w+", message)
    return found.group() if found else message.split(". ")[0]


def parser_summary(message: str) -> str:
    """One line for a parser's message about a nested value.

    Such a message is a tree: keys and class paths lead to what was wrong, and alternatives of a union follow each
    other. The deepest line is the reason, the keys above it are its address.
    """
    lines = [line for line in message.splitlines() if line.strip(" -")]
    reasons = [line for line in lines if not re.search(_SCAFFOLD, line)] or lines
    reason = max(reasons, key=lambda line: len(line) - len(line.lstrip(" -"))).strip(" -")
    address = list(dict.fromkeys(re.findall(r'[Pp]arser key "([^"]+)"', message)))
    classes = re.findall(r"given class_path '([^']+)'", message)
    given = re.findall(r"Given value: (?:NestedArg\(key='[^']*', val=)?(.*?)\)?\s*$", message, re.MULTILINE)
    parts = [".".join(address), classes[-1] if classes else "", reason]
    text = ": ".join(part for part in parts if part)
    if given and given[0].strip("'") not in text:
        text += f" (given {given[0]})"
    return text if len(text) < _LONGEST else text[:_LONGEST] + "..."
