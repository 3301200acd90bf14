"""The names of the backbone's tensors in state dicts, and whether a state dict is of the same architecture.

The module's parameters have the names of mmseg's BEiT (`layers.0...`); state dicts have those of an `Encoder` below the
prefix `encoder.`, as the files of every version do.
"""

import json
import math
from collections.abc import Collection, Mapping, MutableMapping
from typing import Any

from torch import nn

from addp_core.base.errors import UserError
from addp_core.networks.cnn import CnnEncoder
from addp_core.networks.encoder import METADATA_KEY, Encoder, TransformerEncoder
from addp_core.networks.token_encoder import TokenEncoder
from addp_core.weights.pretrained import has_cnn, has_encoder

PREFIX = "encoder."
_MODULE, _STORED = "layers.", "blocks."


def to_stored_names(_: nn.Module, state: Any, prefix: str, metadata: dict[str, Any]) -> None:
    """Rename the tensors of a backbone that `state_dict` collects: a hook for `register_state_dict_post_hook`."""
    for key in [key for key in state if key.startswith(prefix)]:
        name = key.removeprefix(prefix)
        name = _STORED + name.removeprefix(_MODULE) if name.startswith(_MODULE) else name
        state[prefix + PREFIX + name] = state.pop(key)
    state._metadata[prefix + PREFIX.rstrip(".")] = metadata


def from_stored_names(state: MutableMapping[str, Any], prefix: str) -> None:
    """Rename the tensors of a state dict, in place, to those of the module."""
    start = prefix + PREFIX
    for key in [key for key in state if key.startswith(start)]:
        name = key.removeprefix(start)
        name = _MODULE + name.removeprefix(_STORED) if name.startswith(_STORED) else name
        state[prefix + name] = state.pop(key)


def check_state(
    backbone: TransformerEncoder,
    state: Mapping[str, Any],
    prefix: str,
    metadata: Mapping[str, Any],
    unexpected: Collection[str] = (),
) -> None:
    """Raise UserError if a state dict has another backbone than the config; says in what they differ.

    mmengine loads what fits and logs the rest as a warning, after which a model without its layer scales, say, predicts
    something else.

    Args:
        state: with the names of the module; without any of the backbone's tensors, only `unexpected` is checked.
        prefix: of the backbone's tensors.
        metadata: what the state dict says about the backbone.
        unexpected: names in the whole state dict that no module takes.
    """
    found = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    expected = backbone.state_dict()
    from_stored_names(expected, "")
    if not found:
        if has_encoder(unexpected):
            raise _misplaced_encoder(prefix)
        return
    mine, theirs = describe(expected, backbone.config.heads), describe(found, stored_heads(metadata))
    differences = [
        f"{key}={theirs[key]} (the config: {mine[key]})"
        for key in mine
        if theirs[key] is not None and theirs[key] != mine[key]
    ]
    unfit = sorted(key for key in expected.keys() | found.keys() if shape(expected.get(key)) != shape(found.get(key)))
    if differences or unfit:
        reason = ", ".join(differences) or f"other tensors: {', '.join(unfit[:3])}"
        raise UserError(
            f"backbone: the checkpoint has {reason}; expected the arch, patch_size, img_size, relative, "
            "class_token and tokenizer_norm of its training"
        )


def check_cnn_state(
    encoder: CnnEncoder, state: Mapping[str, Any], prefix: str, unexpected: Collection[str] = ()
) -> None:
    """Raise UserError if a state dict has another CNN than the config, or one under other names.

    Args:
        state: with the names of the backbone; without any of its tensors, only `unexpected` is checked.
        prefix: of the backbone's tensors.
        unexpected: names in the whole state dict that no module takes.
    """
    start = prefix + PREFIX
    found = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
    if not found:
        if has_cnn(unexpected, encoder):
            raise _misplaced_encoder(prefix)
        return
    expected = encoder.state_dict()
    unfit = sorted(key for key in expected.keys() | found.keys() if shape(expected.get(key)) != shape(found.get(key)))
    if unfit:
        raise UserError(
            f"backbone: the checkpoint has other tensors: {', '.join(unfit[:3])}; expected the arch of its training, "
            f"found arch={encoder.config.arch!r}"
        )


def _misplaced_encoder(prefix: str) -> UserError:
    """Return the error for a pretrained encoder that is loaded as a segmentor."""
    return UserError(
        f"the checkpoint has an encoder under other names, and nothing under those of this backbone ({prefix}{PREFIX}"
        "...); expected it in the backbone's init_cfg=dict(type='Pretrained', checkpoint=<file>), with no load_from; "
        "`addp export layout=mmseg` writes a file that can be one"
    )


def shape(tensor: Any) -> tuple[int, ...] | None:
    """Return the shape of a tensor, or None."""
    return None if tensor is None else tuple(tensor.shape)


def stored_heads(metadata: Mapping[str, Any]) -> int | None:
    """Return the number of attention heads that a state dict's metadata tells, or None."""
    text = metadata.get(METADATA_KEY)
    if not isinstance(text, str):
        return None
    architecture = json.loads(text)["architecture"]
    return architecture["encoder" if "encoder" in architecture else "predictor"]["heads"]


def describe(state: Mapping[str, Any], heads: int | None) -> dict[str, Any]:
    """Return the arguments of the backbone that its tensors tell; None for those that they do not."""
    tables = [value for name, value in state.items() if name.endswith("relative_position_bias_table")]
    positions = state.get(Encoder.position_name, state.get(TokenEncoder.position_name))
    patches = state.get("patch_embed.proj.weight")
    layers = [int(name.split(".")[1]) for name in state if name.startswith(_MODULE)]
    patch_size = None if patches is None else patches.shape[-1]
    described = {
        "width": None if positions is None else positions.shape[-1],
        "depth": max(layers, default=-1) + 1 or None,
        "heads": tables[0].shape[-1] if tables else heads,
        "layer_scale": any(".ls1." in name for name in state),
        "patch_size": patch_size,
        "relative": "table" if tables else "none",
        "class_token": "cls_token" in state,
        "tokenizer_norm": "tokenizer_norm.weight" in state,
    }
    if positions is not None and patch_size is not None:
        patches_per_side = math.sqrt(positions.shape[-2] - 1)
        described["img_size"] = f"{patches_per_side * patch_size:g}"  # of square images, as everyone trains on
    return described
