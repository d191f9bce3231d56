"""Starts the process of the checks, and starts it again after a crash or a hang."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

ALLOWED_SECONDS = 90.0  # of one check


class Supervisor:
    """Runs checks in child processes and prints a line for each that has ended.

    Args:
        work: folder of ``selected.json``, the names that a child runs, and of ``checks.jsonl``,
            what it writes.
        names: of the checks, in their order.
        budget: seconds for all of them.
        command: starts a child.
    """

    def __init__(self, work: Path, names: list[str], budget: float, command: list[str]) -> None:
        self.names, self.budget, self.command = names, budget, command
        self.selected, self.results = work / "selected.json", work / "checks.jsonl"
        self.results.write_text("")
        self.done: dict[str, dict[str, Any]] = {}
        self.begun = time.monotonic()
        self._position = 0
        self._current, self._since = "", 0.0

    def run(self) -> list[dict[str, Any]]:
        """``{name, status, note, seconds}`` of every check, in their order."""
        while (left := self._left()) and not self._over():
            self.selected.write_text(json.dumps(left))
            before, self._current = len(self.done), ""
            with subprocess.Popen(self.command) as child:
                note = self._follow(child)
            if self._current:
                self._end({"name": self._current, "status": "failed", "note": note})
            elif len(self.done) == before and not self._over():
                self._end({"name": left[0], "status": "failed", "note": f"not begun: {note}"})
        for name in self._left():
            note = f"the budget of {self.budget:g} s was over"
            self._end({"name": name, "status": "not run", "note": note})
        return [self.done[name] for name in self.names]

    def _left(self) -> list[str]:
        return [name for name in self.names if name not in self.done]

    def _over(self) -> bool:
        return time.monotonic() - self.begun > self.budget

    def _follow(self, child: subprocess.Popen) -> str:
        """Read what a child writes until it ends, and return how it ended."""
        while True:
            status = child.poll()
            self._read()
            if status is not None:
                return f"its process ended with status {status}"
            if self._over():
                child.kill()
                self._current = ""  # listed as not run
                return ""
            if self._current and time.monotonic() - self._since > ALLOWED_SECONDS:
                child.kill()
                return f"did not end within {ALLOWED_SECONDS:g} s"
            time.sleep(0.1)

    def _read(self) -> None:
        with self.results.open() as file:
            file.seek(self._position)
            while (line := file.readline()).endswith("\n"):
                self._position = file.tell()
                entry = json.loads(line)
                if "status" in entry:
                    self._end(entry)
                else:
                    self._current, self._since = entry["name"], time.monotonic()

    def _end(self, entry: dict[str, Any]) -> None:
        self._current = ""
        self.done[entry["name"]] = {"seconds": 0.0, **entry}
        count = f"[{len(self.done)}/{len(self.names)}]"
        print(count, f"{entry['status']}: {entry['name']} ({entry['note']})", flush=True)
