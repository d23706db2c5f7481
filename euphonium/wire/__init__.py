"""How the roles talk: the records they exchange, and how answers and weights travel."""
