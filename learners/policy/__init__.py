"""Training of the policy: what each rank of the learner group does."""
