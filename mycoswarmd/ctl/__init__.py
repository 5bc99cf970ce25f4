"""mycoswarmctl: a client of the API socket."""
