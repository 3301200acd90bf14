"""Plain ViTs over pixels: files of MAE, BEiT and timm to our encoder, and our classifiers to timm's ViT."""

import re
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from addp_core.base.errors import UserError
from addp_core.networks.attention import PLAIN_ATTENTION, AttentionConfig
from addp_core.networks.classifier import RGB, Classifier, Pooling
from addp_core.networks.encoder import EncoderConfig
from addp_core.networks.token_encoder import TokenEncoder
from addp_core.weights.architectures import NORMALISATION, ClassifierArchitecture, EncoderArchitecture
from addp_core.weights.assumptions import Assumption, Hints
from addp_core.weights.files import State
from addp_core.weights.layouts.positions import fit_positions, grid_of_table
from addp_core.weights.layouts.published import ENCODER_PREFIXES
from addp_core.weights.layouts.shapes import depth_of, has_tensors, require_tensors

RELATIVE_TABLE = "relative.relative_position_bias_table"  # within a block
LINEAR_PROBE_EPS = 1e-6  # of the batch norm before the head in MAE's linear probe
NOT_ENCODER = ("decoder_", "mask_token", "head.", "lm_head.", "fc_norm.", "head_drop.")  # other parts of ViT files

is_vit = has_tensors("patch_embed.proj.weight", "blocks.0.attn.qkv.weight")
is_linear_probe = has_tensors("head.0.running_mean", "head.0.running_var", "head.1.weight")
is_mae = has_tensors("mask_token", "decoder_pred.weight", "blocks.0.attn.qkv.weight")


def is_vit_classifier(state: Mapping[str, Any]) -> bool:
    """Check whether a state dict is a ViT with a linear head, after MAE's batch norm or not."""
    return is_vit(state) and ("head.weight" in state or is_linear_probe(state))


# -------------------- MAE, BEiT and timm -> ours


def convert_vit(source: str, state: State, hints: Hints) -> tuple[State, EncoderArchitecture]:
    """Convert a ViT of MAE, BEiT or timm; decoders, heads and pooling norms are dropped."""
    hints.assumptions.extend(trained_on(hints.stated.mean, hints.stated.std))
    return convert_vit_encoder(source, state, hints)


def trained_on(mean: RGB | None, std: RGB | None) -> tuple[Assumption, ...]:
    """Say how images were normalized, if known and not as transfers do by default."""
    if mean is None or std is None or (mean, std) == NORMALISATION["imagenet"]:
        return ()
    name = next((name for name, values in NORMALISATION.items() if values == (mean, std)), "")
    note = f"was trained on images with mean {mean} and std {std}"
    return (Assumption("images", note, f"as with normalisation={name}" if name else ""),)


