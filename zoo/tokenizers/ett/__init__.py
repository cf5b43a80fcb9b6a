"""ETT: a tokenizer that is tuned through the language model that reads it."""
