"""Everything that knows a framework: one folder per host. A host imports the core only."""
