"""What a run reports: metrics and where they are written, statistics, advice, pictures and charts."""
