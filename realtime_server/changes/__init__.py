"""Row changes: from a source (the log, or triggers) to subscribers that may see the row."""
