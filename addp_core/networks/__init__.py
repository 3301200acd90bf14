"""The networks: tokenizer, token predictor, encoder, token decoder and classifier. They read no files."""
