"""The learner group as the run sees it: plans one way, reports the other."""
