"""The learning-rate schedule, and the optimizer with its parameter groups."""

import logging
import math
from dataclasses import replace
from typing import Any

import timm.optim
import torch
from torch import nn

from addp_core.base.errors import UserError
from addp_core.training.stage import TrainConfig

log = logging.getLogger("addp")


def learning_rate(step: int, total: int, warmup: float, config: TrainConfig) -> float:
    """Return the learning rate of optimizer step `step` (from 0) of `total`.

    It rises linearly from 0 over `warmup` steps and then follows half a cosine, or stays constant.
    """
    if step < warmup:
        return config.peak_lr * step / warmup
    if config.schedule == "constant":
        return config.peak_lr
    progress = (step - warmup) / max(total - warmup, 1)
    return config.min_lr + (config.peak_lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def warn_if_warmup_is_too_long(warmup: float, total: int) -> None:
    """Log a warning if a run of `total` steps ends before its `warmup` steps do."""
    if warmup >= total:
        log.warning(
            "the warm-up (%g steps) is not shorter than the run (%d steps): the learning rate never reaches its peak",
            warmup,
            total,
        )


def check_layer_decay(model: type[nn.Module], config: TrainConfig) -> None:
    """Raise UserError if `train.layer_decay` would have no effect on models of this class."""
    if config.layer_decay in (None, 1.0):
        return
    reason = "lars without weight decay has one rate for all layers" if _is_lars_without_decay(config) else ""
    reason = reason or ("" if hasattr(model, "group_matcher") else f"{model.__name__} does not name its layers")
    if reason:
        raise UserError(f"train.layer_decay: found {config.layer_decay}, expected null: {reason}")


def check_optimizer(config: TrainConfig) -> None:
    """Raise UserError if the optimizer cannot be built here: some need a package, or a GPU."""
    make_optimizer(nn.Linear(1, 1), replace(config, layer_decay=None))


def _is_lars_without_decay(config: TrainConfig) -> bool:
    return config.optimizer == "lars" and not config.weight_decay


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Build timm's optimizer over its parameter groups.

    One-dimensional tensors and those that the model's `no_weight_decay()` names are not decayed. With `layer_decay`,
    the learning rate falls from layer to layer, in the order of the model's `group_matcher`.
    """
    info = timm.optim.get_optimizer_info(config.optimizer)
    options: dict[str, Any] = {"betas": config.betas} if info.has_betas and info.num_betas == 2 else {}
    if info.has_momentum:
        options["momentum"] = config.momentum
    if config.optimizer in ("adam", "adamw"):
        options["fused"] = True  # one pass over the weights; half the time on a CPU
    options |= {"weight_decay": config.weight_decay, "layer_decay": config.layer_decay}
    if _is_lars_without_decay(config):
        options["param_group_fn"] = _lars_groups
    try:
        return timm.optim.create_optimizer_v2(model, opt=config.optimizer, lr=config.peak_lr, **options)
    except (ValueError, AssertionError, ImportError) as error:  # timm asserts that there is CUDA, or a package
        raise UserError(f"train.optimizer={config.optimizer}: {error}") from error


def _lars_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return LARS's parameter groups for training without weight decay (MAE's linear probing).

    LARS adapts the learning rate of matrices, which timm's does without weight decay only on request, and never that
    of vectors.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
    return [{"params": matrices, "always_adapt": True}, {"params": vectors}]
