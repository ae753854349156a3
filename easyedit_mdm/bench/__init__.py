"""Work over many texts, layers or cases: what the command line's longer jobs do."""
