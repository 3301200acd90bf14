"""Batch norms in several processes: one set of statistics for all of them.

On GPUs the processes compute the statistics of a batch together (SyncBatchNorm), so that a batch counts as a whole
however it is split. torch cannot do so on CPUs; there, each process normalizes with its own images, and the moving
statistics are averaged after every step, so that they neither drift apart nor follow one process alone.
"""

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from addp_core.training.processes import process_state


def synchronize_batch_norms(model: nn.Module) -> None:
    """Let the processes of a run on GPUs compute the statistics of each batch together; in place."""
    state = process_state()
    if state.num_processes > 1 and state.device.type == "cuda":
        for name, child in model.named_children():
            setattr(model, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))


def local_statistics(model: nn.Module) -> list[Tensor]:
    """Return the moving means and variances of the batch norms whose processes compute them separately."""
    norms = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, nn.SyncBatchNorm)
    ]
    return [statistic for norm in norms for statistic in (norm.running_mean, norm.running_var) if statistic is not None]


def average_statistics(model: nn.Module, accelerator: Accelerator) -> None:
    """Give all processes the mean of their moving statistics; `Stage.after_step` is the place for it."""
    statistics = local_statistics(model)
    if accelerator.num_processes == 1 or not statistics:
        return
    means = accelerator.reduce(torch.cat(statistics), "mean")  # in one all-reduce: there may be a hundred of them
    for statistic, mean in zip(statistics, means.split([len(each) for each in statistics]), strict=True):
        statistic.copy_(mean)
