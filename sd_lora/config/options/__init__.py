"""The options of a run, one row an option, a file a section."""
