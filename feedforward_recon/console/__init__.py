"""What a person at a terminal sees, and how a process is set up for it."""
