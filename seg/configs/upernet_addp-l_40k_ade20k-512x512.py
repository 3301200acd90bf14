# ruff: noqa: C408 (mmengine's configs are written with calls of dict)
# ViT-L, 40k iterations, batch 32. The paper reports mIoU 54.3.
# The paper's learning rate is hard to read in our copy; this value is our choice.
_base_ = "_base_/upernet_addp_ade20k.py"

model = dict(
    backbone=dict(arch="large", out_indices=(7, 11, 15, 23)),
    neck=dict(embed_dim=1024),
    decode_head=dict(in_channels=[1024] * 4, channels=1024),
    auxiliary_head=dict(in_channels=1024),
)
optim_wrapper = dict(optimizer=dict(lr=1e-4))
train_cfg = dict(type="IterBasedTrainLoop", max_iters=40000, val_interval=8000)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="CosineAnnealingLR", eta_min=0.0, by_epoch=False, begin=1500, end=40000),
]
