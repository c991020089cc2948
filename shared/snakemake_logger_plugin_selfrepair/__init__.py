"""One line per stage of a run, with count and time left: ``snakemake --logger selfrepair`` finds this
package by its name.

Snakemake's own messages go to its log in ``.snakemake/log``, the jobs' to logs of their own.
"""

from __future__ import annotations

import logging
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from snakemake.common import NOTHING_TO_BE_DONE_MSG
from snakemake_interface_logger_plugins.base import LogHandlerBase
from snakemake_interface_logger_plugins.common import LogEvent

#: Stages by rule, in order; other rules do no work.
STAGES = {
    "network": "prompts",
    "shards": "shards",
    "measure": "measured",
    "notebooks": "notebooks",
    "summary": "summary",
}
#: Seconds between lines where there is no terminal to write one line again and again.
SELDOM = 60


@dataclass
class Stage:
    name: str
    total: int
    started: float | None = None
    done: set[int] = field(default_factory=set)

    def line(self) -> str:
        """Count, and time taken or left (judged by the jobs done so far)."""
        count = f"{self.name}: {len(self.done)} of {self.total}"
        taken = time.monotonic() - self.started
        if len(self.done) == self.total:
            return f"{count}, {duration(taken)}"
        if self.done:
            return f"{count}, {duration(taken / len(self.done) * (self.total - len(self.done)))} left"
        return count


class LogHandler(LogHandlerBase):
    writes_to_stream = True
    writes_to_file = False
    has_filter = True
    has_formatter = True
    needs_rulegraph = False

    def __post_init__(self) -> None:
        self.stages: dict[str, Stage] = {}
        self.jobs: dict[int, tuple[str, str, Path | None]] = {}  # rule, name and log
        self.failed: set[int] = set()
        self.error = ""  # of Snakemake itself
        self.started = self.said = time.monotonic()
        self.live = ""

    def emit(self, record: logging.LogRecord) -> None:
        event = getattr(record, "event", None)
        if event == LogEvent.RUN_INFO:
            self.stages = {
                rule: Stage(name, record.stats[rule]) for rule, name in STAGES.items() if rule in record.stats
            }
        elif event == LogEvent.JOB_INFO and record.rule_name in self.stages:
            name = " ".join([record.rule_name, *map(str, record.wildcards.values())])
            self.jobs[record.jobid] = (record.rule_name, name, Path(record.log[0]) if record.log else None)
            stage = self.stages[record.rule_name]
            stage.started = stage.started or time.monotonic()
            self._show_live()
        elif event == LogEvent.JOB_FINISHED and record.job_id in self.jobs:
            stage = self.stages[self.jobs[record.job_id][0]]
            stage.done.add(record.job_id)
            self.failed.discard(record.job_id)
            if len(stage.done) == stage.total:
                self._say(stage.line())
            self._show_live()
        elif event == LogEvent.JOB_ERROR:
            if record.jobid in self.jobs and record.jobid not in self.failed:
                self.failed.add(record.jobid)
                _, name, log = self.jobs[record.jobid]
                self._say(f"failed: {name}: {last_line(log)} (see {log})")
        elif record.getMessage() == NOTHING_TO_BE_DONE_MSG:
            self._say("nothing to do: the results are there already")
        elif record.levelno >= logging.ERROR:
            self.error = self.error or " ".join(record.getMessage().split())

    def close(self) -> None:
        """The last line, when Snakemake's process ends."""
        if self.error and not self.failed:  # else it only repeats that a job failed
            self._say(self.error)
        if self.stages:
            done, total = (
                sum(counts)
                for counts in zip(*((len(s.done), s.total) for s in self.stages.values()), strict=True)
            )
            logs = next((log.parents[1] for _, _, log in self.jobs.values() if log), None)
            if done == total:
                self._say(f"done in {duration(time.monotonic() - self.started)}; logs: {logs}")
            else:
                what = f"{len(self.failed)} failed" if self.failed else "stopped"
                self._say(
                    f"{what}, {done} of {total} jobs are done; the same command goes on from there; "
                    f"logs: {logs}"
                )
        super().close()

    def _say(self, line: str) -> None:
        """A line that stays."""
        clear = "\r\033[K" if self.live else ""
        print(f"{clear}{line}", file=sys.stderr, flush=True)
        self.live = ""

    def _show_live(self) -> None:
        """The stages at work: on a terminal in place, else as a line now and then."""
        at_work = [
            stage.line() for stage in self.stages.values() if stage.started and len(stage.done) < stage.total
        ]
        if sys.stderr.isatty():
            self.live = " | ".join(at_work)[: shutil.get_terminal_size().columns - 1]
            print(f"\r\033[K{self.live}", end="", file=sys.stderr, flush=True)
        elif at_work and time.monotonic() - self.said > SELDOM:
            self.said = time.monotonic()
            self._say(" | ".join(at_work))


def duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def last_line(log: Path | None) -> str:
    """What a command said last: its errors are one line."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log and log.is_file() else []
    return next(
        (line.removeprefix("selfrepair: error: ") for line in reversed(lines) if line.strip()),
        "it left no message",
    )
