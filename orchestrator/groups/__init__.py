"""Groups of samples: their prompts, how far ahead they are drawn, the trajectory buffer, and their advantages."""
