"""Our own names without the architecture that our files store, such as `model.state_dict()`."""

from addp_core.base.errors import UserError
from addp_core.method.addp import ADDPConfig
from addp_core.weights.architectures import ClassifierArchitecture, EncoderArchitecture
from addp_core.weights.assumptions import Hints
from addp_core.weights.files import State, strip_prefix
from addp_core.weights.layouts.published import convert_addp, published_name
from addp_core.weights.layouts.shapes import has_tensors
from addp_core.weights.layouts.vit import classifier_architecture, convert_vit_encoder

is_our_addp = has_tensors("denoiser.encoder.cls_token", "denoiser.decoder.token_emb.weight")
is_our_classifier = has_tensors("encoder.patch_embed.proj.weight", "fc_norm.weight", "head.weight")


def convert_our_addp(source: str, state: State, hints: Hints) -> tuple[State, ADDPConfig]:
    """Convert the state dict of an ADDP by way of its published names. Raises UserError if it has other options."""
    if "denoiser.pos_token_embed" in state or "denoiser.decoder.decoder_pos_token_embed" not in state:
        raise UserError(f"{source}: tensors alone do not determine process.ids_to; save the model with save_model")
    return convert_addp(source, {published_name(key): value for key, value in state.items()}, hints)


def convert_our_classifier(source: str, state: State, hints: Hints) -> tuple[State, ClassifierArchitecture]:
    """Convert the state dict of a `Classifier` with a layer norm before its head."""
    tensors = strip_prefix(state, "encoder.")
    architecture: EncoderArchitecture | None = hints.described.get("encoder.")
    if architecture is None:
        tensors, architecture = convert_vit_encoder(source, tensors, hints)
    rest = {key: value for key, value in state.items() if not key.startswith("encoder.")}
    ours = {f"encoder.{key}": value for key, value in tensors.items()} | rest
    return ours, classifier_architecture(source, architecture, len(state["head.weight"]), hints, "avg", "fc_norm")
