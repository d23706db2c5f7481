"""What is made for the platform that a run works on: dashboard, alert rules, cluster manifests, checks of the nodes."""
