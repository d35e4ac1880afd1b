"""Processes that answer requests one by one, each within a time limit: what hangs is killed, and
what crashes takes nothing along."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

from .checks import end
from .report import ROOT

START = 60.0  # seconds to import torch and to see the device


class Process:
    """A child that says "ready", then answers each line of JSON by one.

    After it has hung or died, the next request starts it anew.
    """

    def __init__(self, *command: str) -> None:
        self.command = command or (sys.executable, "-m", "bench.gpu.contender")
        self.running: subprocess.Popen | None = None

    def start(self) -> None:
        """Starts the child without waiting for it; `ask` does where nobody did."""
        self.ready = False
        self.errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self.running = subprocess.Popen(
            self.command,
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            start_new_session=True,
        )
        self.answers: queue.Queue[str] = queue.Queue()
        stream, answers = self.running.stdout, self.answers

        def read() -> None:
            assert stream is not None
            with stream:
                for line in stream:
                    answers.put(line)
            answers.put("")  # it has ended

        threading.Thread(target=read, daemon=True).start()

    def _answer(self, seconds: float) -> dict[str, Any]:
        try:
            line = self.answers.get(timeout=max(0.0, seconds))
        except queue.Empty:
            self.close()
            return {"failed": f"no answer within {seconds:.0f} s"}
        if line:
            return json.loads(line)
        self.errors.seek(0)
        said = self.errors.read()[-300:].strip()
        self.close()
        return {"failed": f"the process died: {said}"}

    def ask(self, request: dict[str, Any], seconds: float, deadline: float) -> dict[str, Any]:
        """The answer, or {"failed": why}; at most so many seconds beside the start, and none
        beyond the deadline (of time.monotonic)."""
        left = lambda limit: min(limit, deadline - time.monotonic())
        if left(seconds) <= 0:
            return {"skipped": "out of time"}
        if self.running is None:
            self.start()
        if not self.ready:
            first = self._answer(left(START))
            if "failed" in first:
                return first
            self.ready = True
        assert self.running is not None and self.running.stdin is not None
        try:
            self.running.stdin.write(json.dumps(request) + "\n")
            self.running.stdin.flush()
        except OSError:
            pass  # it has died, as the answer will say
        return self._answer(left(seconds))

    def close(self) -> None:
        """Ends the process, whatever it does."""
        if self.running is not None:
            end(self.running)
            self.errors.close()
            self.running = None
