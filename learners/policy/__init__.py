"""GRPO updates of the policy."""
