"""The main job: fine-tune a model, keep the best by val, test it once."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from finetune import cli
from finetune.errors import ConfigError, FinetuneError
from finetune.overrides import CONF, prepared, value_of, with_recorded
from finetune.record import NAME, Record
from finetune.typed import to_type


def main() -> NoReturn:
    """Entry point of train.py."""
    try:
        arguments = prepared("train", sys.argv[1:])
        if resume := value_of("resume", arguments):
            sys.argv[1:] = with_recorded(arguments)  # before Hydra writes anything there
            if len(arguments) == 1 and is_finished(Path(resume)):
                print(finished(Path(resume)))
                sys.exit(0)
    except FinetuneError as error:
        cli.fail(error)
    cli.command("train", task)


def is_finished(run: Path) -> bool:
    """Whether there is nothing to resume. A run that was killed at once has no record yet."""
    return (run / NAME).exists() and Record.read(run).facts.get("status") == "finished"


def finished(run: Path) -> str:
    """What to say of it."""
    return (
        f"{run} is finished already; nothing to do. To train longer, start another run from its "
        f"weights: model=run {to_type('model.path', str(run))}"
    )


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def task(cfg: DictConfig) -> None:
    """One job; several of them in a sweep."""
    from finetune import launch, resume  # late: imports torch

    hydra_cfg = HydraConfig.get()
    run = Path(hydra_cfg.runtime.output_dir)
    overrides = list(hydra_cfg.overrides.task)
    why = why_model(overrides, hydra_cfg.runtime.choices, cfg.model.get("weights"))

    def job() -> None:
        if cfg.resume is None or not is_finished(run):
            launch.run(cfg, run, overrides, why)
            return
        facts, config = Record.read(run).facts, OmegaConf.to_container(cfg, resolve=True)
        try:
            resume.refuse_changes(facts, config, run)
        except ConfigError as error:
            raise ConfigError(f"{finished(run)}\n{error}") from error
        if resume.trains_longer(facts, cfg):
            launch.run(cfg, run, overrides, why)
        else:
            print(finished(run))

    cli.guarded(overrides, run, job)


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
