"""The studio: a web page on the user's own machine, which trains by the command line."""
