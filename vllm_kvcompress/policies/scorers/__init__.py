"""Scorers, one paper a file. A new one is a file here and a line in `recipes.SCORERS`."""
