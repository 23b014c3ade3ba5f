"""Contains the endpoints, one per module. A function makes each from the services that it needs; `app` adds the routes."""