def convert_vit_encoder(source: str, state: State, hints: Hints) -> tuple[State, EncoderArchitecture]:
    """Convert the encoder of a ViT; see `convert_vit`."""
    renamed = _our_names(state)
    ours = {key: value for key, value in renamed.items() if key.startswith(ENCODER_PREFIXES)}
    unsupported = [key for key in renamed if key not in ours and not key.startswith(NOT_ENCODER)]
    if unsupported:
        raise UserError(f"{source}: a ViT with tensors that our encoder does not have: {', '.join(unsupported)}")
    require_tensors(source, ours, ("cls_token", "patch_embed.proj.weight"))
    width, patch = ours["cls_token"].shape[-1], ours["patch_embed.proj.weight"].shape[-1]
    table = ours.get(f"blocks.0.{RELATIVE_TABLE}")
    asked, stated = (
        None if size is None else (size[0] // patch, size[1] // patch)
        for size in (hints.image_size, hints.stated.image_size)
    )
    if stated is not None and "pos_embed" in ours and ours["pos_embed"].shape[1] == 1 + stated[0] * stated[1]:
        grid = stated
    elif ours.get("pos_embed") is not None:
        scaled = "blocks.0.ls1.gamma" in ours
        grid, ours["pos_embed"], assumptions = fit_positions(ours["pos_embed"], asked, layer_scale=scaled)
        hints.assumptions.extend(assumptions)
    elif table is not None:
        grid = grid_of_table(source, table, asked)
        ours["pos_embed"] = torch.zeros(1, 1 + grid[0] * grid[1], width)
    else:
        raise UserError(f"{source}: a ViT without positions; expected pos_embed or relative_position_bias_table")
    # ViTs with average pooling have fc_norm in place of the final norm; CLIP's have no bias on the patches.
    defaults = {"norm.weight": torch.ones, "norm.bias": torch.zeros, "patch_embed.proj.bias": torch.zeros}
    ours = {key: make(width) for key, make in defaults.items()} | ours
    config = EncoderConfig(
        width,
        depth_of(ours, "blocks."),
        hints.heads_for("encoder_heads", width) if table is None else table.shape[1],
        tokenizer_norm="tokenizer_norm.weight" in ours,
        layer_scale="blocks.0.ls1.gamma" in ours,
        pre_norm="norm_pre.weight" in state,
    )
    attention = PLAIN_ATTENTION if table is None else AttentionConfig(relative="table")
    return ours, EncoderArchitecture(config, (grid[0] * patch, grid[1] * patch), patch, attention)


def convert_vit_classifier(source: str, state: State, hints: Hints) -> tuple[State, ClassifierArchitecture]:
    """Convert a ViT of MAE, BEiT or timm with its head.

    After the average of the patch tokens comes `fc_norm`; `norm` belongs to the class token. A file has one of the two.
    A linear probe's batch norm is folded into the head.
    """
    encoder_state, encoder = convert_vit_encoder(source, state, hints)
    if "fc_norm.weight" in state and "norm.weight" in state:
        raise UserError(f"{source}: a classifier with two norms before its head; expected norm (timm) or fc_norm (MAE)")
    norm = next((name for name in ("fc_norm", "norm") if f"{name}.weight" in state), None)
    if norm is None:
        raise UserError(f"{source}: a classifier without a norm before its head; expected norm.* or fc_norm.*")
    head = {name: state[f"head.{name}"] for name in ("weight", "bias") if f"head.{name}" in state}
    if is_linear_probe(state):
        head = _fold_norm(
            state["head.1.weight"], state["head.1.bias"], state["head.0.running_mean"], state["head.0.running_var"]
        )
    ours = {f"encoder.{key}": value for key, value in encoder_state.items()}
    ours |= {f"fc_norm.{name}": state[f"{norm}.{name}"] for name in ("weight", "bias")}
    classes = len(head["weight"])
    ours |= {"head.weight": head["weight"], "head.bias": head.get("bias", torch.zeros(classes))}
    return ours, classifier_architecture(source, encoder, classes, hints, "token" if norm == "norm" else "avg", norm)


def classifier_architecture(
    source: str, encoder: EncoderArchitecture, classes: int, hints: Hints, pooling: Pooling, norm: str
) -> ClassifierArchitecture:
    """Return the architecture of a foreign classifier: what its file states, otherwise what is assumed.

    Args:
        source: names the file in errors.
        encoder: the classifier's.
        classes: number of outputs of the head.
        hints: get the assumptions: ImageNet's mean and std, and `pooling` after a norm that does not tell it.
        pooling: if the file does not state it.
        norm: the name of the norm before the head. After `fc_norm` is the average in all published files.

    Raises:
        UserError: if it states a pooling that our classifier lacks.
    """
    stated = hints.stated
    if stated.pooling == "avg" and norm == "norm":
        raise UserError(
            f"{source}: its head reads the average of normalized tokens ({stated.by}), which our classifier does not "
            "compute; expected fc_norm, or timm's own model (`addp robustness model=timm:<name> checkpoint=<file>`)"
        )
    if stated.pooling not in ("", "avg", "token"):
        raise UserError(f"{source}: its head reads global_pool={stated.pooling} ({stated.by}); expected avg or token")
    if stated.pooling:
        pooling = cast(Pooling, stated.pooling)
    elif norm == "norm":  # timm's ViTs that average after `norm` have the same tensors
        note = "does not store which tokens its head reads; took the class token after norm, as there is no fc_norm"
        hints.assumptions.append(Assumption("pooling", note))
    if stated.mean is not None and stated.std is not None:
        return ClassifierArchitecture(encoder, classes, pooling, "layer", (), stated.mean, stated.std, crop=stated.crop)
    mean, std = NORMALISATION["imagenet"]
    note = "does not store how its images were normalized; took ImageNet's mean and std"
    hints.assumptions.append(Assumption("normalisation", note, "normalisation=half takes 0.5"))
    return ClassifierArchitecture(encoder, classes, pooling, "layer", (), mean, std)


def _our_names(state: State) -> State:
    """Rename a ViT's tensors to ours, which are timm's for its plain ViT; convert BEiT's biases, scales and tables and
    CLIP's norm before the blocks.
    """
    renamed: State = {}
    for key, value in state.items():
        if key.endswith(("relative_position_index", ".k_bias", ".v_bias")):
            continue
        block, _, name = key.rpartition(".attn.")
        if name == "q_bias":  # BEiT's keys have no bias: it would shift all scores of a query alike
            biases = [value, torch.zeros_like(value), state[f"{block}.attn.v_bias"]]
            renamed[f"{block}.attn.qkv.bias"] = torch.cat(biases)
        elif name == "relative_position_bias_table":
            renamed[f"{block}.{RELATIVE_TABLE}"] = value
        elif key.startswith("norm_pre."):
            renamed[f"tokenizer_norm.{key.removeprefix('norm_pre.')}"] = value
        else:
            renamed[re.sub(r"\.gamma_([12])$", r".ls\1.gamma", key)] = value
    shared = renamed.pop("rel_pos_bias.relative_position_bias_table", None)
    if shared is not None:
        for key in (f"blocks.{i}.{RELATIVE_TABLE}" for i in range(depth_of(state, "blocks."))):
            renamed[key] = renamed[key] + shared if key in renamed else shared.clone()
    return renamed


# -------------------- ours -> timm


def timm_arguments(model: Classifier) -> dict[str, Any]:
    """Return the arguments that build timm's `VisionTransformer` for a classifier, or an encoder with 0 classes.

    Raises ValueError if the model has parts that timm's plain ViT lacks.
    """
    encoder = model.encoder
    if isinstance(encoder, TokenEncoder):
        raise ValueError("timm's ViTs read pixels, but this encoder reads tokens; addp export layout=onnx holds it")
    if encoder.attention != PLAIN_ATTENTION:
        found = "windows or relative positions"
        raise ValueError(f"timm's plain ViT lacks the {found} of this encoder; addp export layout=onnx holds them")
    config = encoder.config
    arguments = {
        "img_size": list(encoder.image_size),
        "patch_size": encoder.patch_size,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
        "global_pool": model.pooling,
        "fc_norm": True,
        "pre_norm": config.tokenizer_norm,
        "num_classes": model.num_classes,
    }
    if config.layer_scale:
        arguments["init_values"] = 1.0
    if model.norm == "batch":
        arguments["final_norm"] = model.feature_norm != "none"
        arguments["fc_norm"] = model.feature_norm != "pretrained"
    return arguments


def to_timm(model: Classifier) -> tuple[State, dict[str, Any]]:
    """Return a classifier (or, with 0 classes, an encoder with a new norm) as timm's `VisionTransformer`: its tensors
    and the arguments that build it.

    Raises ValueError like `timm_arguments`.
    """
    arguments = timm_arguments(model)
    state = {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}
    if model.norm == "batch":  # a fixed scale and shift, which the head absorbs
        if model.feature_norm == "layer":
            state |= {"fc_norm.weight": torch.ones(model.embed_dim), "fc_norm.bias": torch.zeros(model.embed_dim)}
        state |= {f"head.{name}": value.cpu() for name, value in fold_batch_norm(model).items()}
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            state.pop(f"fc_norm.{name}")
    renamed = {key.removeprefix("encoder."): value for key, value in state.items()}
    if model.feature_norm != "pretrained":
        renamed = {key: value for key, value in renamed.items() if not key.startswith("norm.")}
    if arguments["pre_norm"]:
        # timm has no bias on the patches before a norm
        renamed["pos_embed"][:, 1:] += renamed.pop("patch_embed.proj.bias")
        renamed = {re.sub(r"^tokenizer_norm\.", "norm_pre.", key): value for key, value in renamed.items()}
    return renamed, arguments


def fold_batch_norm(model: Classifier) -> dict[str, Tensor]:
    """Return weight and bias of the head of a linear probe with the batch norm before it."""
    head, norm = cast(nn.Linear, model.head), cast(nn.BatchNorm1d, model.fc_norm)
    mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    return _fold_norm(head.weight.detach(), head.bias.detach(), mean, variance, norm.eps)


def _fold_norm(
    weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, eps: float = LINEAR_PROBE_EPS
) -> dict[str, Tensor]:
    """Return weight and bias of a head that includes the batch norm without affine parameters before it."""
    weight = weight * (variance + eps).rsqrt()
    return {"weight": weight, "bias": bias - weight @ mean}
