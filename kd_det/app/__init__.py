"""The main functions of the command line tools."""
