"""Documents of blocks, as HTML pages, Markdown files and terminal output, and their pictures."""
