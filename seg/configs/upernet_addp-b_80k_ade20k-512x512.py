# ruff: noqa: C408 (calls of dict are how such configs are written)
# ViT-B, 80k iterations, batch 32. The paper reports mIoU 48.1.
# The learning rate is hard to read in our copy of the paper; the value is ours.
_base_ = "_base_/upernet_addp_ade20k.py"

train_cfg = dict(type="IterBasedTrainLoop", max_iters=80000, val_interval=8000)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="CosineAnnealingLR", eta_min=0.0, by_epoch=False, begin=1500, end=80000),
]
