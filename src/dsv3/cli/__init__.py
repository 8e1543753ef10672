"""Floor 9: verbs. Parsing and printing, nothing else; heavy imports wait until a verb runs."""
