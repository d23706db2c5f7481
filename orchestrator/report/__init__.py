"""What people see of a run: metrics, statistics, pictures, advice."""
