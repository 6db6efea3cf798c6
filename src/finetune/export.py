"""The best weights of a run as a file that holds no code and that others can read."""

import json
import logging
from pathlib import Path
from typing import NoReturn

import hydra
from omegaconf import DictConfig

from finetune import cli
from finetune.overrides import CONF

log = logging.getLogger(__name__)


def main() -> NoReturn:
    """Entry point of python -m finetune.export."""
    cli.command("export", task)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="export")
def task(cfg: DictConfig) -> None:
    """One file."""
    cli.guarded([f"run={cfg.run}"], Path(cfg.run), lambda: export(cfg))


def export(cfg: DictConfig) -> None:
    """Write the state dict; classes, input_spec, backbone, head and task as JSON in its metadata.

    model.weights=FILE fine-tunes from it. Raises FinetuneError for a user's mistake.
    """
    from dataclasses import asdict

    from safetensors.torch import save  # late: imports torch

    from finetune.errors import ConfigError
    from finetune.files import output_file, write_whole
    from finetune.restore import saved_model

    run = Path(cfg.run)
    saved, _ = saved_model(run, cfg.model.target)
    output = output_file(cfg.output, run, "model.safetensors")
    described = {
        "classes": saved.classes,
        "input_spec": asdict(saved.input_spec),
        "backbone": saved.backbone,
        "head": saved.head,
        "task": saved.task,
    }
    metadata = {name: json.dumps(value, ensure_ascii=False) for name, value in described.items()}
    state = {name: value.contiguous().clone() for name, value in saved.state_dict.items()}
    content = save(state, {"format": "pt", **metadata})
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, lambda file: file.write(content))
    except OSError as error:
        raise ConfigError(f"output: {output} cannot be written: {error.strerror}") from error
    log.info("%d tensors, %d classes; written to %s", len(state), len(saved.classes), output)


if __name__ == "__main__":
    main()
