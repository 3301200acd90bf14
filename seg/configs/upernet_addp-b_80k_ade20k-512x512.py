# ruff: noqa: C408 (mmengine's configs are written with calls of dict)
# ViT-B, 80k iterations, batch 32. The paper reports mIoU 48.1.
# The paper's learning rate is hard to read in our copy; this value is our choice.
_base_ = "_base_/upernet_addp_ade20k.py"

train_cfg = dict(type="IterBasedTrainLoop", max_iters=80000, val_interval=8000)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="CosineAnnealingLR", eta_min=0.0, by_epoch=False, begin=1500, end=80000),
]
