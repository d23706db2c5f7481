"""The training loops of published methods, as their authors run them, on this project's models and mathematics."""
