"""Two models side by side: the same prompts and noise, their rewards, and what people prefer."""
