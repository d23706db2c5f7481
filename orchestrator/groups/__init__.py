"""Groups of samples: which prompts, how far ahead, drawn and scored."""
