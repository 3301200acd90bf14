"""The keywords of mmseg's own backbones (VisionTransformer, BEiT, MAE; ResNet) as those of ours."""

from collections.abc import Mapping
from inspect import Parameter
from typing import Any

from addp_core.base.errors import UserError, did_you_mean

ARCH_SYNONYMS = {"embed_dims": "width", "num_layers": "depth", "num_heads": "heads"}  # also of mmpretrain's ViTs
SYNONYMS = {"with_cp": "checkpointing", "drop_path_rate": "drop_path", "with_cls_token": "class_token"}
PRETRAINED = "pretrained"  # what EncoderDecoder(pretrained=<file>) gives to its backbone
FIXED = {  # of every encoder, by the names of mmseg's ViTs
    "in_channels": 3,
    "mlp_ratio": 4,
    "qkv_bias": True,
    "num_fcs": 2,
    "drop_rate": 0.0,
    "attn_drop_rate": 0.0,
    "patch_norm": False,
    "final_norm": False,
    "norm_cfg": {"type": "LN", "eps": 1e-6},
    "act_cfg": {"type": "GELU"},
}
WITHOUT_EFFECT = ("norm_eval",)  # a LayerNorm has no running statistics
KNOWN = (*ARCH_SYNONYMS, *SYNONYMS, PRETRAINED, *FIXED, *WITHOUT_EFFECT)


def translate_keywords(
    keywords: Mapping[str, Any], options: Mapping[str, Any], parameters: Mapping[str, Parameter]
) -> dict[str, Any]:
    """Return `options`, our own arguments, with the values that the keywords of mmseg's ViTs give them.

    Args:
        keywords: arguments that are none of our own.
        options: our own arguments that they can stand for.
        parameters: all of our own.

    Raises:
        UserError: if a keyword is unknown, has a value that the encoder cannot have, or contradicts one of our own.
    """
    options, arch = dict(options), {}
    for name, value in keywords.items():
        if name in ARCH_SYNONYMS:
            arch[name] = value
        elif name in SYNONYMS or name == PRETRAINED:
            _use_synonym(name, value, options, parameters)
        elif name in FIXED:
            if value != FIXED[name]:
                raise UserError(f"{name}: found {value!r}, but the encoder has {FIXED[name]!r}; leave the keyword out")
        elif name not in WITHOUT_EFFECT:
            hint = did_you_mean(name, (*(key for key in parameters if key != "mmseg_keywords"), *KNOWN))
            raise UserError(f"{name}: AddpViT has no such keyword{hint or '; leave it out'}")
    if arch and options["arch"] is not None:
        raise UserError(f"{', '.join(arch)}: found arch too, which states the same; leave one of them out")
    return options | ({"arch": arch} if arch else {})


def translate_cnn_keywords(
    keywords: Mapping[str, Any], options: Mapping[str, Any], parameters: Mapping[str, Parameter]
) -> dict[str, Any]:
    """Return `options`, our own arguments, with the values that keywords of mmseg's CNNs give them.

    The arguments are those of `translate_keywords`. Raises UserError if a keyword is unknown or contradicts one of our
    own.
    """
    options = dict(options)
    for name, value in keywords.items():
        if SYNONYMS.get(name) not in options and name != PRETRAINED:
            known = [key for key in parameters if key != "mmseg_keywords"] + [*SYNONYMS, PRETRAINED]
            raise UserError(f"{name}: AddpCNN has no such keyword{did_you_mean(name, known) or '; leave it out'}")
        _use_synonym(name, value, options, parameters)
    return options


def _use_synonym(name: str, value: Any, options: dict[str, Any], parameters: Mapping[str, Parameter]) -> None:
    """Set the option that another name stands for. Raises UserError if it has another value already."""
    own = SYNONYMS.get(name, "init_cfg")
    value = {"type": "Pretrained", "checkpoint": value} if name == PRETRAINED and value else value
    if options[own] not in (parameters[own].default, value):
        raise UserError(f"{name}: found {own} too, which means the same; leave one of them out")
    options[own] = value


def pretrained_config(init_cfg: Any) -> dict[str, Any] | None:
    """Return an `init_cfg` that names a pretrained file, or None. Raises UserError if it asks for anything else."""
    if isinstance(init_cfg, list) and len(init_cfg) == 1:
        [init_cfg] = init_cfg
    if not init_cfg:
        return None
    if isinstance(init_cfg, Mapping) and init_cfg.keys() == {"type", "checkpoint"}:
        name = getattr(init_cfg["type"], "__name__", init_cfg["type"])
        if name in ("Pretrained", "PretrainedInit"):
            return {"type": "Pretrained", "checkpoint": init_cfg["checkpoint"]}
    found = dict(init_cfg) if isinstance(init_cfg, Mapping) else init_cfg
    raise UserError(f"init_cfg: found {found!r}, expected dict(type='Pretrained', checkpoint=<file>)")
