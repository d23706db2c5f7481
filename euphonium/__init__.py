"""The library that all roles share; it imports no role, and starts no process."""
