"""Encodes and decodes the wire protocol. Pure functions; no clock, no socket.

    messages    events and messages, and the text frames of versions 1.0.0 and 2.0.0
    binary      the binary frames of version 2.0.0
    join        the payload of phx_join
    bindings    the elements of its postgres_changes
    filters     the filters of bindings
    inspection  values as sentences for clients show them
    frames      encoded frames, and the encodings of each kind of message

Source: Phoenix channels (`Phoenix.Socket.V1/V2.JSONSerializer`) and Supabase Realtime's `RealtimeWeb.Socket.V2Serializer`.
"""
