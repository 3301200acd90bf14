"""Our own names without the architecture that our files store, such as `model.state_dict()`."""

from addp_core.base.errors import UserError
from addp_core.method.addp import ADDPConfig
from addp_core.weights.assumptions import Hints
from addp_core.weights.files import State
from addp_core.weights.layouts.published import convert_addp, published_name
from addp_core.weights.layouts.shapes import has_tensors

is_our_addp = has_tensors("denoiser.encoder.cls_token", "denoiser.decoder.token_emb.weight")


def convert_our_addp(source: str, state: State, hints: Hints) -> tuple[State, ADDPConfig]:
    """Convert the state dict of an ADDP by way of its published names. Raises UserError if it has other options."""
    if "denoiser.pos_token_embed" in state or "denoiser.decoder.decoder_pos_token_embed" not in state:
        raise UserError(f"{source}: tensors alone do not determine process.ids_to; save the model with save_model")
    return convert_addp(source, {published_name(key): value for key, value in state.items()}, hints)
