"""Running many cases: editing, judging, going on after a stop."""
