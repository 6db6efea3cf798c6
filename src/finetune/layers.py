"""The layers of a model and what a strategy does with them; trains nothing, downloads nothing."""

import sys
from pathlib import Path
from typing import NoReturn

import hydra
from omegaconf import DictConfig

from finetune import cli
from finetune.errors import ConfigError
from finetune.overrides import CONF


def main() -> NoReturn:
    """Entry point of python -m finetune.layers."""
    if {"-m", "--multirun"}.intersection(sys.argv):
        cli.fail(ConfigError("this lists one model at a time; leave out -m"))
    cli.command("layers", task)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="layers")
def task(cfg: DictConfig) -> None:
    """One table."""
    cli.guarded([], Path(), lambda: show(cfg))


def show(cfg: DictConfig) -> None:
    """Print the table. Raises FinetuneError for a user's mistake."""
    from finetune import build, layer_table  # late: imports torch
    from finetune.layering import layer_modules

    backbone = build.build_backbone(cfg, weights=False)
    depth = len(layer_modules(backbone.net))
    strategy = build.build_strategy(cfg, depth, cfg.epochs)
    build.warn_of_no_effect(strategy, depth, cfg.epochs)
    print(layer_table.text(layer_table.layer_facts(backbone.net, None, strategy, cfg.epochs)))


if __name__ == "__main__":
    main()
