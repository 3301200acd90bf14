"""What the reader assumes about a file where its tensors do not tell, and the heads of published ViTs."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from addp_core.base.errors import UserError
from addp_core.base.launch import rank
from addp_core.weights.stated import Stated

log = logging.getLogger("addp")

HEAD_WIDTH = 64  # of most published ViTs
DECODER_HEADS = 16  # of every published decoder
DECODER_WIDTHS = (768, 1024)  # of published decoders and predictors
KNOWN_HEADS: dict[int, tuple[int, ...]] = {  # width: attention heads of published ViTs, the most usual first
    192: (3,),  # tiny: DeiT, timm
    256: (4,),
    320: (5,),
    384: (6, 12),  # small: DeiT, DINO, iBOT, timm; MoCo v3
    512: (8,),  # medium: DeiT III, timm
    640: (10,),
    768: (12,),  # base
    832: (13,),
    896: (14,),
    1024: (16,),  # large
    1152: (16,),  # So400m
    1280: (16,),  # huge: MAE, DeiT III, CLIP
    1408: (16,),  # giant: EVA, timm
    1536: (24, 16),  # giant: DINOv2; SigLIP
    1664: (16,),  # gigantic: CLIP
    1792: (16,),  # enormous: EVA
}
MOCO_V3 = ("base_encoder", "momentum_encoder")  # prefixes of its files, whose ViT-S has the second number of heads


@dataclass(frozen=True)
class Assumption:
    """One fact that a file's tensors do not tell."""

    key: str  # that chooses otherwise
    note: str  # what was found and what was taken, said if the caller uses it
    override: str = ""  # how to choose otherwise
    demand: str = ""  # what was found and what is expected, if nothing speaks for what was taken


@dataclass
class Hints:
    """What the caller knows about a file, and what the reader assumes beyond it."""

    heads: Mapping[str, int]  # by the keys of HEAD_KEYS
    image_size: tuple[int, int] | None = None  # asked for: (height, width)
    prefix: str = ""  # below which the tensors were found
    assumptions: list[Assumption] = field(default_factory=list)
    stated: Stated = field(default_factory=Stated)  # by the file, beside its tensors
    described: Mapping[str, Any] = field(default_factory=dict)
    """Architectures of modules that describe themselves, by the prefix of their tensors."""

    def heads_for(self, key: str, width: int) -> int:
        """Return the number of attention heads: the caller's, the file's, or that of published ViTs of this width."""
        if key in self.heads:
            return self.heads[key]
        if key == "encoder_heads" and self.stated.heads is not None:
            return self.stated.heads
        known = KNOWN_HEADS.get(width, ())
        if width == 384 and any(name in self.prefix.split(".") for name in MOCO_V3):
            known = known[::-1]
        if not known:
            heads = max(width // HEAD_WIDTH, 1)
            heads = 1 if width % heads else heads
            found = f"no published ViT has width {width}, and tensors do not tell the number of attention heads"
            self.assumptions.append(
                Assumption(key, f"{found}; took {heads}", f"{key} overrides this", f"{found}; expected {key}=<number>")
            )
            return heads
        if len(known) > 1:
            found = f"ViTs of width {width} have {known[0]} or {known[1]} attention heads, which tensors do not tell"
            self.assumptions.append(Assumption(key, f"{found}; took {known[0]}", f"{key}={known[1]} overrides this"))
        return known[0]

    def decoder_heads_for(self, key: str, width: int) -> int:
        """Return the number of attention heads of a decoder: the caller's, or that of all published ones."""
        if key not in self.heads and width not in DECODER_WIDTHS:
            found = f"no published decoder has width {width}, and tensors do not tell the number of attention heads"
            self.assumptions.append(Assumption(key, f"{found}; took {DECODER_HEADS}", f"{key} overrides this"))
        return self.heads.get(key, DECODER_HEADS)


def settle(
    source: str,
    assumptions: Iterable[Assumption],
    used: Iterable[str],
    demanded: Iterable[str] = (),
    fixed: Iterable[str] = (),
) -> None:
    """Say what was assumed about a file, once for each process group.

    Args:
        source: names the file.
        assumptions: those of the file.
        used: keys of the facts on which the caller's result depends; the others are not said.
        demanded: those that the caller has to know if nothing speaks for what was taken.
        fixed: those that the caller has no argument for.

    Raises:
        UserError: if such a fact is not known; names the key that tells it.
    """
    relevant = [assumption for assumption in assumptions if assumption.key in used]
    for assumption in relevant:
        if assumption.demand and assumption.key in demanded:
            raise UserError(f"{source}: {assumption.demand}")
    if rank() == 0:
        for assumption in relevant:
            choice = f" ({assumption.override})" if assumption.override and assumption.key not in fixed else ""
            log.warning("%s: %s%s", source, assumption.note, choice)
