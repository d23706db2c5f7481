"""The study of methods on the embedded generator: what is run (plans), running it (runs), what came out (tables)."""
