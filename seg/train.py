"""`addp seg train`: UperNet over a pretrained encoder on ADE20K or a set in its layout, by MMSegmentation on mmengine's
Runner.

What a recipe leaves at null is the config's. Ends with `<out>/model.safetensors`, which `addp seg test` and
`addp seg predict` read, and with mIoU, aAcc and mAcc on the validation split. The same command continues a stopped run.
"""

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Interval, Le

from addp_core.base.errors import UserError, renaming_keys
from addp_core.networks.encoder import VIT_SIZES, EncoderConfig
from addp_core.recipes.config import dump
from addp_core.training.run_folder import mark_finished, prepare_out, release_out
from addp_core.weights.checkpoint import MODEL_FILE
from addp_core.weights.start import Start
from seg.scenes import SceneConfig, check_pairs, class_names, find_pairs
from seg.settings import (
    MapConfig,
    Segmentor,
    fill_model,
    fill_runtime,
    rank,
    read_config,
    save_segmentor,
    world,
)

log = logging.getLogger("addp")


@dataclass
class TrainConfig:
    """How long, how fast, with what; null stands for the config's value."""

    steps: Annotated[int | None, Ge(1), "optimizer steps"] = None
    batch: Annotated[int | None, Ge(2), "images of a step, over all processes"] = None
    accumulate: Annotated[int, Ge(1), "parts in which a step's images are computed"] = 1
    lr: Annotated[float | None, Gt(0), "peak learning rate of the heads"] = None
    warmup_steps: Annotated[int | None, Ge(0), "steps in which the rate rises from 0"] = None
    weight_decay: Annotated[float | None, Ge(0), "0 for biases, norms, positions"] = None
    layer_decay: Annotated[float | None, Gt(0), Le(1), "factor on the rate from each block to the one below"] = None
    drop_path: Annotated[float | None, Interval(ge=0, lt=1), "stochastic depth of the last block"] = None
    clip_grad: Annotated[float | None, Gt(0), "largest norm of the gradient; null: any"] = None
    precision: Annotated[Literal["fp32", "bf16", "fp16"], "of matrix products; bf16 and fp16 need a GPU"] = "fp32"
    checkpointing: Annotated[bool, "compute the blocks twice to save memory (compute only)"] = False
    seed: Annotated[int, Ge(0), "start of every random number"] = 0
    log_every: Annotated[int, Ge(1), "steps from one line of figures to the next"] = 50
    evaluate_every: Annotated[int | None, Ge(1), "steps between evaluations; the last step always has one"] = None
    checkpoint_every: Annotated[int | None, Ge(0), "steps between checkpoints; 0: at the end and on a signal"] = None
    keep: Annotated[int, Ge(1), "checkpoints kept"] = 2


@dataclass(kw_only=True)
class Recipe(Start):
    """Keys of `addp seg train`."""

    out: Annotated[str, "run folder"]
    data: SceneConfig
    config: Annotated[str, "a config of seg/configs, without .py"] = "upernet_addp-b_80k_ade20k-512x512"
    model: Annotated[
        str,
        "a run, a file (ADDP, classifier, MAE, BEiT, timm ViT), hf://owner/repository/file, or with init=random a size "
        "(tiny, small, base, large) or nothing (the config's)",
    ] = ""
    patch_size: Annotated[int | None, Ge(1), "pixels, where `model` is a size or nothing (default: the config's)"] = (
        None
    )
    relative: Annotated[
        Literal["table", "none"] | None,
        "BEiT's relative positions in each block, or the plain ViT with its class token",
    ] = None
    out_indices: Annotated[
        list[int] | None, "the blocks whose maps are used, four or one; null: at a third, a half, two thirds, the end"
    ] = None
    channels: Annotated[int | None, Ge(1), "of the UperNet head"] = None
    train: TrainConfig = field(default_factory=TrainConfig)
    test: MapConfig = field(default_factory=MapConfig)


def run(recipe: Recipe) -> None:
    """Train or continue. UserError for data that cannot be trained on, as far as it can be seen before."""
    cfg = read_config(recipe.config)
    recipe = resolve(recipe, cfg)
    text = dump(recipe)
    check(recipe)
    if prepare_out(recipe.out, text):
        return
    try:
        classes = class_names(recipe.data.source, recipe.data.classes)
        for split in ("train", "val") if rank() == 0 else ():
            check_pairs(find_pairs(recipe.data.source, split), len(classes), recipe.data.check)
        segmentor = describe(recipe, cfg, classes)
        fill_config(cfg, recipe, segmentor)
        train(cfg, segmentor, Path(recipe.out), text)
    finally:
        release_out(recipe.out)


