"""The only code that knows DeepSpeed."""
