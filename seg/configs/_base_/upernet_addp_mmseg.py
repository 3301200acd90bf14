# ruff: noqa: C408 (mmengine's configs are written with calls of dict)
# The same training in mmseg's own parts, for its tools and its inferencer: mmengine's Runner, mmseg's loading of files
# and metrics. The files of `addp export layout=mmseg` and the config.py of a run folder are made from it.
_base_ = "../upernet_addp-b_80k_ade20k-512x512.py"

custom_imports = dict(
    imports=["seg.backbone", "seg.token_backbone", "seg.cnn_backbone", "seg.dataset"], allow_failed_imports=False
)
runner_type = "Runner"

train_pipeline = [
    dict(type="LoadImageFromFile", imdecode_backend="pillow"),
    dict(type="LoadAnnotations"),
    dict(type="RandomResize", scale={{_base_.scale}}, ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size={{_base_.crop_size}}, cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile", imdecode_backend="pillow"),
    dict(type="Resize", scale={{_base_.scale}}, keep_ratio=True),
    dict(type="LoadAnnotations"),  # after Resize: class maps are evaluated at their own size
    dict(type="PackSegInputs"),
]
train_dataloader = dict(
    _delete_=True,
    batch_size=4,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(type="SceneFolder", data_root={{_base_.data_root}}, split="train", pipeline=train_pipeline),
)
val_dataloader = dict(
    _delete_=True,
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="SceneFolder", data_root={{_base_.data_root}}, split="val", pipeline=test_pipeline, test_mode=True
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator
tta_model = dict(type="SegTTAModel")

default_hooks = dict(
    _delete_=True,
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=8000),
    sampler_seed=dict(type="DistSamplerSeedHook"),
    visualization=dict(type="SegVisualizationHook"),
)
visualizer = dict(type="SegLocalVisualizer", vis_backends=[dict(type="LocalVisBackend")], name="visualizer")
log_processor = dict(by_epoch=False)
