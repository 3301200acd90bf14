# ruff: noqa: C408 (mmengine's configs are written with calls of dict)
# A small ViT and narrow heads to try things out; `addp seg train tiny` uses small crops of the toy dataset.
_base_ = "_base_/upernet_addp_ade20k.py"

model = dict(
    data_preprocessor=dict(test_cfg=dict(size_divisor=8)),
    backbone=dict(arch=dict(_delete_=True, width=128, depth=6, heads=4), patch_size=8, out_indices=(1, 2, 3, 5)),
    neck=dict(embed_dim=128),
    decode_head=dict(in_channels=[128] * 4, channels=32),
    auxiliary_head=dict(in_channels=128, channels=32),
)
optim_wrapper = dict(optimizer=dict(lr=1e-3))
train_cfg = dict(type="IterBasedTrainLoop", max_iters=500, val_interval=500)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", eta_min=0.0, by_epoch=False, begin=50, end=500),
]
auto_scale_lr = dict(base_batch_size=16)
