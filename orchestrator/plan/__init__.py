"""Plans of a recipe: memory, operations, bytes and seconds of every role, before anything is started."""
