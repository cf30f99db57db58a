"""User interface: tables, live view, run log and its reader, replay, plots, command line. Everything that uses rich."""

from .live import LiveView
from .log_reader import Run, read_log
from .replay import Replay, replay
from .report import ConsoleReport
from .run_log import RunLog

__all__ = ["ConsoleReport", "LiveView", "Replay", "Run", "RunLog", "read_log", "replay"]
