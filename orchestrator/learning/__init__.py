"""The learner group as the run sees it: how it is started, gets orders and reports, and the refresh of the PRM."""
