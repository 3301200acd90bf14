# ruff: noqa: C408 (mmengine's configs are written with calls of dict)
# A small ViT under heads as wide as itself, on a pyramid half as fine as usual; for `addp seg train tiny_wide`.
_base_ = "upernet_addp-tiny_500_ade20k-512x512.py"

model = dict(
    neck=dict(rescales=[2, 1, 0.5, 0.25]),
    decode_head=dict(channels=128),
    auxiliary_head=dict(channels=64),
)
train_cfg = dict(type="IterBasedTrainLoop", max_iters=1000, val_interval=1000)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", eta_min=0.0, by_epoch=False, begin=50, end=1000),
]
