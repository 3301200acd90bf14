"""The token predictor and its vocabulary."""

import torch
from tiny import BATCH, TOKENIZER, TOKENS, nested_masks

from addp_core.networks.layers import MaskPositions
from addp_core.networks.predictor import PredictorConfig, TokenPredictor
from addp_core.networks.tokenizer import Vocabulary


def test_predictor_ignores_unreliable_ids(model, images):
    ids, (mask, _) = model.tokenizer.encode(images), nested_masks()
    q = model.predictor(ids, mask)
    assert q.shape == (BATCH, TOKENS, TOKENIZER.codebook)
    torch.testing.assert_close(q.sum(-1), torch.ones(BATCH, TOKENS))
    scrambled = torch.where(mask, (ids + 7) % TOKENIZER.codebook, ids)
    assert torch.equal(model.predictor(scrambled, mask), q)
    assert not torch.equal(model.predictor(torch.where(mask, ids, (ids + 7) % TOKENIZER.codebook), mask), q)


def test_dropping_no_position_changes_nothing(model, images):
    ids, (mask, _) = model.tokenizer.encode(images), nested_masks()
    none_dropped = torch.zeros_like(mask)
    torch.testing.assert_close(model.predictor.logits(ids, mask, none_dropped), model.predictor.logits(ids, mask))
    dropped = nested_masks(t=10)[0]
    kept = MaskPositions.from_mask(dropped).visible
    assert model.predictor.encode(ids, kept).shape == (BATCH, 1 + TOKENS - 10, 16)


def test_published_vocabulary_and_embedding_sizes():
    assert Vocabulary(1024).size == 2025
    assert (Vocabulary(1024).class_id, Vocabulary(1024).mask_id) == (1100, 2024)
    with torch.device("meta"):
        predictor = TokenPredictor(PredictorConfig(), 256, Vocabulary(1024))
    assert predictor.token_emb.word_embeddings.weight.shape == (2025, 768)
