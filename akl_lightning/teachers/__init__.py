"""Where the teacher's distribution comes from."""
