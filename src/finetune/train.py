"""The main job: fine-tune a model, keep the best by val, test it once."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from finetune import cli
from finetune.errors import FinetuneError
from finetune.overrides import CONF, value_of, with_recorded
from finetune.record import NAME, Record, taken


def main() -> NoReturn:
    """Entry point of train.py."""
    arguments = sys.argv[1:]
    try:
        # both before Hydra writes anything into the run directory
        if resume := value_of("resume", arguments):
            sys.argv[1:] = with_recorded(arguments)
            if is_finished(Path(resume)):
                print(f"{resume} is finished already; nothing to do")
                sys.exit(0)
        elif (run := value_of("hydra.run.dir", arguments)) and (Path(run) / NAME).exists():
            raise taken(Path(run))
    except FinetuneError as error:
        cli.fail(error)
    cli.command("train", task)


def is_finished(run: Path) -> bool:
    """Whether there is nothing to resume. A run that was killed at once has no record yet."""
    return (run / NAME).exists() and Record.read(run).facts.get("status") == "finished"


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def task(cfg: DictConfig) -> None:
    """One job; several of them in a sweep."""
    from finetune import launch  # late: imports torch

    hydra_cfg = HydraConfig.get()
    run = Path(hydra_cfg.runtime.output_dir)
    overrides = list(hydra_cfg.overrides.task)
    why = why_model(overrides, hydra_cfg.runtime.choices, cfg.model.get("weights"))
    cli.guarded(overrides, run, lambda: launch.run(cfg, run, overrides, why))


def why_model(overrides: Sequence[str], choices: Mapping[str, str], weights: str | None) -> str:
    """Which model a run takes, and why."""
    model, data = choices["model"], choices["data"]
    if any(override.startswith("model=") for override in overrides):
        return f"{model}, as asked for"
    if choices.get("experiment"):
        return f"{model}, with experiment={choices['experiment']}"
    if model == "tiny":
        return f"tiny, since no model= was given and it is made for the 8 x 8 images of data={data}"
    how = "from scratch" if weights is None else f"with its weights {weights}"
    return f"{model} {how}, since no model= was given"


if __name__ == "__main__":  # where the package is installed without a checkout
    main()
