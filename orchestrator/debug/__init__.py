"""Parts of a run by themselves, in this process and without Ray, to find which of them is at fault."""
