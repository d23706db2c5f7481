"""How the roles talk to each other: records, typed handles, deadlines and retries, and the transport of weights."""
