# ruff: noqa: C408 (mmengine's configs are written with calls of dict)
# UperNet over a ViT on ADE20K (App. D): what the configs of all sizes share. `addp seg train` reads them; because
# custom_imports registers our parts, mmengine's own tools can read them too.
custom_imports = dict(imports=["seg.backbone", "seg.dataset", "seg.evaluation", "seg.runner"])
default_scope = "mmseg"
runner_type = "AddpRunner"

crop_size = (512, 512)
scale = (2048, 512)  # longest and shorter side of resized images
norm_cfg = dict(type="SyncBN", requires_grad=True)  # `addp seg train` uses BN with one process or on CPUs

model = dict(
    type="EncoderDecoder",
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        size=crop_size,
        test_cfg=dict(size_divisor=16),  # images are padded to whole patches, and their class maps cropped back
    ),
    backbone=dict(
        type="AddpViT",
        arch="base",
        img_size=crop_size,
        patch_size=16,
        out_indices=(3, 5, 7, 11),
        relative="table",
        class_token=True,
        drop_path=0.1,
        init_cfg=dict(type="Pretrained", checkpoint="model.safetensors"),
    ),
    neck=dict(type="MapPyramid", embed_dim=768, rescales=[4, 2, 1, 0.5], norm_cfg=norm_cfg),
    decode_head=dict(
        type="UPerHead",
        in_channels=[768] * 4,
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        channels=768,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    ),
    auxiliary_head=dict(
        type="FCNHead",
        in_channels=768,
        in_index=2,
        channels=256,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=0.4),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="slide", crop_size=crop_size, stride=(341, 341)),
)

data_root = "data/ade/ADEChallengeData2016"
train_pipeline = [
    dict(type="LoadPicture"),
    dict(type="LoadClassMap"),
    dict(type="RandomResize", scale=scale, ratio_range=(0.5, 2.0), resize_type="ResizePicture"),
    dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadPicture"),
    dict(type="ResizePicture", scale=scale),
    dict(type="LoadClassMap"),  # after the resize: class maps are evaluated at their own size
    dict(type="PackSegInputs"),
]
train_dataloader = dict(
    batch_size=4,  # for each of 8 processes
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type="PositionSampler", batch_size=4),
    dataset=dict(type="SceneFolder", data_root=data_root, split="train", seed=0, pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(type="SceneFolder", data_root=data_root, split="val", pipeline=test_pipeline, test_mode=True),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="ClassIoU", iou_metrics=["mIoU"])
test_evaluator = val_evaluator

optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=2e-4, betas=(0.9, 0.999), weight_decay=0.05),
    constructor="LayerDecay",
    paramwise_cfg=dict(decay_rate=0.85),
)
auto_scale_lr = dict(enable=False, base_batch_size=32)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
default_hooks = dict(
    timer=None,
    logger=None,  # RunFolder writes the metrics
    checkpoint=dict(type="RunFolder", interval=8000, keep=2, log_every=50, seed=0),
)
randomness = dict(seed=0)
env_cfg = dict(cudnn_benchmark=True)
