"""`addp seg train`: train UperNet over a pretrained encoder on ADE20K, or on a dataset in its layout.

Training runs in MMSegmentation, with mmengine's Runner. Keys that a recipe leaves at null have the config's values. The
run ends with `<out>/model.safetensors`, which `addp seg test` and `addp seg predict` read, with the same weights for
mmseg's own tools (`config.py`, `model.pth`), and with mIoU, aAcc and mAcc on the validation split. The same command
continues a stopped run.
"""

import functools
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from addp_core.base.errors import UserError, renaming_keys
from addp_core.base.launch import rank, world_size
from addp_core.base.paths import RECIPE_FILE
from addp_core.networks.cnn import CnnEncoder
from addp_core.networks.encoder import VIT_SIZES, EncoderConfig
from addp_core.training.optimization import warn_if_warmup_is_too_long
from addp_core.training.run_folder import mark_finished, prepare_out, release_out, settle_precision
from addp_core.training.run_recipe import read_values
from addp_core.training.submission import is_for_slurm, number_of_processes
from addp_core.weights.encoders import DEFAULT_PATCH_SIZE
from addp_core.weights.files import MODEL_FILE
from addp_core.weights.fitting import AnyEncoder
from seg.mmseg_config import CNN_BACKBONE, fill_augmentation, fill_model, fill_runtime, read_config
from seg.recipe import TrainConfig as TrainConfig
from seg.recipe import TrainRecipe as Recipe
from seg.scenes import ClassMaps, SceneListing, check_scenes, read_class_names, recorded_datasets
from seg.segmentor import Segmentor, describe_encoder, describe_vit, save_segmentor

log = logging.getLogger("addp")

T = TypeVar("T")

AMP_WRAPPER = "AmpOptimWrapper"  # mmengine's mixed precision, on GPUs only

VIT_KEYS = ("relative", "class_token")


def run(recipe: Recipe) -> None:
    """Train, or continue. Raises UserError if the recipe or the dataset cannot be trained on, before training."""
    cfg, given, recorded = read_config(recipe.config), recipe, values_of_run(recipe.out)
    recipe = resolve(given, cfg)
    if given.class_token is None and recorded is not None and recorded.get("class_token") is None:
        recipe = replace(recipe, class_token=None)
    check_length(recipe, recorded)
    check_settings(recipe)
    load = functools.cache(functools.partial(load_model, recipe, cfg))
    if isinstance(load(), CnnEncoder) if recorded is None else recorded.get("relative", "") is None:
        recipe = resolve_for_cnn(given, recipe, cfg)

    def datasets() -> dict[str, SceneListing | ClassMaps]:
        return recorded_datasets({split: SceneListing(recipe.data.source, split) for split in ("train", "val")})

    if prepare_out(recipe.out, recipe, datasets):
        return
    try:
        classes = read_class_names(recipe.data.source, recipe.data.classes)
        if rank() == 0:
            check_scenes(recipe.data, classes)
        segmentor = describe_segmentor(recipe, cfg, classes, load())
        settle_precision(recipe.out, recipe, recipe.train, segmentor.width)
        fill_config(cfg, recipe, segmentor)
        train(cfg, segmentor, Path(recipe.out), recipe)
    finally:
        release_out(recipe.out)


