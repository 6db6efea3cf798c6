"""What every task shares: freezing, parameter groups, the lr of each step, reseeding."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.distributed.fsdp.wrap import CustomPolicy
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from finetune.data.mix import mix
from finetune.data.sampler import stable_hash
from finetune.datamodule import Given
from finetune.model import Classifier
from finetune.param_groups import param_groups
from finetune.strategies import Strategy

log = logging.getLogger(__name__)

OptimizerFactory = Callable[[list[dict[str, Any]]], Optimizer]
Schedule = Callable[[int, int], float]


class Task(L.LightningModule):
    """Trains a model under a strategy: lr = base * schedule(step) * lr_scale(layer, epoch).

    A layer whose lr_scale is 0.0 is in eval mode and does not move, bit for bit. All of it is a
    function of step and epoch: a resume restores nothing but the counters.
    optimizer: called with the parameter groups; its own lr is the base lr.
    schedule: factor on the lr from (step, total_steps).
    mixup, cutmix: alpha of the Beta distribution; training batches are mixed. None or 0.0: off.
    l2_sp: strength of the pull of the backbone to the weights it was built with, in place of its
    weight decay. None or 0.0: off.
    """

    task_name: ClassVar[str]  # as in conf/task, and in a checkpoint
    metric_names: ClassVar[tuple[str, ...]]  # val/<name> may be monitored; the first is by default
    per_class_metric: ClassVar[str]
    balances: ClassVar[tuple[str, ...]]  # what data.balance may be
    multilabel: ClassVar[bool]  # whether an image has any number of labels, not one

    gradient_norm: Tensor | None = None  # (), of the last step before it was clipped, if it was
    last_confusion: Tensor | None  # (K, K) counts of the last evaluation, rows are labels
    last_per_class: list[float | None]  # per_class_metric of the last evaluation, for K classes

    def __init__(
        self,
        model: Classifier,
        strategy: Strategy,
        optimizer: OptimizerFactory,
        schedule: Schedule,
        weight_decay: float,
        epochs: int,
        total_steps: int,
        seed: int,
        mixup: float | None = None,
        cutmix: float | None = None,
        l2_sp: float | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.strategy_ = strategy  # the name strategy is Lightning's, on the trainer
        self.make_optimizer, self.schedule = optimizer, schedule
        self.weight_decay, self.epochs, self.total_steps = weight_decay, epochs, total_steps
        self.seed = seed
        self.mixup, self.cutmix, self.l2_sp = mixup or 0.0, cutmix or 0.0, l2_sp or 0.0
        # before a resume loads its weights; no buffers: those are saved, and sent between ranks
        self._start = [
            (parameter, parameter.detach().clone())
            for parameter in (model.backbone.net.parameters() if self.l2_sp else ())
        ]
        self._to_log: list[Point] = []
        self._mode_epoch = -1
        self._scales: list[float] = []  # lr_scale of each layer in that epoch
        self._frozen_for_now: list[nn.Parameter] = []

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning notes around each hook which it is, 50 times a step; nn.Module's way is to look
        # for parameters, modules and buffers of that name first
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def lr_scale(self, layer: int, epoch: int) -> float:
        """The strategy's factor for a layer of this model."""
        return self.strategy_.lr_scale(layer, self.model.depth, epoch)

    def freeze_what_never_trains(self) -> None:
        """Take layers that no epoch trains out of autograd; before DDP wraps the model."""
        for layer, parameters in enumerate(self.model.parameters_by_layer()):
            trains = any(self.lr_scale(layer, epoch) > 0 for epoch in range(max(1, self.epochs)))
            for parameter in parameters:
                parameter.requires_grad_(trains)

    def setup(self, stage: str) -> None:
        """Freeze and group before the strategy wraps the model: FSDP flattens what a shape tells.

        The parameters themselves stay the same objects.
        """
        self.freeze_what_never_trains()
        self._by_layer = self.model.parameters_by_layer()
        self._groups = param_groups(self.model, self.weight_decay)
        strategy = self.trainer.strategy
        if isinstance(strategy, FSDPStrategy):
            # a unit for each layer: what shares one must train, or be frozen, together
            units = {m for modules in self.model.modules_by_layer() for m in modules}
            strategy.kwargs["auto_wrap_policy"] = CustomPolicy(units.__contains__)

    def on_fit_start(self) -> None:
        """Bring the weights that l2_sp pulls to where the model is by now."""
        trains = [(p, start) for p, start in self._start if p.requires_grad]
        self._start = [(p, start.to(p.device)) for p, start in trains]
        if self.l2_sp and not trains:
            log.warning("l2_sp=%s has no effect: the backbone does not train", self.l2_sp)

    def configure_optimizers(self) -> Optimizer:
        """One group per (layer, decays or not), frozen layers included, from step 0 on."""
        if self.l2_sp:  # it takes the place of weight decay, in the backbone
            for group in self._groups:
                group["weight_decay"] *= group["layer"] == self.model.depth
        optimizer = self.make_optimizer(self._groups)
        self.base_lr = float(optimizer.defaults["lr"])
        return optimizer

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Set modes, lr and random state of this step, each from the counters alone."""
        epoch, step = self.current_epoch, self.global_step
        # dropout and stochastic depth: a run that was resumed draws what the other drew
        reseed(stable_hash("step", self.seed, self.global_rank, epoch, batch_idx), self.device)
        if epoch != self._mode_epoch:
            self._set_modes(epoch)
        factor = self.schedule(step, self.total_steps)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self.base_lr * factor * self._scales[group["layer"]]

    def _set_modes(self, epoch: int) -> None:
        """Scale the lr of layers, and put frozen ones in eval mode.

        Their BatchNorm keeps the pretrained statistics.
        """
        self._mode_epoch = epoch
        self._frozen_for_now = []
        self._scales = [self.lr_scale(layer, epoch) for layer in range(self.model.depth + 1)]
        # first what holds the layers: it may drop out too
        self.model.backbone.train(any(scale > 0 for scale in self._scales[:-1]))
        layers = zip(self.model.modules_by_layer(), self._by_layer, strict=True)
        for layer, (modules, parameters) in enumerate(layers):
            trains = self._scales[layer] > 0
            for module in modules:
                module.train(trains)
            if not trains:
                self._frozen_for_now += [p for p in parameters if p.requires_grad]

    def on_after_backward(self) -> None:
        """Drop the gradients of layers that are frozen now and train later."""
        for parameter in self._frozen_for_now:
            parameter.grad = None

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm over all ranks, which under FSDP only the wrapped model knows."""
        clip_by_norm = getattr(self.trainer.model, "clip_grad_norm_", None)
        if not self.measures_norm() or gradient_clip_val is None:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif clip_by_norm:
            self.gradient_norm = clip_by_norm(gradient_clip_val)
        else:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            self.gradient_norm = clip(parameters, gradient_clip_val)

    def measures_norm(self) -> bool:
        """Whether gradient_norm is known after each step: it is clipped by its norm.

        With fp16's scaler Lightning clips, since it knows which optimizers unscale by themselves.
        """
        trainer: Any = self.trainer  # gradient_clip_val is not in its annotations
        sharded = isinstance(trainer.strategy, FSDPStrategy)
        by_norm = trainer.gradient_clip_val and trainer.gradient_clip_algorithm != "value"
        return bool(by_norm and (sharded or not loss_scaler(trainer)))

    def on_validation_start(self) -> None:
        """Let BatchNorm's statistics be those of rank 0, which are saved; DDP does so itself."""
        if isinstance(self.trainer.strategy, FSDPStrategy):
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, 0)

    def mixed(self, batch: Given, batch_idx: int) -> Given:
        """The batch as mixup and cutmix make it: float targets (B, K); untouched without them.

        Drawn from (seed, rank, epoch, batch): a run that was resumed mixes as the other did.
        """
        if not (self.mixup or self.cutmix):
            return batch
        images, targets = batch
        assert isinstance(images, Tensor)  # features.plan sees to it
        seed = stable_hash("mix", self.seed, self.global_rank, self.current_epoch, batch_idx)
        return mix(images, targets, len(self.model.classes), self.mixup, self.cutmix, seed)

    def pull_to_start(self) -> Tensor:
        """l2_sp / 2 * ||w - w0||^2 over what trains of the backbone; w0: what it was built with.

        Source: Li et al. 2018 (L2-SP); norms and biases are part of w there too.
        """
        distances = [(parameter - start).square().sum() for parameter, start in self._start]
        return 0.5 * self.l2_sp * sum(distances, torch.zeros((), device=self.device))

    def logs_this_step(self, batch_idx: int) -> bool:
        """Whether the loggers get the step that this batch ends, if it ends one."""
        trainer: Any = self.trainer  # log_every_n_steps is not in its annotations
        batches = batch_idx + 1
        last = batches == trainer.num_training_batches
        steps = last or batches % trainer.accumulate_grad_batches == 0
        return bool(steps and (self.global_step + 1) % trainer.log_every_n_steps == 0)

    def log_step(self, values: Mapping[str, Tensor | float], step: int) -> None:
        """Hand values to the loggers: at once, or once a GPU has computed them.

        They are not waited for until the next point, or until a checkpoint is written: Lightning's
        own log comes later than the one of this step, and a run stopped there would lose the point.
        """
        if self._to_log and self._to_log[-1].step != step:
            self.hand_over_logs()
        self._to_log.append(Point(step, values))
        if self.device.type != "cuda":
            self.hand_over_logs()

    def hand_over_logs(self) -> None:
        """Give the loggers what they have not got yet."""
        points, self._to_log = self._to_log, []
        for point in points:
            plain = point.plain()
            for logger in self.trainer.loggers:
                logger.log_metrics(plain, point.step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Log first what is older than the checkpoint."""
        self.hand_over_logs()

    def on_train_end(self) -> None:
        """Log the last point."""
        self.hand_over_logs()

    def learning_rates(self) -> dict[str, float]:
        """lr/<group>: what the step in progress uses."""
        groups = self.trainer.optimizers[0].param_groups
        return {f"lr/{group['name']}": group["lr"] for group in groups}


class Point:
    """Values of a step, those that a GPU computes on their way to the host."""

    def __init__(self, step: int, values: Mapping[str, Tensor | float]) -> None:
        self.step = step
        self._values = {
            name: v.to("cpu", non_blocking=v.is_cuda) if isinstance(v, Tensor) else v
            for name, v in values.items()
        }
        self._there = torch.cuda.Event() if torch.cuda.is_initialized() else None
        if self._there:
            self._there.record()

    def plain(self) -> dict[str, float]:
        """The values, once they are there."""
        if self._there:
            self._there.synchronize()
        return {name: float(value) for name, value in self._values.items()}


def reseed(seed: int, device: torch.device) -> None:
    """Seed what draws on the CPU and on this device.

    torch.manual_seed also notes the call, with a formatted stack, for each kind of device that was
    not used yet: a part of a millisecond and some kilobytes that stay, in every step.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type != "cpu":
        torch.manual_seed(seed)


def loss_scaler(trainer: L.Trainer) -> torch.amp.GradScaler | None:
    """That of trainer.precision=16-mixed, which skips steps that overflow; None in all others."""
    return getattr(trainer.precision_plugin, "scaler", None)


def clip(parameters: Sequence[nn.Parameter], most: float) -> Tensor:
    """Clip gradients by their norm as torch's clip_grad_norm_ does, and give the norm before it.

    On a CPU, gradients that are short enough stay: torch would multiply each of them by 1.0.
    """
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    if norm.device.type != "cpu" or not most / (norm + 1e-6) >= 1.0:
        clip_grads_with_norm_(parameters, most, norm)
    return norm


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Parameters that train, and all of them."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)
