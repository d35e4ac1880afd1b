"""The types of options, and the arguments that several commands take."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any


def is_number(text: str) -> bool:
    """Whether float() takes it."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def number(text: str) -> float:
    """A finite number."""
    if not is_number(text):
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}")
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text}")
    return value


def positive(text: str) -> float:
    """A finite number > 0."""
    value = number(text)
    if value <= 0:  # 1e-400 is 0
        raise argparse.ArgumentTypeError(f"expected a number > 0, got {text}")
    return value


def count(text: str, least: int = 1) -> int:
    """A whole number >= `least`."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
    if value < least:
        raise argparse.ArgumentTypeError(f"expected at least {least}, got {text}")
    return value


def numbers(text: str) -> float | tuple[float, ...]:
    """A finite number, or several with commas between."""
    each = tuple(number(part) for part in text.split(","))
    return each if len(each) > 1 else each[0]


def size(text: str) -> int:
    """A number of bytes, as in 4096, 512M and 1.5G; K, M, G and T are powers of 1024."""
    letter = text[-1:].upper()
    power = "KMGT".find(letter) + 1 if letter else 0
    given = text[:-1] if power else text
    if not is_number(given) or not 1 <= float(given) * 1024**power < math.inf:
        raise argparse.ArgumentTypeError(f"expected bytes, such as 512M or 4G, got {text!r}")
    return int(float(given) * 1024**power)


def add_scale(
    parser: argparse.ArgumentParser, data: str, kind: Callable[[str], Any] = number
) -> None:
    """--scale and --offset, of the files named in `data`; with `numbers` for each channel too."""
    several = "" if kind is number else "; A,B,... are those of the channels"
    what = f"atoms are scale * {data} + offset (default: 1{several})"
    parser.add_argument("--scale", type=kind, default=1.0, help=what)
    parser.add_argument("--offset", type=kind, default=0.0, help="(default: 0)")


def add_data(parser: argparse.ArgumentParser) -> None:
    """The arguments that say what the atoms are."""
    parser.add_argument(
        "data",
        metavar="DATA",
        help=(
            "atoms, [N, *E], of any real dtype; float32/16, bfloat16 and uint8 stay in their file"
            " as they are"
        ),
    )
    parser.add_argument(
        "--log-prior", metavar="FILE", help="log weights of the atoms, [N] (default: uniform)"
    )
    add_scale(parser, "DATA")
