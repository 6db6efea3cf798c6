"""run.json: what a run is, and how it stands. Whole at every moment."""

import json
from pathlib import Path
from typing import Any, Literal

from finetune.errors import CheckpointError, ConfigError
from finetune.files import write_json
from finetune.typed import to_type

Status = Literal["running", "finished", "failed", "interrupted"]
NAME = "run.json"


def taken(run: Path) -> ConfigError:
    """The message for a fresh start where there is a run."""
    return ConfigError(
        f"{run} already holds a run. To go on with it, type {to_type('resume', str(run))}; to "
        "start another, name a new folder, or none: hydra.run.dir, in a sweep hydra.sweep.dir"
    )


class Record:
    """The run.json of one run directory."""

    def __init__(self, run: Path, facts: dict[str, Any]) -> None:
        self.path, self.facts = run / NAME, facts

    @classmethod
    def create(cls, run: Path, facts: dict[str, Any]) -> "Record":
        """Claim a run directory. Raises ConfigError if it holds a run already."""
        path = run / NAME
        try:
            run.mkdir(parents=True, exist_ok=True)
            path.open("x").close()  # atomic: of two processes one gets it
        except FileExistsError as error:
            if has_record(run):
                raise taken(run) from error
        except OSError as error:
            raise ConfigError(f"hydra.run.dir: {run} cannot be written: {error}") from error
        record = cls(run, {"status": "running", "error": None, **facts})
        record.update()
        return record

    @classmethod
    def read(cls, run: Path) -> "Record":
        """Open the record of an earlier run. Raises CheckpointError if run is no run directory."""
        if not run.is_dir():
            raise CheckpointError(f"{run}: no such run directory. Runs lie below logs/")
        try:
            facts = json.loads((run / NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{run} is no run directory: {NAME} is missing or damaged ({error}). "
                "Give the folder that train.py named at the end; runs lie below logs/"
            ) from error
        if not (isinstance(facts, dict) and isinstance(facts.get("config"), dict)):
            raise CheckpointError(f"{run} is no run directory: {NAME} holds no run")
        return cls(run, facts)

    def update(self, **facts: Any) -> None:
        """Set facts and write the file; they hold once they are written."""
        now = {**self.facts, **facts}
        write_json(self.path, now)
        self.facts = now


def has_record(run: Path) -> bool:
    """Whether a run began. One that was killed at once left nothing, or an empty file."""
    path = run / NAME
    return path.exists() and path.stat().st_size > 0


def is_finished(run: Path) -> bool:
    """Whether there is nothing to resume."""
    return has_record(run) and Record.read(run).facts.get("status") == "finished"
