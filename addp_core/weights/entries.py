"""Which of the models in a checkpoint to read: its entries (`model`, `model_ema`), and prefixes of tensors' names."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from addp_core.base.errors import UserError
from addp_core.networks.encoder import METADATA_KEY
from addp_core.weights.assumptions import Assumption

State = dict[str, Tensor]

ENTRIES = (  # under which checkpoints keep a model; the first that a file has is read
    "model",
    "state_dict",
    "module",
    "model_state_dict",
    "teacher",  # DINO's average of the student, which its authors evaluate
    "model_ema",
    "state_dict_ema",
    "ema",
    "student",
)
PREFIXES = ("model", "base_encoder", "encoder_q", "teacher", "encoder")  # of several models, the first is read
AVERAGE = re.compile(r"(^|_)(ema|teacher|momentum|encoder_k|target)(_|$)")  # names of averages of weights
EMA_HOOK_RAW = "ema_state_dict"  # mmengine's EMAHook stores the average in state_dict, and here the weights without it
WRAPPERS = re.compile(r"^(module\.)+|(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
INPUTS = ("patch_embed.proj.weight", "token_emb.word_embeddings.weight")  # of encoders that describe themselves
SIGNATURES = re.compile(  # one tensor of each kind of model
    r"(?:^|\.)(patch_embed\.proj\.weight|token_emb\.word_embeddings\.weight|quantize\.embedding\.weight"
    r"|decoder_pos_token_embed|denoiser\.encoder\.cls_token|layer4\.0\.conv1\.weight)$"
)


class Entry(NamedTuple):
    """The state dict of a checkpoint."""

    state: State  # without the prefixes of DDP, FSDP and torch.compile
    descriptions: dict[str, str]  # of modules that describe themselves, by the prefix of their tensors; JSON
    entries: tuple[str, ...]  # of the checkpoint that hold tensors
    wanted: str  # the model that the caller named, if it is no entry (it may be a prefix)
    assumptions: tuple[Assumption, ...]


def select_entry(source: str, content: Mapping[str, Any], wanted: str) -> Entry:
    """Find the state dict in a checkpoint: one of its entries, or the checkpoint itself.

    Args:
        source: names the file in errors.
        content: the checkpoint.
        wanted: the name of an entry, "ema" for the average whatever its name, or "" for the first of `ENTRIES`.

    Raises:
        UserError: if there is no state dict, or several among which only the caller can choose.
    """
    entries = {key: value for key, value in content.items() if _has_tensors(value)}
    swapped = EMA_HOOK_RAW in entries and "message_hub" in content
    wanted = "state_dict" if swapped and wanted == "ema" else wanted
    name = _match(wanted, entries) if wanted else next((key for key in ENTRIES if key in entries), None)
    assumptions: tuple[Assumption, ...] = ()
    others = [key for key in entries if key != name and (key in ENTRIES or AVERAGE.search(key))]
    if name is not None and not wanted and others:
        note = f"holds {name} and {', '.join(others)}; took {name}"
        note += ", the average" if swapped else ""
        assumptions = (Assumption("weights", note, f"weights={others[0]} takes the other"),)
    if name is None and wanted:
        name = next((key for key in ENTRIES if key in entries), None)
    else:
        wanted = ""
    if name is None and not _has_tensors(content):
        name = _only_entry(source, content, entries)
        assumptions = (Assumption("weights", f"took its entry {name}"),)
    inner = content if name is None else entries[name]
    state = {WRAPPERS.sub("", key): value for key, value in inner.items() if isinstance(value, Tensor)}
    return Entry(state, describe_modules(inner), tuple(entries), wanted, assumptions)


def describe_modules(state: Mapping[str, Any]) -> dict[str, str]:
    """Return what the modules of a state dict say about themselves in its metadata, by the prefix of their tensors."""
    modules = {f"{name}." if name else "": values for name, values in getattr(state, "_metadata", {}).items()}
    return {
        WRAPPERS.sub("", prefix): text
        for prefix, metadata in modules.items()
        if isinstance(metadata, Mapping) and isinstance(text := metadata.get(METADATA_KEY), str)
        if any(prefix + name in state for name in INPUTS)  # not a module of another framework that renames its tensors
        or any(key.startswith(f"{prefix}body.") for key in state)  # a CNN
    }


def select_prefix(
    source: str,
    state: State,
    wanted: str,
    is_model: Callable[[State], bool],
    entries: Iterable[str] = (),
    within: str = "",
) -> tuple[str, tuple[Assumption, ...]]:
    """Find the prefix below which the tensors are one whole model; "" if they are one without it, or none is.

    Args:
        source: names the file in errors.
        state: the tensors.
        wanted: a part of the prefix, "ema" for the average whatever its name, or "" for the first of `PREFIXES`.
        is_model: recognizes the tensors of a model.
        entries: of the file, which could be wanted instead.
        within: with which the prefix begins.

    Raises:
        UserError: if there are several, among which only the caller can choose, or none under `wanted`.
    """
    if not wanted and not within and is_model(state):
        return "", ()
    prefixes = [prefix for prefix in _whole_models(state, is_model) if prefix.startswith(within)]
    if wanted:
        found = [prefix for prefix in prefixes if _match(wanted, prefix.split("."))]
        if len(found) != 1:
            names = " or ".join((*entries, *(prefix.rstrip(".") for prefix in prefixes))) or "the key left out"
            raise UserError(
                f"weights={wanted}: {source} has {'several models' if found else 'no model'} of that name; expected "
                f"{names}"
            )
        prefixes = found
    if not prefixes:
        return "", ()
    preferred = [prefix for name in PREFIXES for prefix in prefixes if name in prefix.split(".")]
    if len(prefixes) > 1 and not preferred:
        raise UserError(
            f"{source}: holds several models, under {', '.join(prefixes)}; expected weights=<one of these names>"
        )
    prefix = (preferred or prefixes)[0]
    left = sorted({key.split(".")[0] + "." for key in state if not key.startswith(prefix)})
    if not left or wanted:
        return prefix, ()
    others = [other for other in prefixes if other != prefix]
    differing = [name for other in others[:1] for name in other.split(".")[:-1] if name not in prefix.split(".")]
    override = f"weights={differing[0]} takes another model" if differing else ""
    note = f"took the model under '{prefix}' and left out the tensors under {', '.join(left[:5])}"
    return prefix, (Assumption("weights", note, override),)


def without_tensors(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a checkpoint that hold no tensors."""
    return {key: value for key, value in content.items() if next(_paths({key: value}), None) is None}


