"""Pretraining in three stages: the tokenizer, the token predictor, and ADDP."""