def resolve(recipe: Recipe, cfg: Any) -> Recipe:
    """Return the recipe with the config's values for keys that are null."""
    optimizer, backbone = cfg.optim_wrapper.optimizer, cfg.model.backbone
    train_defaults = {
        "steps": cfg.train_cfg.max_iters,
        "batch": cfg.auto_scale_lr.base_batch_size,
        "lr": optimizer.lr,
        "warmup_steps": cfg.param_scheduler[0].end,
        "weight_decay": optimizer.weight_decay,
        "layer_decay": cfg.optim_wrapper.paramwise_cfg.decay_rate,
        "drop_path": backbone.drop_path,
        "evaluate_every": cfg.train_cfg.val_interval,
        "checkpoint_every": cfg.default_hooks.checkpoint.interval,
    }
    defaults = {} if backbone.type == CNN_BACKBONE else {key: backbone[key] for key in VIT_KEYS}
    defaults["channels"] = cfg.model.decode_head.channels
    train = replace(recipe.train, **_values_for_null_keys(recipe.train, train_defaults))
    data = replace(
        recipe.data,
        crop=recipe.data.crop or cfg.crop_size[0],
        scale=recipe.data.scale or (cfg.scale[1], cfg.scale[0]),
    )
    model = recipe.model
    if not model and recipe.init == "random" and backbone.type == CNN_BACKBONE:
        model = backbone.arch
    elif not model and recipe.init == "random" and (recipe.input == "token" or recipe.tokenizer):
        if not isinstance(backbone.arch, str):
            sizes = ", ".join(VIT_SIZES)
            raise UserError(f"model: not given, and the config's size has no name; expected one of {sizes}, or a file")
        model = backbone.arch
    return replace(recipe, train=train, data=data, model=model, **_values_for_null_keys(recipe, defaults))


def resolve_for_cnn(given: Recipe, recipe: Recipe, cfg: Any) -> Recipe:
    """Return a resolved recipe without the keys of ViTs. A config for ViTs has no layer decay and no drop path then.

    Raises UserError if a key of ViTs is set in the recipe as it was given.
    """
    for key in (*VIT_KEYS, "out_indices"):
        if (value := getattr(given, key)) is not None:
            raise UserError(
                f"{key}: found {value}, but {recipe.model} is a CNN, which is read at its four stages and has neither "
                "relative positions nor a class token; leave the key out"
            )
    train = recipe.train
    if cfg.model.backbone.type != CNN_BACKBONE:
        train = replace(train, **_values_for_null_keys(given.train, {"layer_decay": 1.0, "drop_path": 0.0}))
    return replace(recipe, train=train, relative=None, class_token=None)


def values_of_run(out: str) -> dict[str, Any] | None:
    """Return the keys of the run that the folder holds, which may be from before some of them existed; None: no run."""
    folder = Path(out)
    if not (folder / "finished.json").exists() and not any(folder.glob("checkpoints/step-*")):
        return None
    try:
        return dict(read_values((folder / RECIPE_FILE).read_text()))
    except (OSError, yaml.YAMLError, TypeError, ValueError):
        return None  # `prepare_out` reports it


def check_length(recipe: Recipe, recorded: dict[str, Any] | None) -> None:
    """Raise UserError if the run in the folder has another length: mmengine's schedules cannot be changed."""
    steps = (recorded or {}).get("train.steps")
    if steps is not None and steps != recipe.train.steps:
        raise UserError(
            f"train.steps: found {recipe.train.steps}, but out={recipe.out} holds a run of {steps}; the schedule of a "
            "run cannot be changed: restore the length or choose another out"
        )


def _values_for_null_keys(section: Any, defaults: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in defaults.items() if getattr(section, key) is None}


def resolved(value: T | None) -> T:
    """Return the value of a key that `resolve` has set."""
    assert value is not None
    return value


def check_settings(recipe: Recipe) -> None:
    """Raise UserError if keys do not fit together, or not this machine."""
    import torch

    train = recipe.train
    batch = resolved(train.batch)
    processes = number_of_processes(recipe)
    parts = processes * train.accumulate
    if batch % parts or batch // parts < 2:  # BatchNorm needs two images
        raise UserError(
            f"train.batch={batch}: found {train.accumulate} parts x {processes} processes, expected a multiple of "
            f"{parts}, at least {2 * parts}"
        )
    if rank() == 0:
        warn_if_warmup_is_too_long(resolved(train.warmup_steps), resolved(train.steps))
    if train.precision == "fp16" and not torch.cuda.is_available() and not is_for_slurm(recipe):
        raise UserError(f"train.precision={train.precision}: needs a GPU, but none is available; use bf16 or fp32")
    if not recipe.model and recipe.init == "pretrained":
        raise UserError("model: not given; expected model=<run or file>, or init=random")


