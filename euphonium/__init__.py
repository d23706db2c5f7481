"""The library that every role shares; it knows no role, and starts nothing."""
