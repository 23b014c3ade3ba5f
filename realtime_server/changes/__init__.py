"""Row changes: from a source (the log, or triggers) to those who subscribed to them and may see the row."""
