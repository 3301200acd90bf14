# ruff: noqa: C408 (mmengine's configs are written with calls of dict)
# UperNet over ResNet-50 or another CNN, 80k iterations, batch 16: heads as in upernet_r50 of mmseg, optimizer as in its
# UperNet over ConvNeXt, without layer decay and drop path, as our recipes for fine-tuning ResNet-50. The paper has no
# segmentation over a CNN.
_base_ = "_base_/upernet_addp_ade20k.py"

custom_imports = dict(
    imports=["seg.backbone", "seg.cnn_backbone", "seg.dataset", "seg.evaluation", "seg.runner"],
)
norm_cfg = dict(type="SyncBN", requires_grad=True)
model = dict(
    data_preprocessor=dict(test_cfg=dict(size_divisor=32)),
    backbone=dict(
        _delete_=True,
        type="AddpCNN",
        arch="resnet50",
        img_size=(512, 512),
        drop_path=0.0,
        norm_cfg=norm_cfg,
        init_cfg=dict(type="Pretrained", checkpoint="model.safetensors"),
    ),
    neck=None,
    decode_head=dict(in_channels=[256, 512, 1024, 2048], channels=512),
    auxiliary_head=dict(in_channels=1024),
)
optim_wrapper = dict(optimizer=dict(lr=1e-4), paramwise_cfg=dict(decay_rate=1.0))
train_cfg = dict(type="IterBasedTrainLoop", max_iters=80000, val_interval=8000)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="CosineAnnealingLR", eta_min=0.0, by_epoch=False, begin=1500, end=80000),
]
auto_scale_lr = dict(base_batch_size=16)
