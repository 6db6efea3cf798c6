"""The main job: fine-tune a model, keep the best by val, test it once."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from finetune import cli, slurm
from finetune.errors import ConfigError, FinetuneError
from finetune.overrides import (
    CONF,
    config_dir,
    prepared,
    recorded_sweep,
    value_of,
    with_recorded,
    without_launcher,
)
from finetune.record import Record, has_record, is_finished
from finetune.typed import to_type


def main() -> NoReturn:
    """Entry point of train.py."""
    try:
        arguments = prepared("train", sys.argv[1:])
        if value_of("sweep.resume", arguments):
            cli.command("train", resume_sweep)
        if resume := value_of("resume", arguments):
            sys.argv[1:] = with_recorded(arguments)  # before Hydra writes anything there
            if len(arguments) == 1 and is_finished(Path(resume)):
                print(finished(Path(resume)))
                sys.exit(0)
    except FinetuneError as error:
        cli.fail(error)
    cli.command("train", task)


def resume_sweep() -> None:
    """Run the jobs of a sweep that are missing or unfinished, each as a run of its own.

    Hydra's sweeper would write anew what lies in the directories of all jobs.
    """
    jobs = recorded_sweep(sys.argv[1:])
    cli.sweep = Path(value_of("sweep.resume", sys.argv[1:]) or "")
    to_do = [job for job in jobs if not is_finished(job.run)]
    if to_do:
        from finetune import check, resume  # late: imports torch

        check.check_all([job.cfg for job in to_do])
        for job in jobs:
            if has_record(job.run):
                config = OmegaConf.to_container(job.cfg, resolve=True)
                resume.refuse_changes(Record.read(job.run).facts, config, job.run)
    print(f"{cli.sweep}: {len(jobs) - len(to_do)} of {len(jobs)} jobs were done before")
    for number, job in enumerate(jobs):
        if job in to_do:
            print(f"#{number}: {' '.join(job.overrides)}", flush=True)
            sys.argv[1:] = job.arguments
            task()
        else:
            cli.jobs_done.append(cli.Job(job.overrides, job.run, None))


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

    go_on = to_type("resume", cli.shown_path(run))
    if hydra_cfg.mode is RunMode.MULTIRUN:
        cli.sweep = Path(hydra_cfg.sweep.dir)
    if cli.sweep is not None:
        go_on = f"-m {to_type('sweep.resume', cli.shown_path(cli.sweep))}"

    def start() -> None:
        if cfg.launcher:
            own = [o for o in without_launcher(overrides) if not o.startswith("resume=")]
            slurm.submit(cfg, run, own, config_dir(sys.argv[1:]))
        else:
            launch.run(cfg, run, overrides, why)

    def job() -> None:
        if cfg.resume is None or not is_finished(run):
            start()
            return
        facts, config = Record.read(run).facts, OmegaConf.to_container(cfg, resolve=True)
        try:
            resume.refuse_changes(facts, config, run)
        except ConfigError as error:
            raise ConfigError(f"{finished(run)}\n{error}") from error
        if resume.trains_longer(facts, cfg):
            start()
        else:
            print(finished(run))

    cli.guarded(overrides, run, job, go_on)


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
