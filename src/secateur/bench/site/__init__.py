"""The leaderboard as a static site: pages from records and cards that work without a network."""
