"""The encoder over token ids as a backbone of MMSegmentation. Registers `AddpTokenViT` in MODELS."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from mmengine.model import BaseModule
from mmseg.registry import MODELS

from addp_core.base.errors import UserError
from addp_core.networks.predictor import PredictorConfig
from addp_core.networks.token_encoder import TokenEncoder, TokenEncoderArchitecture
from addp_core.networks.tokenizer import TokenizerConfig, Vocabulary
from addp_core.weights.architectures import NORMALISATION, Normalisation
from addp_core.weights.encoders import load_encoder
from seg.architecture import check_tokens, read_arch, token_line
from seg.backbone import MmsegBackbone, global_attention, named_as_beit
from seg.keywords import pretrained_config, translate_keywords
from seg.state_names import PREFIX

Config = TypeVar("Config")


@named_as_beit
@MODELS.register_module()
class AddpTokenViT(MmsegBackbone, TokenEncoder, BaseModule):
    """A frozen tokenizer and the encoder over its ids as a backbone: the feature maps after the blocks `out_indices`.

    The config states the architecture of both, as that of `AddpViT` does; state dicts hold the tokenizer too. As in
    mmengine, `init_weights` loads the pretrained file.

    Args:
        arch: the name of a size, or a dict of width, depth and heads.
        tokenizer: the keys of `TokenizerConfig`: width, multipliers, blocks, codebook, dim, groups.
        vocabulary: the keys of `Vocabulary`; by default that of published files over the tokenizer's codebook.
        normalisation: of the images, by data_preprocessor: imagenet or half. The tokenizer needs it undone.
        init: "random" takes from the file of `init_cfg` the tokenizer alone.
        tokenizer_source: the VQGAN, if neither the file of `init_cfg` contains it nor its run names it.
        init_cfg: dict(type="Pretrained", checkpoint=...) with a MAGE checkpoint or another one over token ids; with
            init="random" also the name of a size. None for random weights, the tokenizer's included.
        img_size, out_indices, relative, class_token, dropout, drop_path, encoder_heads, weights, checkpointing,
            frozen_stages, mmseg_keywords: as in `AddpViT`.

    Raises:
        UserError: if the architecture is missing or impossible, or a keyword unknown; `init_weights` and loading of a
            state dict, if the file is of another architecture.
    """

    def __init__(
        self,
        arch: str | dict[str, Any] | None = None,
        tokenizer: dict[str, Any] | None = None,
        vocabulary: dict[str, Any] | None = None,
        img_size: int | tuple[int, int] = 512,
        out_indices: int | Sequence[int] | None = None,
        relative: Literal["none", "table"] = "table",
        class_token: bool = True,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        normalisation: Normalisation = "imagenet",
        init: Literal["pretrained", "random"] = "pretrained",
        tokenizer_source: str = "",
        encoder_heads: int | None = None,
        weights: str = "",
        checkpointing: bool = False,
        init_cfg: dict[str, Any] | None = None,
        frozen_stages: int = -1,
        **mmseg_keywords: Any,
    ):
        options: dict[str, Any] = {"arch": arch, "class_token": class_token, "drop_path": drop_path}
        options |= {"checkpointing": checkpointing, "init_cfg": init_cfg}
        options = translate_keywords(mmseg_keywords, options, inspect.signature(AddpTokenViT).parameters)
        pretrained = pretrained_config(options["init_cfg"])
        source: dict[str, Any] = {"encoder_heads": encoder_heads, "weights": weights, "init": init}
        source["tokenizer"] = tokenizer_source or None
        size = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])
        if options["arch"] is None or tokenizer is None:
            raise _demand_architecture(pretrained, size, source)
        config = read_arch(options["arch"])
        codes = _read_node("tokenizer", TokenizerConfig, tokenizer)
        ids = Vocabulary(codes.codebook) if vocabulary is None else _read_node("vocabulary", Vocabulary, vocabulary)
        if ids.codebook != codes.codebook:
            raise UserError(f"vocabulary: found codebook={ids.codebook}, expected the tokenizer's {codes.codebook}")
        mage = PredictorConfig(config.width, config.depth, config.heads, decoder_heads=config.heads, dropout=dropout)
        attention = global_attention(relative, options["class_token"])
        super().__init__(
            mage,
            ids,
            codes,
            size,
            options["drop_path"],
            *NORMALISATION[normalisation],
            attention=attention,
            dynamic=True,
        )
        self.init_cfg, self.normalisation, self.source_options = pretrained, normalisation, source
        self._become_backbone(options["checkpointing"], out_indices, frozen_stages)

    def _load_pretrained(self, source: str) -> None:
        """Copy the weights of a file, or with init="random" those of its tokenizer.

        Raises UserError if it does not fit the config.
        """
        encoder = _load_token_encoder(
            source,
            self.image_size,
            attention=self.attention,
            dynamic=True,
            normalisation=self.normalisation,
            **self.source_options,
        )
        check_tokens(self.architecture, encoder.architecture, source)
        if self.source_options["init"] == "random":
            self.tokenizer.load_state_dict(encoder.tokenizer.state_dict())
        else:
            self.load_state_dict({PREFIX + name: value for name, value in encoder.state_dict().items()})


def _read_node(name: str, cls: type[Config], values: Mapping[str, Any]) -> Config:
    """Return the dataclass that a part of a config describes. Raises UserError if it has other keys or values."""
    try:
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: {error}") from error


def _load_token_encoder(source: str, size: tuple[int, int], **options: Any) -> TokenEncoder:
    """Load an encoder over token ids. Raises UserError if the source has another one."""
    encoder = load_encoder(source, size, input="token", **options)
    assert isinstance(encoder, TokenEncoder)  # as demanded
    return encoder


def _demand_architecture(
    init_cfg: Mapping[str, Any] | None, size: tuple[int, int], options: dict[str, Any]
) -> UserError:
    """Return the error for a config without an architecture, with the lines that its pretrained file asks for."""
    example = TokenEncoderArchitecture(PredictorConfig(), Vocabulary(TokenizerConfig.codebook), TokenizerConfig(), size)
    if init_cfg is None:
        return UserError(f"arch, tokenizer: not given, expected both, such as {token_line(example)}")
    source = init_cfg["checkpoint"]
    with torch.random.fork_rng(devices=[]):
        found = _load_token_encoder(source, size, **{**options, "init": "random"}).architecture
    return UserError(f"arch, tokenizer: not given, expected {token_line(found)}, which is what {source} has")