def load_model(recipe: Recipe, cfg: Any) -> AnyEncoder | None:
    """Build the encoder of a resolved recipe, for its architecture alone; None if that is the config's.

    Raises UserError if its checkpoint cannot be used, or is no CNN although the config is for one.
    """
    if not recipe.model:
        return None
    backbone, patch_size = cfg.model.backbone, recipe.patch_size
    if recipe.model in VIT_SIZES and not recipe.tokenizer:
        patch_size = patch_size or backbone.get("patch_size", DEFAULT_PATCH_SIZE)
    with renaming_keys({"data.size": "data.crop"}):
        encoder = replace(recipe, init="random", patch_size=patch_size).load_encoder(resolved(recipe.data.crop))
    if backbone.type == CNN_BACKBONE and not isinstance(encoder, CnnEncoder):
        raise UserError(
            f"config: {recipe.config} is for CNNs, and {recipe.model} is a ViT; expected another config, such as "
            f"{Recipe.config}"
        )
    return encoder


def describe_segmentor(
    recipe: Recipe, cfg: Any, classes: tuple[str, ...], encoder: AnyEncoder | None = None
) -> Segmentor:
    """Return the segmentor that a resolved recipe trains over an encoder, by default that of `load_model`."""
    backbone, encoder = cfg.model.backbone, encoder or load_model(recipe, cfg)
    if encoder is None:
        arch = VIT_SIZES[backbone.arch] if isinstance(backbone.arch, str) else backbone.arch
        config = EncoderConfig(**arch, tokenizer_norm=recipe.tokenizer_norm)
        fields = describe_vit(config, recipe.patch_size or backbone.patch_size)
    else:
        fields = describe_encoder(encoder)
    if recipe.out_indices:
        fields["out_indices"] = tuple(recipe.out_indices)
    if isinstance(encoder, CnnEncoder):
        strides = ", ".join(map(str, encoder.config.strides))
        log.info("seg: %s: UperNet over its stages of strides %s", encoder.config.arch, strides)
    return Segmentor(
        **fields,
        relative=recipe.relative or "none",
        channels=resolved(recipe.channels),
        aux_channels=cfg.model.auxiliary_head.channels,
        classes=classes,
        crop=resolved(recipe.data.crop),
        scale=resolved(recipe.data.scale),
        normalisation=recipe.normalisation,
        class_token=recipe.class_token,
        rescales=tuple(cfg.model.neck.rescales) if cfg.model.get("neck") else Segmentor.rescales,
    )


def fill_config(cfg: Any, recipe: Recipe, segmentor: Segmentor) -> None:
    """Write a resolved recipe into the config."""
    train, out = recipe.train, Path(recipe.out)
    fill_model(cfg, segmentor)
    fill_augmentation(cfg, recipe.data)
    backbone: dict[str, Any] = {"drop_path": train.drop_path, "checkpointing": train.checkpointing}
    if recipe.init == "pretrained" or segmentor.tokens is not None:
        init_cfg = {"type": "Pretrained", "checkpoint": recipe.model}
        backbone |= {"init_cfg": init_cfg, "weights": recipe.weights}
        if segmentor.cnn is None:
            backbone["encoder_heads"] = recipe.encoder_heads
    if segmentor.tokens is not None:
        backbone |= {"init": recipe.init, "tokenizer_source": recipe.tokenizer}
    cfg.model.backbone.update(backbone)
    fill_runtime(cfg, out, recipe.data.workers, recipe.data.source, recipe.data.classes)
    cfg.model.test_cfg.mode = recipe.test.mode
    fill_training(cfg, train, out)


