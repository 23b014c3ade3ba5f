"""The wire: bytes and text in, messages out, and back. Pure functions; no clock, no socket.

    messages    the vocabulary, and the text frames of versions 1.0.0 and 2.0.0
    binary      the binary frames of version 2.0.0
    join        the payload of phx_join
    bindings    what one element of its postgres_changes asks for
    filters     the conditions in that
    inspection  how values are shown in sentences for clients
    frames      finished frames, and what a message looks like in each encoding

Source: Phoenix channels (`Phoenix.Socket.V1/V2.JSONSerializer`) and Supabase Realtime's `RealtimeWeb.Socket.V2Serializer`.
"""