def resolve(recipe: Recipe, cfg: Any) -> Recipe:
    """The recipe with the config's values where it has none."""
    optimizer, backbone = cfg.optim_wrapper.optimizer, cfg.model.backbone
    ours = {
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
    train = replace(recipe.train, **{key: value for key, value in ours.items() if getattr(recipe.train, key) is None})
    data = replace(
        recipe.data,
        crop=recipe.data.crop or cfg.crop_size[0],
        scale=recipe.data.scale or (cfg.scale[1], cfg.scale[0]),
    )
    keys = {"relative": backbone.relative, "channels": cfg.model.decode_head.channels}
    filled = {key: value for key, value in keys.items() if getattr(recipe, key) is None}
    return replace(recipe, train=train, data=data, **filled)


def check(recipe: Recipe) -> None:
    """UserError for settings that cannot work together."""
    import torch

    train, share = recipe.train, world() * recipe.train.accumulate
    if train.batch % share or train.batch // share < 2:  # BatchNorm needs two images
        raise UserError(
            f"train.batch={train.batch}: found {train.accumulate} parts x {world()} processes, expected a multiple of "
            f"{share}, at least {2 * share}"
        )
    if train.warmup_steps >= train.steps:
        raise UserError(f"train.warmup_steps={train.warmup_steps}: expected fewer than train.steps={train.steps}")
    if train.precision != "fp32" and not torch.cuda.is_available():
        raise UserError(f"train.precision={train.precision}: needs a GPU, there is none; use fp32")
    if not recipe.model and recipe.init == "pretrained":
        raise UserError("model: not given; expected model=<run or file>, or init=random")


def describe(recipe: Recipe, cfg: Any, classes: tuple[str, ...]) -> Segmentor:
    """The segmentor that a resolved recipe trains. UserError for a start that cannot be one."""
    from seg.backbone import default_indices

    backbone = cfg.model.backbone
    patch = recipe.patch_size or backbone.patch_size
    if recipe.model:
        start = replace(recipe, init="random", patch_size=patch if recipe.model in VIT_SIZES else recipe.patch_size)
        with renaming_keys({"data.size": "data.crop"}):
            encoder = start.pixel_encoder(recipe.data.crop)
        config, patch = encoder.config, encoder.patch_size
    else:
        arch = VIT_SIZES[backbone.arch] if isinstance(backbone.arch, str) else backbone.arch
        config = EncoderConfig(**arch, tokenizer_norm=recipe.tokenizer_norm)
    return Segmentor(
        width=config.width,
        depth=config.depth,
        heads=config.heads,
        layer_scale=config.layer_scale,
        patch_size=patch,
        tokenizer_norm=config.tokenizer_norm,
        relative=recipe.relative,
        out_indices=tuple(recipe.out_indices or default_indices(config.depth)),
        channels=recipe.channels,
        aux_channels=cfg.model.auxiliary_head.channels,
        classes=classes,
        crop=recipe.data.crop,
        scale=recipe.data.scale,
        normalisation=recipe.normalisation,
    )


def fill_config(cfg: Any, recipe: Recipe, segmentor: Segmentor) -> None:
    """Write the resolved recipe into the config."""
    train, parts, out = recipe.train, recipe.train.accumulate, Path(recipe.out)
    fill_model(cfg, segmentor)
    backbone = {"drop_path": train.drop_path, "checkpointing": train.checkpointing}
    if recipe.init == "pretrained":
        start = {"type": "Pretrained", "checkpoint": recipe.model}
        backbone |= {"init_cfg": start, "encoder_heads": recipe.encoder_heads}
    cfg.model.backbone.update(backbone)
    fill_runtime(cfg, out, recipe.data.workers, recipe.data.source, recipe.data.classes)
    cfg.model.test_cfg.mode = recipe.test.mode

    batch = train.batch // (world() * parts)
    cfg.train_dataloader.update(batch_size=batch, sampler={"type": "PositionSampler", "batch_size": batch})
    cfg.train_dataloader.dataset.seed = train.seed
    wrapper = cfg.optim_wrapper
    wrapper.optimizer.update(lr=train.lr, weight_decay=train.weight_decay)
    wrapper.update(
        paramwise_cfg={"decay_rate": train.layer_decay},
        accumulative_counts=parts,
        clip_grad={"max_norm": train.clip_grad} if train.clip_grad else None,
    )
    if train.precision != "fp32":
        wrapper.update(type="AmpOptimWrapper", dtype={"bf16": "bfloat16", "fp16": "float16"}[train.precision])
        cfg.val_cfg.fp16 = train.precision == "fp16"  # mmengine's loop knows no bf16
    length, warm = train.steps * parts, train.warmup_steps * parts
    cfg.train_cfg.update(max_iters=length, val_interval=min(train.evaluate_every * parts, length))
    rise, fall = cfg.param_scheduler
    rise.end = fall.begin = warm
    fall.update(end=length, T_max=length - warm)
    cfg.param_scheduler = [rise, fall] if warm else [fall]
    cfg.default_hooks.checkpoint.update(
        interval=train.checkpoint_every,
        keep=train.keep,
        log_every=train.log_every,
        seed=train.seed,
        accumulate=parts,
        out=str(out),
        batch=train.batch,
    )
    cfg.randomness = {"seed": train.seed}
    cfg.resume = True


def train(cfg: Any, segmentor: Segmentor, out: Path, text: str) -> None:
    """Run mmengine's Runner to the end, evaluate, write the file."""
    from mmengine.dist import barrier

    from seg.launch import loading, start_runner

    runner = start_runner(cfg)
    folder = runner.folder
    try:
        with loading(runner):
            runner.train()
            if folder.evaluated != runner.iter:  # stopped between the last step and the end of its evaluation
                runner.val_loop.run()
        if runner.rank == 0:
            folder.report.curves()
            save_segmentor(segmentor, runner.bare.state_dict(), out / MODEL_FILE)
            mark_finished(out, text, {"step": runner.iter // folder.accumulate, **folder.figures})
            log.info("seg: finished: %s", out / MODEL_FILE)
        barrier()  # no process leaves before the file is there
    except OSError as error:
        raise UserError(
            f"{out}: could not be written ({error.strerror or error}); make room and start again"
        ) from error
    finally:
        folder.close()
