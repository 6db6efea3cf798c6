"""Classify images with the best checkpoint of a run."""

import csv
import io
import logging
import os
from collections.abc import Iterator
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import hydra
from omegaconf import DictConfig

from finetune import cli
from finetune.overrides import CONF

if TYPE_CHECKING:
    from torch import Tensor

    from finetune.data.transforms import Transform

log = logging.getLogger(__name__)


def main() -> NoReturn:
    """Entry point of python -m finetune.predict."""
    cli.command("predict", task)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="predict")
def task(cfg: DictConfig) -> None:
    """One prediction."""
    cli.guarded([f"run={cfg.run}"], Path(cfg.run), lambda: predict(cfg))


def predict(cfg: DictConfig) -> None:
    """Write predictions.csv: path, class, probability, top5; a row per image that can be read.

    Of a run with task=multilabel, class holds all classes above 0.5, with the separator of its
    table between them, or nothing; probability is that of the most probable class.

    Raises FinetuneError for a user's mistake; with strict=true also if a file cannot be read.
    """
    import torch  # late: --help must not wait for it
    from torch.utils.data import DataLoader

    from finetune.data.read import MAX_PIXELS
    from finetune.data.transforms import from_anything
    from finetune.errors import ConfigError, DataError
    from finetune.files import output_file, try_to_write, write_whole
    from finetune.machine import usable_cores
    from finetune.record import Record
    from finetune.restore import saved_model

    saved, model = saved_model(Path(cfg.run), cfg.model.target)
    transform, classes = from_anything(saved.input_spec), saved.classes
    multilabel = saved.task == "multilabel"
    data = Record.read(Path(cfg.run)).facts["config"]["data"]
    separator = data.get("label_separator") or ";"
    paths = list(images_below(Path(cfg.input)))
    output = output_file(cfg.output, Path(), "predictions.csv")
    try:
        try_to_write(output)  # before the work is done
    except OSError as error:
        raise ConfigError(f"output: {output} cannot be written: {error.strerror}") from error
    gpu = cfg.accelerator != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    model.to(device)
    workers = min(8, usable_cores() - 1) if cfg.num_workers is None else cfg.num_workers
    loader: DataLoader[Any] = DataLoader(
        ReadableImages(paths, transform, data.get("max_pixels") or MAX_PIXELS),  # type: ignore[arg-type] # needs no base class
        batch_size=cfg.batch_size,
        num_workers=workers if len(paths) > cfg.batch_size else 0,
        collate_fn=list,
    )
    rows, unreadable = [["path", "class", "probability", "top5"]], []
    with torch.inference_mode():
        for batch in loader:
            unreadable += [(path, image) for path, image in batch if isinstance(image, str)]
            good = [(path, image) for path, image in batch if not isinstance(image, str)]
            if not good:
                continue
            logits = model(torch.stack([image for _, image in good]).to(device))
            logits = logits.float()
            probabilities = logits.sigmoid() if multilabel else logits.softmax(1)
            top, labels = probabilities.topk(min(5, len(classes)))
            found = (logits > 0).tolist()  # above 0.5
            for (path, _), shares, best, above in zip(
                good, top.tolist(), labels.tolist(), found, strict=True
            ):
                named = [f"{classes[k]}:{share:.4f}" for k, share in zip(best, shares, strict=True)]
                several = separator.join(compress(classes, above))
                chosen = several if multilabel else classes[best[0]]
                rows.append([path, chosen, f"{shares[0]:.4f}", " ".join(named)])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    content = text.getvalue().encode("utf-8", "surrogateescape")
    try:
        write_whole(output, lambda file: file.write(content))
    except OSError as error:
        raise ConfigError(f"output: {output} cannot be written: {error.strerror}") from error
    log.info("%d images classified; written to %s", len(rows) - 1, output)
    if unreadable:
        listed = "\n".join(f"  {why}" for _, why in unreadable)
        message = f"{len(unreadable)} of {len(paths)} files could not be read:\n{listed}"
        if cfg.strict:
            raise DataError(message)
        log.warning("%s", message)


class ReadableImages:
    """(path, image) for each path: uint8 (3, S, S), or why it cannot be read, as text."""

    def __init__(self, paths: list[str], transform: "Transform", max_pixels: int) -> None:
        self.paths, self.transform, self.max_pixels = paths, transform, max_pixels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> "tuple[str, Tensor | str]":
        from finetune.data.read import read_image
        from finetune.errors import DataError

        path = self.paths[index]
        try:
            return path, self.transform(read_image(Path(path), self.max_pixels))
        except DataError as error:
            return path, str(error)


def images_below(source: Path) -> Iterator[str]:
    """A file itself, whatever its suffix; the images in a folder and its folders, in order."""
    from finetune.data.read import IMAGE_SUFFIXES
    from finetune.errors import DataError

    if source.is_file():
        yield str(source)
        return
    if not source.is_dir():
        raise DataError(f"input={source}: no such file or folder")
    found = False
    for folder, folders, names in os.walk(source):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__MACOSX")
        for name in sorted(names):
            if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
                found = True
                yield os.path.join(folder, name)  # noqa: PTH118 - keeps './' and odd bytes as typed
    if not found:
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        raise DataError(f"input={source}: no images in this folder; they end in {suffixes}")


if __name__ == "__main__":
    main()
