"""What listens: one module an endpoint. Each is made by a function that takes what the endpoint needs; `app` wires them to paths."""
