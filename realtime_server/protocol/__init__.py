"""The wire: bytes and text in, messages out, and back. Pure functions; no clock, no socket.

    messages    the vocabulary, and the text frames of versions 1.0.0 and 2.0.0
    binary      the binary frames of version 2.0.0
    join        the payload of phx_join
    frames      finished frames, and what a broadcast looks like to each version

Source: Phoenix channels (`Phoenix.Socket.V1/V2.JSONSerializer`) and Supabase Realtime's `RealtimeWeb.Socket.V2Serializer`.
"""
