"""Settings to runs, runs to programs, one loop, and what they leave."""
