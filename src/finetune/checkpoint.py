"""What a checkpoint holds; how it is written and read. All of it loads with weights_only=True."""

import logging
import os
import re
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from finetune.errors import CheckpointError
from finetune.files import write_whole
from finetune.specs import InputSpec

log = logging.getLogger(__name__)

FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """best.ckpt: weights, and what is needed to use them elsewhere.

    state_dict: of a Classifier. backbone: family and the keyword arguments that rebuild the
    architecture; head: its kind and those of the head; data, never code. value: of monitor. task:
    what the logits are for: classification (softmax) or multilabel (a sigmoid for each class).
    """

    state_dict: dict[str, Tensor]
    classes: tuple[str, ...]
    input_spec: InputSpec
    backbone: dict[str, Any]
    head: dict[str, Any]
    epoch: int
    step: int
    monitor: str
    value: float
    task: str = "classification"


def write(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint, whole or not at all."""
    content = {
        "format": FORMAT,
        **{name: getattr(checkpoint, name) for name in checkpoint.__dataclass_fields__},
        "classes": list(checkpoint.classes),
        "input_spec": asdict(checkpoint.input_spec),
    }
    save(path, content)


def save(path: Path, content: dict[str, Any]) -> None:
    """torch.save, whole or not at all. Raises OSError, such as that of a full disk."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(file: BinaryIO) -> None:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch's own word for a write that failed
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise

    write_whole(path, write)


def num_bytes(content: Any) -> int:
    """Of all tensors in nested containers, which is nearly all that their file takes."""
    if isinstance(content, Tensor):
        return content.nbytes
    if isinstance(content, dict):
        content = content.values()
    elif not isinstance(content, list | tuple):
        return 0
    return sum(num_bytes(value) for value in content)


def load(path: Path) -> dict[str, Any]:
    """Read a file of tensors and plain values. Raises CheckpointError if it is anything else."""
    try:
        content = load_whole(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except Exception as error:  # a damaged file fails in any of a dozen ways
        reason = why_unreadable(path, error)
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {reason}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return content


class Damaged(Exception):
    """A checksum does not hold."""


def load_whole(path: Path) -> Any:
    """torch.load to the CPU, of data only, if all checksums hold: it does not look at them itself.

    A flipped bit in a tensor would be another number. Raises Damaged, or whatever torch.load does.
    """
    if zipfile.is_zipfile(path):  # all but the files of old torch
        with zipfile.ZipFile(path) as archive:
            # torch.save never compresses; what does may be a thousand times as large in memory
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise Damaged("it is compressed, which no file of torch.save is")
            if damaged := archive.testzip():
                raise Damaged(f"the checksum of {damaged} in it does not hold: it is damaged")
    if os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        log.warning("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set and not followed: files are data here")
    return torch.load(path, map_location="cpu", weights_only=True)


def why_unreadable(path: Path, error: Exception) -> str:
    """What a file is not, where load_whole or safetensors raised error."""
    if isinstance(error, Damaged):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if path.stat().st_size == 0:
        return "it is empty"
    if found := re.search(r"GLOBAL (\S+) (was not an allowed global|whose module)", str(error)):
        return (
            f"it holds a whole module or another object ({found[1]}), which could run code when it "
            "is read; save net.state_dict() instead"
        )
    kind = "file of safetensors" if path.suffix == ".safetensors" else "file of torch.save"
    return f"it is no {kind}, or only a part of one"


def read(path: Path) -> Checkpoint:
    """Read a best.ckpt. Raises CheckpointError if it is not one."""
    # what older ones leave unsaid
    content = {"task": "classification", "head": {"kind": "linear"}} | load(path)
    names = Checkpoint.__dataclass_fields__
    missing = [name for name in names if name not in content]
    if missing or content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is no checkpoint of this project (format {content.get('format')}, "
            f"missing {', '.join(missing) or 'nothing'}). For weights of another origin: "
            f"model.weights={path}"
        )
    spec = dict(content["input_spec"])
    spec["mean"], spec["std"] = tuple(spec["mean"]), tuple(spec["std"])
    fields = {name: content[name] for name in names}
    fields |= {"classes": tuple(content["classes"]), "input_spec": InputSpec(**spec)}
    return Checkpoint(**fields)


def best_path(run: Path) -> Path:
    """Where the best weights of a run lie."""
    return run / "checkpoints" / "best.ckpt"


def step_path(run: Path, step: int) -> Path:
    """Where a resume at this step starts from."""
    return run / "checkpoints" / f"step-{step}.ckpt"


def step_paths(run: Path) -> list[Path]:
    """The step checkpoints of a run, newest first."""
    found = {
        int(match[1]): path
        for path in (run / "checkpoints").glob("step-*.ckpt")
        if (match := re.fullmatch(r"step-(\d+)\.ckpt", path.name))
    }
    return [found[step] for step in sorted(found, reverse=True)]
