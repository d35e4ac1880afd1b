"""Standard output and error that never stop the work: in any encoding, closed, full, or read by
nobody."""

from __future__ import annotations

import codecs
import errno
import os
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any, TextIO

BROKEN_PIPE = 141
_ASCII = {
    "━": "=",
    "─": "-",
    "│": "|",
    "×": "x",
    "·": ".",
    "−": "-",
    "–": "-",
    "≤": "<=",
    "≥": ">=",
    "≈": "~",
    "±": "+-",
    "²": "^2",
    "√": "sqrt",
    "∞": "inf",
    "σ": "sigma",
    "λ": "lambda",
    "α": "alpha",
    "ε": "eps",
    "→": "->",
    "…": "...",
}


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Codec error handler: ASCII that means the same, where there is any, else a backslash
    escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letter = error.object[error.start]
    if letter in _ASCII:
        return _ASCII[letter], error.start + 1
    one = UnicodeEncodeError(
        error.encoding, error.object, error.start, error.start + 1, error.reason
    )
    text, end = codecs.backslashreplace_errors(one)
    return str(text), end


codecs.register_error("dfkernels", _plain)


class _Stream:
    """A text stream that takes everything: after the first failure it drops what it is given."""

    def __init__(self, inner: TextIO | None) -> None:
        self.inner = inner
        self.failure: OSError | ValueError | None = None
        self.errors = getattr(inner, "errors", None)
        if hasattr(inner, "reconfigure"):
            self._guarded(lambda inner: inner.reconfigure(errors="dfkernels"))

    def write(self, text: str) -> int:
        self._guarded(lambda inner: inner.write(text))
        return len(text)

    def flush(self) -> None:
        self._guarded(lambda inner: inner.flush())

    def isatty(self) -> bool:
        return bool(self._guarded(lambda inner: inner.isatty()))

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def _guarded(self, call: Callable[[Any], object]) -> object:
        if self.inner is None or self.failure is not None:
            return None
        try:
            return call(self.inner)
        except (OSError, ValueError) as error:  # ValueError: the stream was closed
            self.failure = error
            self._discard(self.inner)
            return None

    @staticmethod
    def _discard(inner: TextIO) -> None:
        """Send what is left in the buffers nowhere: Python flushes them at exit, and would fail
        again."""
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, inner.fileno())
            os.close(null)
        except (OSError, ValueError):
            pass

    def close(self) -> None:
        """Flush, and give the inner stream back as it was."""
        self.flush()
        if self.failure is None and hasattr(self.inner, "reconfigure"):
            self._guarded(lambda inner: inner.reconfigure(errors=self.errors))


def _occupy() -> None:
    """Take the descriptors 0 to 2 that are closed: else the next files get them, and C code prints
    there."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


class Console:
    """`with Console() as console: ...; return console.code(code, "dfkernels env")`.

    Inside, sys.stdout and sys.stderr take everything: what their encoding lacks is written in
    ASCII, and what they cannot take is dropped. `code` tells what became of standard output.
    """

    def __enter__(self) -> Console:
        _occupy()
        self._before = sys.stdout, sys.stderr
        self.out, self.err = sys.stdout, sys.stderr = _Stream(sys.stdout), _Stream(sys.stderr)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        sys.stdout, sys.stderr = self._before
        self.out.close()
        self.err.close()

    def code(self, code: int, command: str) -> int:
        """Return the exit code of ``command``.

        That is ``code``, unless it is 0 and standard output did not take everything: then it is
        BROKEN_PIPE if nobody read it to its end, else 2 with a message on standard error.
        """
        self.out.flush()
        failure = self.out.failure
        if code or failure is None:
            return code
        if isinstance(failure, OSError) and failure.errno == errno.EPIPE:
            return BROKEN_PIPE
        why = getattr(failure, "strerror", None) or failure
        print(f"{command}: error: standard output: {why}", file=self.err)
        return 2
