"""Results that are written piece by piece, so that a run which was killed goes on, and that may be
larger than the memory.

While the work lasts, its arrays stand in a folder beside their place, NAME.unfinished:

    log_prob.npy, ...  the arrays, with all their space; the bytes that make them .npy files are
                       written last
    job.json           what decides the results; how many rows are done, and the checksums of these
    step.safetensors   how far the next rows are, where these take long

A row counts once job.json says so, which is replaced whole after the row is on the disk. So the
process may be killed, or the power fail, at any moment.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from . import files, tensor_files
from .files import FileError
from .reserved import ReservedArray

__all__ = ["Unfinished", "prepare"]

JOB, STEP = "job.json", "step.safetensors"
_FORMAT = "dfkernels job 1"
SECONDS = 1.0  # between two entries in job.json


class _Done(NamedTuple):
    """How many rows are done, and the CRC-32 of these in each array."""

    rows: int
    crc32: dict[str, int]


class Unfinished:
    """Arrays ``[n, ...]`` on the way to their place: opened where an earlier run left them, given
    rows by `add`, and put into their place by `finish`. Inside `with`, no other process works on
    them, and whatever ends it, what was added is kept.

    Args:
        out: The result, of exactly this name: a .npz file, or a folder of .npy files.
        archive: Whether it is a .npz file. One that is no regular file is written at the end, and
            nothing is kept before.
        arrays: For each array its shape, with the same n >= 1 for all, and its dtype.
        configuration: What decides the results, in words and numbers: work of another one is
            refused.
        step_bytes: Of the tensors that `keep_step` is given.

    Attributes:
        folder: Where the work stands; None where it is not kept.
        count: n.

    Raises:
        FileError: There is too little space, the folder cannot be written to, is in use by another
            process, damaged, or has work of another configuration. Raised on entry of `with`.
    """

    def __init__(
        self,
        out: Path,
        archive: bool,
        arrays: Mapping[str, tuple[tuple[int, ...], np.dtype]],
        configuration: Mapping[str, object],
        step_bytes: int = 0,
    ) -> None:
        self.out, self.archive, self.step_bytes = out, archive, step_bytes
        self.configuration = json.loads(json.dumps(configuration))
        self.folder = folder_of(out, archive)
        self.count = next(shape[0] for shape, _ in arrays.values())
        self._kinds, self._arrays = arrays, {}
        self._fresh = False
        self._step: tuple[int, dict[str, Tensor]] = 0, {}
        self._saved = self._done = _Done(0, dict.fromkeys(arrays, 0))
        self._time = -math.inf

    @property
    def rows(self) -> int:
        """How many rows are done."""
        return self._done.rows

    @property
    def kept(self) -> bool:
        """Whether another run can go on from something."""
        return self.folder is not None and (self.rows > 0 or (self._at / STEP).exists())

    def __enter__(self) -> Unfinished:
        try:
            if self.folder is None:
                self._at = Path(tempfile.mkdtemp(prefix="dfkernels-"))
            else:
                self._at = self.folder
                self._at.mkdir(exist_ok=True)
            self._lock = os.open(self._at, os.O_RDONLY | os.O_DIRECTORY)
            try:
                self._open()
            except BaseException:
                self.__exit__()
                raise
        except OSError as error:
            raise self._failure(error) from None
        return self

    def __exit__(self, *error: object) -> None:
        try:
            if self._done.rows > self._saved.rows:
                with suppress(FileError):  # of a full disk, which another error speaks of
                    self.save()
            if self.folder is None or (self._fresh and not self.kept):
                with suppress(OSError):
                    self._remove()
        finally:
            for array in self._arrays.values():
                array.close()
            os.close(self._lock)

    def add(self, rows: Mapping[str, np.ndarray]) -> None:
        """Takes the next rows of every array.

        Raises:
            FileError: They cannot be written. What was added before is kept.
        """
        first, crc32 = self._done
        with self._writing():
            sums = {
                name: array.write(first, rows[name], crc32[name])
                for name, array in self._arrays.items()
            }
        self._done = _Done(first + len(next(iter(rows.values()))), sums)
        if self.rows == self.count or time.monotonic() - self._time >= SECONDS:
            self.save()

    def save(self) -> None:
        """Makes what was added count. Raises FileError."""
        done = self._done
        held = {"format": _FORMAT, "configuration": self.configuration, **done._asdict()}
        text = json.dumps(held, indent=2) + "\n"
        with self._writing():
            for array in self._arrays.values():
                array.sync()
            files.write(self._at / JOB, lambda file: file.write(text.encode()))
        self._saved, self._time = done, time.monotonic()

    def keep_step(self, parts: int, tensors: dict[str, Tensor]) -> None:
        """Keeps how far the next rows are: what `parts` parts of the work on them have made.

        Raises:
            FileError: It cannot be written.
        """
        said = {"rows": str(self.rows), "parts": str(parts)}
        with self._writing():
            tensor_files.save(self._at / STEP, tensors, said)

    def step(self) -> tuple[int, dict[str, Tensor]]:
        """What `keep_step` kept for the next rows, or 0 and nothing. To be asked for once."""
        kept, self._step = self._step, (0, {})
        return kept

    def finish(self) -> dict[str, np.ndarray]:
        """Puts the arrays, of which all rows are done, into their place, and returns them, mapped
        to read.

        Raises:
            FileError: They cannot be written there. They are kept.
        """
        assert self.rows == self._saved.rows == self.count
        with self._writing():
            for array in self._arrays.values():
                array.seal()
            mapped = {name: array.mapped() for name, array in self._arrays.items()}
            if self.archive:
                # pyrefly: ignore[bad-argument-type]  NumPy's stub takes the names for its keyword
                fill = lambda file: np.savez(file, **mapped)
                files.write(self.out, fill, None if self.out.is_symlink() else self.folder)
                self._remove()
            else:
                (self._at / STEP).unlink(missing_ok=True)
                if self._at != self.out:
                    os.rename(self._at, self.out)
        return mapped

    def _open(self) -> None:
        """Opens the arrays that are there, or makes them."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileError(f"{self._at}: another process works on it") from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise  # else the file system has no locks
        for pattern in files.LEFT_BEHIND:
            for left in self._at.glob(pattern):
                left.unlink()
        self._arrays = {
            name: ReservedArray(self._at / f"{name}.npy", *kind)
            for name, kind in self._kinds.items()
        }
        if (self._at / JOB).exists():
            self._saved = self._done = self._read()
            with self._anew():
                for name, array in self._arrays.items():
                    array.open(self.rows, self._done.crc32[name])
                if (self._at / STEP).exists():
                    self._step = self._read_step()
            self._expect_space()
            return
        self._fresh = True
        self._remove_files()
        self._expect_space()
        for array in self._arrays.values():
            array.create()
        self.save()

    def _read(self) -> _Done:
        try:
            held = json.loads((self._at / JOB).read_bytes())
            if held["format"] != _FORMAT:
                raise ValueError(f"format {held['format']!r}, not {_FORMAT!r}")
            saved, sums = dict(held["configuration"]), dict(held["crc32"])
            done = _Done(int(held["rows"]), {name: int(sums[name]) for name in self._kinds})
            if not 0 <= done.rows <= self.count:
                raise ValueError(f"{done.rows} of {self.count} rows")
        except (OSError, ValueError, KeyError, TypeError) as error:
            why = files.first_sentence(error)
            raise FileError(
                f"{self._at / JOB}: no work to go on from, or damaged ({why}): delete {self._at} "
                "to begin anew"
            ) from None
        files.refuse_another(self._at, "work", saved, self.configuration)
        return done

    def _read_step(self) -> tuple[int, dict[str, Tensor]]:
        tensors, said = tensor_files.read(self._at / STEP)
        if said.get("rows") != str(self.rows):
            return 0, {}  # of rows that are done
        return int(said["parts"]), {name: t.clone() for name, t in tensors.items()}

    def _expect_space(self) -> None:
        """Raises FileError where the disk has no room for what is still to be written."""
        size = sum(array.bytes for array in self._arrays.values())
        needed = self._fresh * size + self.archive * size  # the archive is made of the arrays
        if self.rows < self.count:
            needed += 2 * self.step_bytes
        free = shutil.disk_usage(self._at).free
        if needed > free:
            raise FileError(
                f"{self._at}: expected {needed:,} bytes of free space for the result, got {free:,}"
            )

    @contextmanager
    def _anew(self) -> Iterator[None]:
        try:
            yield
        except FileError as error:
            raise FileError(f"{error}: delete {self._at} to begin anew") from None

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """An error in the block says what is kept."""
        try:
            yield
        except (OSError, FileError) as error:
            why = str(error) if isinstance(error, FileError) else self._failure(error)
            kept = ": what is done is kept, and the same run goes on from there"
            raise FileError(f"{why}{kept if self.kept else ''}") from None

    def _failure(self, error: OSError) -> FileError:
        return FileError(f"{self.folder or self.out}: cannot write: {error.strerror or error}")

    def _remove(self) -> None:
        """Removes the folder, unless something else is in it, too."""
        self._remove_files()
        with suppress(OSError):
            self._at.rmdir()

    def _remove_files(self) -> None:
        for name in (JOB, STEP, *(f"{name}.npy" for name in self._kinds)):  # first what counts
            (self._at / name).unlink(missing_ok=True)


def folder_of(out: Path, archive: bool) -> Path | None:
    """Where the work on a result stands: beside it until it is finished; None if it is nothing that
    can be replaced.
    """
    if archive:
        return out.with_name(f"{out.name}.unfinished") if files.is_replaced(out) else None
    return out if _is_result(out) else out.with_name(f"{out.name}.unfinished")


def _is_result(folder: Path) -> bool:
    """Whether a folder is one that `Unfinished` has put into its place."""
    try:
        return json.loads((folder / JOB).read_bytes())["format"] == _FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False


def prepare(out: Path, archive: bool) -> None:
    """Makes the folder of a result and checks, before any work, that the result can be written.

    Raises:
        FileError: It cannot, or a folder of its name holds something else.
    """
    if archive:
        files.prepare(out)
        return
    if out.name in ("", ".."):
        raise FileError(f"{out}: expected the name of a folder to make")
    files.folder(out.absolute().parent)
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise FileError(f"{out}: is there already, and no folder: name another one")
    if out.is_dir() and any(out.iterdir()) and not _is_result(out):
        raise FileError(f"{out}: is there already, with something else in it: name another folder")