def _whole_models(state: State, is_model: Callable[[State], bool]) -> list[str]:
    """Return the outermost prefixes, with their last dot, below which the tensors are a whole model."""
    candidates = {key[: match.start(1)] for key in state if (match := SIGNATURES.search(key))} - {""}
    found: list[str] = []
    for prefix in sorted(candidates, key=lambda prefix: (len(prefix), prefix)):
        below = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if not prefix.startswith(tuple(found)) and is_model(below):
            found.append(prefix)
    return found


def _match(wanted: str, names: Any) -> str | None:
    """Return the name that is wanted; "ema" is any name of an average."""
    exact = next((name for name in names if name == wanted), None)
    if exact is None and wanted == "ema":
        return next((name for name in names if AVERAGE.search(name)), None)
    return exact


def _only_entry(source: str, content: Mapping[str, Any], entries: Mapping[str, Any]) -> str:
    """Return the one entry with tensors of a checkpoint without a usual one. Raises UserError if there is not one."""
    if len(entries) == 1:
        return next(iter(entries))
    if entries:
        raise UserError(
            f"{source}: holds tensors under {', '.join(entries)}; expected one of these names: weights=<name>"
        )
    names = ", ".join(map(str, list(content)[:6])) or "none"
    if (path := next(_paths(content), None)) is not None:
        raise UserError(
            f"{source}: found no model, only tensors under {path} (entries: {names}); expected them under model or "
            "state_dict"
        )
    raise UserError(f"{source}: no tensors in it (entries: {names}); expected a checkpoint")


def _has_tensors(value: Any) -> bool:
    """Check whether a value is a mapping of names to values of which some are tensors."""
    return isinstance(value, Mapping) and any(
        isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in value.items()
    )


def _paths(content: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield where tensors are in nested mappings: "a.b" for content["a"]["b"]["weight"]."""
    for key, value in content.items():
        if isinstance(value, Tensor):
            yield ".".join(path)
        elif isinstance(value, Mapping):
            yield from _paths(value, (*path, str(key)))