def fill_training(cfg: Any, train: TrainConfig, out: Path) -> None:
    """Write batches, optimization, schedule and checkpoints into the config."""
    import torch

    accumulate, batch = train.accumulate, resolved(train.batch)
    process_batch = batch // (world_size() * accumulate)
    cfg.train_dataloader.update(
        batch_size=process_batch, sampler={"type": "PositionSampler", "batch_size": process_batch}
    )
    cfg.train_dataloader.dataset.seed = train.seed
    wrapper = cfg.optim_wrapper
    wrapper.optimizer.update(lr=train.lr, weight_decay=train.weight_decay)
    wrapper.update(
        paramwise_cfg={"decay_rate": train.layer_decay},
        accumulative_counts=accumulate,
        clip_grad={"max_norm": train.clip_grad} if train.clip_grad else None,
    )
    if train.precision == "fp16" or (train.precision == "bf16" and torch.cuda.is_available()):
        wrapper.update(type=AMP_WRAPPER, dtype={"bf16": "bfloat16", "fp16": "float16"}[train.precision])
        cfg.val_cfg.fp16 = train.precision == "fp16"  # mmengine's validation loop does not support bf16
    iterations, warmup = resolved(train.steps) * accumulate, resolved(train.warmup_steps) * accumulate
    val_interval = min(resolved(train.evaluate_every) * accumulate, iterations)
    cfg.train_cfg.update(max_iters=iterations, val_interval=val_interval)
    fill_schedule(cfg, iterations, warmup)
    cfg.default_hooks.checkpoint.update(
        interval=train.checkpoint_every,
        keep=train.keep,
        log_every=train.log_every,
        trackers=list(train.trackers),
        tracker_project=train.tracker_project,
        seed=train.seed,
        accumulate=accumulate,
        out=str(out),
        batch=batch,
    )
    cfg.randomness = {"seed": train.seed}
    cfg.resume = True


def fill_schedule(cfg: Any, iterations: int, warmup: int) -> None:
    """Write the lengths of the run and of its warm-up, both in iterations, into the config's schedulers."""
    warmup_scheduler, cosine_scheduler = cfg.param_scheduler
    warmup_scheduler.end = cosine_scheduler.begin = warmup
    if warmup == 1:  # mmengine's ramp reaches the peak in its last iteration; one of a single iteration stays at 1e-6
        warmup_scheduler.start_factor = 1.0
    cosine_scheduler.update(end=iterations, T_max=iterations - warmup)
    cfg.param_scheduler = [warmup_scheduler] * (warmup > 0) + [cosine_scheduler] * (warmup < iterations)


def train(cfg: Any, segmentor: Segmentor, out: Path, recipe: Recipe) -> None:
    """Run mmengine's Runner to the end, evaluate, and write the model file."""
    from mmengine.dist import barrier

    from seg.launch import compute_in, data_workers, start_runner
    from seg.mmseg_export import CHECKPOINT_FILE, CONFIG_FILE, write_segmentor

    runner = start_runner(cfg)
    if recipe.train.precision == "bf16" and cfg.optim_wrapper.type != AMP_WRAPPER:
        compute_in("bf16", runner.unwrapped_model, training=True)
    run_folder = runner.run_folder
    try:
        with data_workers(runner):
            runner.train()
            if run_folder.evaluated_iteration != runner.iter:  # the run was stopped during its last evaluation
                runner.val_loop.run()
        if runner.rank == 0:
            if run_folder.run_logger:
                run_folder.run_logger.finish()
            state = runner.unwrapped_model.state_dict()
            save_segmentor(segmentor, state, out / MODEL_FILE)
            write_segmentor(segmentor, state, out, recipe.data.source, recipe.data.classes, runner.cfg)
            mark_finished(out, recipe, {"step": runner.iter // run_folder.accumulate, **run_folder.metrics})
            log.info("seg: finished: %s (for mmseg's tools: %s and %s)", out / MODEL_FILE, CONFIG_FILE, CHECKPOINT_FILE)
        barrier()  # no process may end before the file has been written
    except OSError as error:
        raise UserError(
            f"{out}: cannot be written ({error.strerror or error}); free disk space and run the same command again"
        ) from error
    finally:
        run_folder.close()
