"""Where the service keeps what changes. A Bento is read-only; everything that a running service writes stands in one folder of its own.

`$LONGTRAIL_STATE/`            default: var/serving in the folder the service was started from
  log/                         answers/ (serving.answer_log), events/ (serving.event_log): one for all Bentos, never rewritten
  online/FEATURES_HASH/        one for each build of the features: histories (a copy of the Bento's snapshot, then kept up to date), new_users.csv
"""

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from longtrail.config import AnswerLogSettings, EventLogSettings
from longtrail.errors import ConfigError
from serving.answer_log import AnswerLog
from serving.event_log import EventLog
from serving.log import AppendLog

STATE_VARIABLE = "LONGTRAIL_STATE"


class StateSettings(BaseModel):
    """Settings of one running service, as opposed to those of its Bento (params.yaml)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: Path

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "StateSettings":
        """Read LONGTRAIL_STATE. A relative folder counts from where the service was started (PWD), for BentoML changes into the Bento.

        Raises ConfigError where that is unknown.
        """
        folder = Path(environment.get(STATE_VARIABLE) or "var/serving")
        if folder.is_absolute():
            return cls(folder=folder)
        started_in = environment.get("PWD")
        if not started_in:
            raise ConfigError(f"{STATE_VARIABLE} is {str(folder)!r} and PWD is not set; expected an absolute folder in {STATE_VARIABLE}")
        return cls(folder=Path(started_in) / folder)


class State:
    """The open state folder: the two logs, the place of the histories, and users met since the features were built."""

    def __init__(
        self, settings: StateSettings, features_hash: str, answer_log: AnswerLogSettings | None = None, event_log: EventLogSettings | None = None
    ) -> None:
        self.folder = folder = settings.folder
        self.answers = AnswerLog(folder / "log", answer_log)
        kept = event_log or EventLogSettings()
        self.events = EventLog(folder / "log", segment_bytes=kept.segment_bytes, retention_days=kept.retention_days)
        self.online = folder / "online" / features_hash[:16]
        self._users = AppendLog(self.online / "new_users.csv", header="user,user_id\n")
        self._released = False

    def new_users(self) -> dict[str, int]:
        """Raw key to dense id of users met since the features were built, in the order they came."""
        with self._users.path.open(encoding="utf-8", newline="") as lines:
            rows = [(row["user"], row["user_id"]) for row in csv.DictReader(lines)]
        return {key: int(number) for key, number in rows if number and number.isdecimal()}

    def add_users(self, users: Sequence[tuple[str, int]]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(users)
        self._users.append(text.getvalue(), durable=True)

    def release(self) -> None:
        """Give the folder up to another process, which may open it now; answers are still logged. Once is enough."""
        if not self._released:
            self._released = True
            self.events.close()
            self._users.close()

    def close(self) -> None:
        self.release()
        self.answers.close()
