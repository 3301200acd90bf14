"""Pretraining in three stages: tokenizer, token predictor, ADDP."""
