"""A realtime server on plain PostgreSQL: rows written in a transaction reach authorized WebSocket clients at once."""

__version__ = "0.1.0"
