"""A venue on this machine: real wire format, made-up or recorded trades."""
