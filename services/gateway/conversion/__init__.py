"""Documents that are no plain text, read as Markdown by a process of its own."""
