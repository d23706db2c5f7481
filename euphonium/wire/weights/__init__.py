"""How weights travel from the learner group to the rollout actors."""
