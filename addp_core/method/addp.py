"""ADDP: Alternating Denoising Diffusion Process (arXiv 2306.05423, ICLR 2024), the model and its training loss.

A training step (Sec. 3.3): tokenize the image; draw which ids are unreliable; let the frozen token predictor guess
them; decode the mixture of ids and guesses into a noisy image; from this image and the reliable ids, predict the
distribution of the unreliable ids.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from addp_core.method.config import ADDPConfig as ADDPConfig
from addp_core.method.config import DenoiserConfig as DenoiserConfig
from addp_core.method.config import check_ids_to as check_ids_to
from addp_core.method.diffusion import (
    InputRows,
    draw_input_rows,
    draw_masks,
    map_tokens,
    soft_cross_entropy,
    training_target,
)
from addp_core.networks.cnn import CnnConfig, CnnGridEncoder
from addp_core.networks.decoder import TokenDecoder
from addp_core.networks.encoder import Encoder
from addp_core.networks.layers import MaskPositions, count_visible, gather_tokens, normal_parameter
from addp_core.networks.predictor import TokenPredictor
from addp_core.networks.tokenizer import Tokenizer, to_feature_map


@dataclass(frozen=True)
class CorruptedBatch:
    """Training examples of the denoiser: unclamped noisy images Float[B,3,H,W] and their targets Float[B,N,K]."""

    images: Tensor
    target: Tensor


class Denoiser(nn.Module):
    """The trained part: an encoder over noisy pixels and a decoder over ids."""

    mean: Tensor
    std: Tensor
    compiled = False  # compute only: whether torch.compile has compiled this module

    def __init__(self, config: ADDPConfig):
        super().__init__()
        width, ids_to = config.denoiser.encoder.width, config.process.ids_to
        self.label_smoothing = config.process.label_smoothing
        self.encoder = _build_encoder(config)
        self.decoder = TokenDecoder(
            config.denoiser.decoder, width, config.tokens, config.vocabulary, append_ids=ids_to != "none"
        )
        if ids_to == "encoder+decoder":
            self.pos_token_embed = normal_parameter(1, 1 + config.tokens, width)  # positions of the encoder's ids
        for name, value in (("mean", IMAGENET_DEFAULT_MEAN), ("std", IMAGENET_DEFAULT_STD)):
            self.register_buffer(name, torch.tensor(value).view(1, 3, 1, 1), persistent=False)

    def forward(
        self,
        images: Tensor,
        ids: Tensor,
        mask: Tensor,
        target: Tensor | None = None,
        vocabulary: int | None = None,
        masked_only: bool = False,
        positions: MaskPositions | None = None,
    ) -> Tensor:
        """Return the logits of all positions, Float[B,N,V'], or the scalar loss if there is a target.

        Args:
            images: noisy images before clamping, Float[B,3,H,W].
            ids: Long[B,N].
            mask: Bool[B,N], True = unreliable.
            target: Float[B,N,K]; the loss is computed at the unreliable positions only.
            vocabulary: compute the logits of the first `vocabulary` ids only (default: all).
            masked_only: return the logits of the unreliable positions only, Float[R,V'] in row-major order.
            positions: those of the mask, if the caller has computed them.
        """
        positions = positions or MaskPositions.from_mask(mask)
        features = self.encode(images, ids, mask, positions, visible_only=True)
        masked_only = masked_only or target is not None
        logits = self.decoder(features, ids, mask, masked_only, vocabulary, positions)
        if target is None:
            return logits
        target = positions.unpad_masked(gather_tokens(target, positions.masked))
        return soft_cross_entropy(logits, target, self.label_smoothing).mean()

    def encode(
        self,
        images: Tensor,
        ids: Tensor,
        mask: Tensor,
        positions: MaskPositions | None = None,
        visible_only: bool = False,
    ) -> Tensor:
        """Encode the noisy images, Float[B,3,H,W] -> Float[B,1+N,W] after the final norm, class token first.

        A CNN has no class token, which the decoder does not read: Float[B,N,W].

        Args:
            positions: those of the mask, if the caller has computed them.
            visible_only: return the features of the reliable positions in order, Float[B,E,W], which are all that the
                decoder reads.
        """
        positions, extra = positions or MaskPositions.from_mask(mask), None
        if isinstance(self.encoder, CnnGridEncoder):
            return self.encoder(self.normalize(images), positions.visible if visible_only else None)
        if hasattr(self, "pos_token_embed"):
            visible_ids = ids.gather(1, positions.visible)
            if positions.visible_valid is not None:
                # Rows with fewer reliable ids than the fullest row are padded with the mask id, which says nothing.
                visible_ids = visible_ids.masked_fill(~positions.visible_valid, self.decoder.vocabulary.mask_id)
            extra = self.decoder.token_emb(visible_ids) + self.pos_token_embed[0, 1:][positions.visible]
        return self.encoder(self.normalize(images), extra, positions.visible if visible_only else None)

    def normalize(self, images: Tensor) -> Tensor:
        """Clamp images Float[B,3,H,W] to [0,1] and normalize them by ImageNet's mean and standard deviation."""
        return (images.clamp(0, 1) - self.mean) / self.std


def _build_encoder(config: ADDPConfig) -> Encoder | CnnGridEncoder:
    encoder = config.denoiser.encoder
    if isinstance(encoder, CnnConfig):
        return CnnGridEncoder(encoder, config.image_size, config.grid)
    return Encoder(encoder, config.image_size, config.tokenizer.stride)


class ADDP(nn.Module):
    """The frozen tokenizer and token predictor, and the denoiser."""

    reads_images: ClassVar[bool] = True

    def __init__(self, config: ADDPConfig):
        super().__init__()
        self.config = config
        self.tokenizer = Tokenizer(config.tokenizer, config.grid)
        self.predictor = (
            TokenPredictor(config.predictor, config.tokens, config.vocabulary) if config.predictor else None
        )
        self.denoiser = Denoiser(config)
        for part in self._frozen_parts():
            part.requires_grad_(False)

    def _frozen_parts(self) -> list[nn.Module]:
        return [part for part in (self.tokenizer, self.predictor) if part is not None]

    def train(self, mode: bool = True) -> "ADDP":
        """Set the mode of the denoiser only: frozen parts stay in eval mode, as the paper says.

        (The published code turns on the predictor's dropout.)
        """
        super().train(mode)
        for part in self._frozen_parts():
            part.eval()
        return self

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Draw a step and return its loss: images Float[B,3,H,W] in [0,1] -> {"loss": scalar}.

        generator: on the CPU (default: one seeded from torch's global state).
        """
        generator = generator or torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        masks = draw_masks(self.config.process, len(images), self.config.tokens, generator)
        rows = draw_input_rows(self.config.process, len(images), generator)
        return {"loss": self.training_loss(self.denoiser, images, *masks, rows)}

    def training_loss(
        self, denoiser: nn.Module, images: Tensor, mask: Tensor, next_mask: Tensor, rows: InputRows | None = None
    ) -> Tensor:
        """Return the loss of one step (Sec. 3.3), a scalar.

        Args:
            denoiser: the model's own, as it may be wrapped for training.
            images: Float[B,3,H,W] in [0,1].
            mask, next_mask: Bool[B,N] on the CPU, True = unreliable at t and at the later step.
            rows: the images that are corrupted in another way, on the CPU.
        """
        return self.loss_of_ids(denoiser, self.encode_images(images), mask, next_mask, rows, images)

    def loss_of_ids(
        self,
        denoiser: nn.Module,
        ids: Tensor,
        mask: Tensor,
        next_mask: Tensor,
        rows: InputRows | None = None,
        images: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of one step as `training_loss` does, for images whose ids Long[B,N] are known.

        images: needed for rows that keep their own pixels.
        """
        counts, next_counts = count_visible(mask), count_visible(next_mask)
        mask, next_mask = (each.to(ids.device, non_blocking=True) for each in (mask, next_mask))
        if rows is not None:
            rows = InputRows(*(each.to(ids.device, non_blocking=True) for each in rows))
        corrupted = self.corrupt(ids, mask, next_mask, (counts, next_counts), rows, images)
        positions = MaskPositions.from_mask(mask, counts, self.denoiser.compiled)
        return denoiser(corrupted.images, ids, mask, corrupted.target, positions=positions)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Return z_0, the ids of the images: Float[B,3,H,W] in [0,1] -> Long[B,N]."""
        return self.tokenizer.encode(images)

    @torch.no_grad()
    def corrupt(
        self,
        ids: Tensor,
        mask: Tensor,
        next_mask: Tensor,
        counts: tuple[Sequence[int], Sequence[int]] | None = None,
        rows: InputRows | None = None,
        natural: Tensor | None = None,
    ) -> CorruptedBatch:
        """Return the noisy images x_t and their targets (Eq. 4-6).

        Args:
            ids: Long[B,N].
            mask, next_mask: Bool[B,N], True = unreliable at t and at the later step.
            counts: the number of reliable ids in each row of both masks, if the host knows them
                (`MaskPositions.from_mask`).
            rows: images that are corrupted in another way.
            natural: the images, Float[B,3,H,W] in [0,1], if some of these rows keep their own pixels.

        Raises ValueError if the model was loaded without a token predictor.
        """
        if self.predictor is None:
            raise ValueError(
                "corrupting images needs a token predictor, which this model was loaded without: "
                "load it with predictor=<file>"
            )
        process, codebook = self.config.process, self.tokenizer.quantize.embedding.weight
        both = process.condition == "z_t+1"
        all_ids, masks = (torch.cat([ids, ids]), torch.cat([next_mask, mask])) if both else (ids, mask)
        known = counts and ([*counts[1], *counts[0]] if both else counts[0])
        positions = MaskPositions.from_mask(masks, known, self.predictor.compiled)
        probabilities = self.predictor(all_ids, masks, positions.visible)
        guess, posterior = probabilities.chunk(2) if both else (probabilities, probabilities)
        mixed = mask if rows is None else mask & ~rows.clean[:, None]
        images = self.render(map_tokens(guess, codebook, process.mapping), ids, mixed)
        if rows is not None and natural is not None:
            kept = (rows.natural[:, None] & ~mask).unflatten(1, self.config.grid)
            stride = self.config.tokenizer.stride
            kept = kept.repeat_interleave(stride, 1).repeat_interleave(stride, 2)
            images = torch.where(kept.unsqueeze(1), natural, images)
        return CorruptedBatch(images, training_target(posterior, ids, process.target))

    def render(self, embeddings: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Decode a mixture into unclamped images, Float[B,3,H,W].

        embeddings: Float[B,N,D], used where the mask Bool[B,N] is True. ids: Long[B,N], used elsewhere.
        """
        codes = self.tokenizer.quantize.embedding(ids)
        mixed = torch.where(mask.unsqueeze(-1), embeddings.to(codes.dtype), codes)
        return self.tokenizer.decode(to_feature_map(mixed, self.config.grid))

    @torch.no_grad()
    def next_probabilities(self, images: Tensor, ids: Tensor, mask: Tensor, masked: Sequence[int]) -> Tensor:
        """Return the distribution over the codebook at the unreliable positions, Float[B,N,K]; elsewhere undefined.

        Args:
            images: before clamping, Float[B,3,H,W]; not read while all ids are unreliable.
            ids: Long[B,N].
            mask: Bool[B,N], True where the id is unreliable.
            masked: how many ids of each image are, so that the host need not ask the device.
        """
        (batch, tokens), codes = mask.shape, self.config.tokenizer.codebook
        if min(masked) == tokens:
            # If nothing is known, the decoder ignores the encoder's output, and all images get the same distribution.
            positions = MaskPositions.from_mask(mask[:1], [0])
            logits = self.denoiser.decoder(None, ids[:1], mask[:1], vocabulary=codes, positions=positions)
            return logits.float().softmax(-1).expand(batch, -1, -1)
        visible = [tokens - count for count in masked]
        positions = MaskPositions.from_mask(mask, visible, self.denoiser.compiled)
        masked_logits = self.denoiser(images, ids, mask, vocabulary=codes, masked_only=True, positions=positions)
        return positions.scatter_masked(masked_logits, tokens).float().softmax(-1)

    def masked_after(self, share: float, masked: int) -> int:
        """Return how many ids a step leaves unreliable: this share of all, rounded up, at least one."""
        return min(max(math.ceil(self.config.tokens * share), 1), self.config.tokens)

    def logits(self, images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Return logits Float[B,N,V] for images before clamping Float[B,3,H,W], ids Long[B,N] and mask Bool[B,N]."""
        return self.denoiser(images, ids, mask)

    def loss(self, logits: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """Return the soft cross-entropy in nats over all V classes at the unreliable positions (Eq. 7), a scalar."""
        return soft_cross_entropy(logits[mask], target[mask], self.config.process.label_smoothing).mean()
