"""Back from a run directory: its model, its transform, its classes, its data."""

from pathlib import Path
from typing import NamedTuple

from finetune import checkpoint, heads
from finetune.backbones.run import misfit, rebuild
from finetune.checkpoint import Checkpoint
from finetune.data import transforms
from finetune.data.transforms import Transform
from finetune.errors import CheckpointError
from finetune.model import Classifier
from finetune.record import Record
from finetune.typed import to_type


class Loaded(NamedTuple):
    """A model that is ready to use: model(transform(image).unsqueeze(0)) gives logits (1, K)."""

    model: Classifier
    transform: Transform
    classes: tuple[str, ...]


def load(run: str | Path, target: str | None = None) -> Loaded:
    """Load the best model of a run, in eval mode, on the CPU.

    transform: a PIL image or uint8 (C, H, W) of any size, RGB or grey, to uint8 (3, S, S).
    target: dotted path of your class, for a run of model=module.
    Raises CheckpointError if run is no run directory or its checkpoint is damaged.
    """
    saved, model = saved_model(Path(run), target)
    return Loaded(model, transforms.from_anything(saved.input_spec), saved.classes)


def saved_model(run: Path, target: str | None) -> tuple[Checkpoint, Classifier]:
    """The best checkpoint of a run, and its model as load gives it."""
    Record.read(run)  # says what a run directory is, if this is none
    path = checkpoint.best_path(run)
    if not path.is_file():
        raise CheckpointError(
            f"{run} has no best checkpoint yet: {path} is missing. "
            f"Go on with it: python train.py {to_type('resume', str(run))}"
        )
    saved = checkpoint.read(path)
    backbone = rebuild(saved, path, target)
    head = heads.rebuild(saved.head, backbone.num_features, len(saved.classes), str(path))
    model = Classifier(backbone, saved.classes, head)
    try:
        model.load_state_dict(saved.state_dict)
    except RuntimeError as error:
        raise misfit(path, saved, error) from error
    return saved, model.eval()
