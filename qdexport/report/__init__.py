"""report.html and the terminal summary."""
