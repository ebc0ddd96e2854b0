"""A teacher that is not there: its hidden states at response positions, written to disk once and read in its place."""
