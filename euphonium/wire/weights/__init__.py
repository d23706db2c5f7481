"""The transport of weights from the learner group to the rollout actors."""
